"""The functions of HF peft: put an adapter on a model, into one, take it out, and prepare a base for training."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .core.attach import attach, detach
from .core.config import PeftConfig
from .core.inlaid import places
from .core.method import Method
from .core.stores import store_of
from .core.targets import bare_model
from .formats.slots import PREFIX
from .model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftMixedModel, PeftModel, require_input_gradients


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Set a new adapter into a model and freeze the rest.

    Args:
        model: the base; changed in place.
        peft_config: which method, where.
        adapter_name: what to call the adapter.
        mixed: return a `PeftMixedModel`.
        autocast_adapter_dtype: float32 adapters over a base in half precision.
        revision: the base's revision, for the adapter's file.
        low_cpu_mem_usage: leave the adapter on the meta device.

    Raises:
        ValueError: the configuration does not fit the model, or the model is a `PeftModel` already. The model is untouched.
    """
    if isinstance(model, PeftModel):
        raise ValueError("The model is a PeftModel already; add to it with `model.add_adapter(name, config)`.")
    if type(peft_config) is PeftConfig:
        raise ValueError("A bare PeftConfig names no method; use one such as LoraConfig.")
    name = getattr(model, "name_or_path", None) or getattr(model, "__dict__", {}).get("name_or_path")
    if name:
        peft_config.base_model_name_or_path = name
    if revision is not None:
        if peft_config.revision not in (None, revision):
            warnings.warn(f"peft config has revision {peft_config.revision!r}; {revision!r} replaces it.")
        peft_config.revision = revision
    cls = PeftMixedModel if mixed else MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(peft_config.task_type), PeftModel)
    return cls(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Set an adapter into a model without wrapping it; ``model.peft_config`` says which there are.

    Args:
        state_dict: adapt the modules that these keys name, where the configuration does not know them.
    """
    if not isinstance(peft_config, Method):
        raise ValueError(
            f"`inject_adapter_in_model` sets adapters into weights; {peft_config.peft_type} acts on inputs. Use `get_peft_model`."
        )
    if "peft_config" not in vars(model) and next(places(model), None) is None:
        # Whoever took the layers' adapters away and deleted `peft_config` meant the adapters to be gone.
        vars(model).pop("_inlay_session", None)
    only = None
    if state_dict:
        only = {k.removeprefix("_orig_mod.").removeprefix(PREFIX).rsplit(f".{peft_config.prefix}", 1)[0] for k in state_dict}
    session = attach(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, only=only)
    model.peft_config = session.configs  # type: ignore[assignment]
    return model


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None) -> None:
    """Take an adapter out of a model that it was injected into."""
    detach(bare_model(model), adapter_name)


def prepare_model_for_kbit_training(
    model: nn.Module, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: dict[str, Any] | None = None
) -> nn.Module:
    """Freeze a base, keep what is not quantised in float32, and let gradients pass its checkpointed blocks.

    Layers of bitsandbytes and of Inlay take inputs of any dtype. Those of other backends need the dtype that they were made for, so
    a model that has them keeps its dtypes.

    Args:
        model: a base, quantised or in half precision; changed in place.
        use_gradient_checkpointing: turn it on.
        gradient_checkpointing_kwargs: for it; non-reentrant where nothing is said.
    """
    any_input = {store_of(m, n).backend for m in model.modules() for n in m._parameters} <= {"", "bitsandbytes", "inlay"}
    for q in model.parameters():
        q.requires_grad_(False)
        # The codes of bitsandbytes may be stored as if they were numbers in half precision.
        if any_input and q.dtype in (torch.float16, torch.bfloat16) and type(q).__name__ not in ("Params4bit", "Int8Params"):
            q.data = q.data.float()
    if use_gradient_checkpointing:
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        if kwargs.get("use_reentrant", True):
            require_input_gradients(model)
        if hasattr(model, "gradient_checkpointing_enable"):
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)  # type: ignore[operator]
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Frozen floating-point parameters to ``dtype``, trainable ones to float32."""
    for q in model.parameters():
        if q.is_floating_point():
            q.data = q.data.to(torch.float32 if q.requires_grad else dtype)


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """A configuration from a dictionary with a ``peft_type``."""
    return PeftConfig.from_peft_type(**config_dict)
