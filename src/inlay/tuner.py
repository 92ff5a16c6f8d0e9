"""The layer between `PeftModel` and the base in HF peft: ``peft_model.base_model`` is one, ``.model`` of it is the base.

It exists for the code that expects it; the session and the places in the model are what it speaks for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from .core.attach import activate, attach, detach
from .core.config import PeftConfig, nearest
from .core.inlaid import adapters_of, places, session_of
from .core.method import METHODS, Method
from .core.session import Session
from .operations import merge as merging


class BaseTuner(nn.Module):
    """A base model with adapters set into it.

    Args:
        model: the base; it is changed in place and stays what it is.
        peft_config: a configuration, or a dictionary of them by adapter name.
        adapter_name: the first adapter's name.
        low_cpu_mem_usage: leave the adapter's tensors on the meta device, for a file to fill.
        attach_options: for `attach`.
    """

    peft_type = ""

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        **attach_options: Any,
    ) -> None:
        super().__init__()
        configs = peft_config if isinstance(peft_config, dict) else {adapter_name: peft_config}
        for name, config in configs.items():
            attach(model, config, name, low_cpu_mem_usage=low_cpu_mem_usage, **attach_options)
        self.model = model
        model.peft_config = self.peft_config  # type: ignore[assignment]

    @property
    def session(self) -> Session:
        session = session_of(self.model)
        if session is None:
            raise ValueError("The adapters have been unloaded from this model; call `get_peft_model` on it again.")
        return session

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.session.configs

    @property
    def prefix(self) -> str:
        config = next(iter(self.peft_config.values()))
        return config.prefix if isinstance(config, Method) else ""

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.session.shown

    @property
    def targeted_module_names(self) -> list[str]:
        return [p.path for p in places(self.model)]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            return getattr(self.model, name) if (called := self._of_a_method(name)) is None else called

    def _of_a_method(self, name: str) -> Any:
        """What a method lets users call on the model (`Method.on_model`), with the layers of the adapter in front."""
        session = session_of(self.model)
        if session is None:
            return None
        for adapter in session.active:
            config = session.configs[adapter]
            if name in getattr(config, "on_model", ()):
                return lambda *args, **kwargs: getattr(config, name)(adapters_of(self.model, adapter), *args, **kwargs)
        return None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    def get_model_config(self, model: nn.Module | None = None) -> dict[str, Any]:
        config: Any = getattr(model or self.model, "config", {"model_type": "custom"})
        return config.to_dict() if hasattr(config, "to_dict") else dict(config)

    # -- adapters --
    def inject_adapter(
        self, model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True, low_cpu_mem_usage: bool = False
    ) -> None:
        config = self.session.configs.pop(adapter_name)
        attach(
            model,
            config,
            adapter_name,
            activate_it=False,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapters.

        Raises:
            ValueError: one of them is not loaded.
        """
        activate(self.session, (adapter_name,) if isinstance(adapter_name, str) else tuple(adapter_name), self.model)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say which adapters are trained. They take gradients while they are active."""
        names = self.session.check((adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names))
        for name in names:
            (self.session.trainable.add if requires_grad else self.session.trainable.discard)(name)
        for place in places(self.model):
            for name in names:
                if name in place.adapters:
                    place.adapters[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of the model."""
        detach(self.model, adapter_name)

    def enable_adapter_layers(self) -> None:
        self.session.enabled = True

    def disable_adapter_layers(self) -> None:
        self.session.enabled = False

    # -- merging --
    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Put adapters (the active ones where None) into the weights; `unmerge_adapter` takes them out to the bit."""
        from .operations.dequantize import warn_of_rounding

        merging.merge(self.model, self.session, adapter_names, safe_merge)
        warn_of_rounding(self.model)

    def unmerge_adapter(self) -> None:
        """Put the base's own weights back."""
        merging.unmerge(self.model)

    def merge_and_unload(
        self,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
        *,
        base: str = "requantized",
        original: str | None = None,
        out_dtype: torch.dtype | None = None,
    ) -> nn.Module:
        """The base model with adapters merged into its weights, and nothing else left of them.

        Args:
            progressbar: for HF's signature; merging is fast enough not to need one.
            safe_merge: refuse results that are not finite.
            adapter_names: the adapters, in the order in which they act; the active ones where None.
            base: what becomes of quantised layers: ``"requantized"`` rounds the merged weights again, ``"dequantized"`` makes them
                dense, ``"original"`` makes them dense from the weights before quantisation.
            original: where those are: a safetensors file or a folder; where None, what the base was loaded from, on this machine.
            out_dtype: of all weights that are dense afterwards.

        Raises:
            TypeError: a method is no function of the weight; the model stays as it was.
            ValueError: an option is unknown, the original weights are not found, or an adapter acts on inputs; the model stays as it
                was.
        """
        from .operations.dequantize import BASES, merge_dense, warn_of_rounding

        if base not in BASES:
            raise ValueError(f"base={base!r} is not one of {', '.join(map(repr, BASES))}.{nearest(base, BASES)}")
        session = self.session
        for name in session.check(session.active if adapter_names is None else adapter_names):
            if session.configs[name].is_prompt_learning:
                kind = session.configs[name].peft_type
                raise ValueError(f"{name!r} ({kind}) acts on inputs and cannot be merged; name the adapters of weights (adapter_names).")
        if base != "requantized":
            from .operations.original import original_weights

            read = original_weights(self.model, original) if base == "original" else None
            return merge_dense(self.model, session, adapter_names, safe_merge, read, out_dtype)
        merging.unmerge(self.model)
        merging.merge(self.model, session, adapter_names, safe_merge)
        warn_of_rounding(self.model)
        model = merging.unload(self.model, session, keep_merged=True)
        for q in () if out_dtype is None else model.parameters():
            if type(q) is nn.Parameter and q.is_floating_point() and q.dtype.itemsize > 1:
                q.data = q.data.to(out_dtype)
        return model

    def unload(self) -> nn.Module:
        """The base model as it was before any adapter."""
        return merging.unload(self.model, self.session, keep_merged=False)

    # -- operations --
    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float] | Mapping[str, Sequence[float]],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: float | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        **options: Any,
    ) -> None:
        """Add an adapter that is made of others, of any method; see `inlay.operations.combine.add_weighted_adapter`."""
        from .operations.combine import add_weighted_adapter

        svd = (svd_rank, svd_clamp, svd_full_matrices, svd_driver)
        add_weighted_adapter(self.model, adapters, weights, adapter_name, combination_type, *svd, density, majority_sign_method, **options)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether `convert_to_lora` takes an adapter."""
        return all(not p.method.unmergeable for p in adapters_of(self.model, adapter_name))


TUNERS: dict[str, type[BaseTuner]] = {}


def tuner_class(peft_type: str) -> type[BaseTuner]:
    """The class that HF calls ``LoraModel``, ``IA3Model``, ...: the same for all methods but for its name."""
    if peft_type not in TUNERS:
        body = {"peft_type": peft_type, "__module__": __name__, **METHODS[peft_type].of_tuner}
        TUNERS[peft_type] = type(_tuner_name(METHODS[peft_type]), (BaseTuner,), body)
    return TUNERS[peft_type]


def _tuner_name(method: type[Method]) -> str:
    return f"{method.__name__.removesuffix('Config')}Model"


def __getattr__(name: str) -> type[BaseTuner]:
    """The classes by name, for imports and for pickle."""
    found = next((t for t, m in METHODS.items() if _tuner_name(m) == name), None)
    if found is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return tuner_class(found)
