"""What transformers asks for when it loads an adapter by itself: how to rename and reshape the tensors of its file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming
from transformers.integrations.peft import PeftAdapterMixin

from ..core.adapter import Adapter
from .keys import live_name, load_map, prefixes_of

# Whether this version of transformers asks the layers what they call the tensors for which the general rule is wrong.
ASKS_LAYERS = "adapter_state_dict_load_map" in PeftAdapterMixin.load_adapter.__code__.co_names


class _AdapterNames(WeightRenaming):
    """Keys of a file to names in the model."""

    __slots__ = ("adapter_name", "prefixes")

    def __init__(self, adapter_name: str, prefixes: tuple[str, ...]) -> None:
        super().__init__("adapter tensors", "adapter tensors")
        self.adapter_name, self.prefixes = adapter_name, prefixes

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return live_name(source_key, self.adapter_name, self.prefixes), None

    def was_used(self) -> bool:
        # What was used is undone when the model is saved; the base has nothing to do with this.
        return False


class _AdapterTensors(WeightConverter):
    """Tensors of a file in the shape in which the model has them."""

    __slots__ = ()

    def __init__(self, adapter_name: str) -> None:
        super().__init__("adapter tensor", "adapter tensor", [_FromFile(adapter_name)])

    def rename_source_key(self, source_key: str) -> tuple[str, str | None]:
        return source_key, self.source_patterns[0]

    def was_used(self) -> bool:
        return False


class _FromFile(ConversionOps):
    def __init__(self, adapter_name: str) -> None:
        self.adapter_name = adapter_name

    def convert(
        self, input_dict: dict[str, list[Tensor]], source_patterns: Sequence[str], target_patterns: Sequence[str], **kwargs: Any
    ) -> dict[str, Any]:
        model, name = kwargs["model"], kwargs["full_layer_name"]
        (tensor,) = next(iter(input_dict.values()))
        path, _, leaf = name.rpartition(".")
        holder = model.get_submodule(path)
        if not ASKS_LAYERS and "_inlay" in vars(holder):
            name = f"{path}.{load_map(holder, self.adapter_name).get(leaf, leaf)}"
            path, _, leaf = name.rpartition(".")
            holder = model.get_submodule(path)
        param = holder.declared.get(leaf) if isinstance(holder, Adapter) else None
        if param is not None and tuple(tensor.shape) == param.shape_in_file(holder.site):
            tensor = param.from_file(holder.site, tensor)
        own = holder._parameters.get(leaf)
        # Loading says nothing about training.
        return {name: tensor.contiguous() if own is None else nn.Parameter(tensor.contiguous(), requires_grad=own.requires_grad)}

    @property
    def reverse_op(self) -> ConversionOps:
        raise NotImplementedError("Adapters are saved by `get_peft_model_state_dict`.")


def build_peft_weight_mapping(
    weight_conversions: Sequence[WeightConverter | WeightRenaming] | None, adapter_name: str, peft_config: Any = None
) -> list[WeightConverter | WeightRenaming]:
    """The transforms with which transformers loads an adapter's file into a model that has the adapter.

    Args:
        weight_conversions: those of the base; its renamings hold for the paths of adapters too.
        adapter_name: the adapter in the model.
        peft_config: its configuration.

    Raises:
        ValueError: the adapter has raw parameters, and this version of transformers cannot tell those of one module apart.
    """
    if not ASKS_LAYERS and getattr(peft_config, "target_parameters", None):
        raise ValueError(
            "This version of transformers cannot load adapters of raw parameters (`target_parameters`) by itself; load this one by "
            "`inlay.PeftModel.from_pretrained`, or install a newer transformers."
        )
    of_base = [c for c in weight_conversions or () if isinstance(c, WeightRenaming)]
    return [_AdapterNames(adapter_name, prefixes_of(peft_config)), *of_base, _AdapterTensors(adapter_name)]
