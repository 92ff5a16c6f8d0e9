"""Small functions and constants of HF peft that other libraries call."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .. import PeftModel
from .. import delete_adapter as _delete_adapter
from ..core.attach import activate
from ..core.inlaid import places, session_of
from ..core.session import Session
from ..core.targets import explain_targets
from ..tuner import BaseTuner


class PeftWarning(UserWarning):
    """HF's category of warnings."""


def _base(model: nn.Module) -> nn.Module:
    if isinstance(model, PeftModel):
        return model.get_base_model()
    return model.model if isinstance(model, BaseTuner) else model


def _session(model: nn.Module) -> Session:
    session = session_of(_base(model))
    if session is None:
        raise ValueError("The model has no adapters.")
    return session


def _names(adapter_names: str | Sequence[str]) -> tuple[str, ...]:
    return (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)


# ---- peft.functional ------------------------------------------------------------------------------------------------------
def set_adapter(model: nn.Module, adapter_name: str | Sequence[str], inference_mode: bool = False, layer_cls: Any = None) -> None:
    """Choose the active adapters of a model that they were injected into.

    Raises:
        ValueError: one of them is not there.
    """
    activate(_session(model), _names(adapter_name), _base(model))


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Say which adapters are trained.

    Raises:
        ValueError: one of them is not there.
    """
    session = _session(model)
    names = session.check(_names(adapter_names))
    session.trainable = session.trainable | set(names) if requires_grad else session.trainable - set(names)
    for place in places(_base(model)):
        for name in names:
            if name in place.adapters:
                place.adapters[name].requires_grad_(requires_grad)


def delete_adapter(model: nn.Module, adapter_name: str, prefix: str | None = None, layer_cls: Any = None) -> list[str] | None:
    """Take an adapter out of a model that it was injected into.

    Returns:
        The adapters that are active now, or None.

    Raises:
        ValueError: it is not there.
    """
    session = _session(model)
    _delete_adapter(_base(model), adapter_name, prefix)
    return list(session.active) or None


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Bring an adapter from half to single precision, as it is when it is set in with ``autocast_adapter_dtype``."""
    for place in places(_base(model)) if autocast_adapter_dtype else ():
        if adapter_name in place.adapters:
            for q in place.adapters[adapter_name].parameters():
                if q.dtype in (torch.float16, torch.bfloat16):
                    q.data = q.data.float()


# ---- peft.utils -----------------------------------------------------------------------------------------------------------
def _get_submodules(model: nn.Module, key: str) -> tuple[nn.Module, nn.Module, str]:
    """Of the module named ``key``: its parent, itself, and its name in the parent."""
    parent, _, name = key.rpartition(".")
    return model.get_submodule(parent), model.get_submodule(key), name


def _maybe_shard_state_dict_for_tp(model: nn.Module, state_dict: dict[str, Tensor], adapter_name: str) -> None:
    """What older versions of transformers call before they load an adapter: nothing, for a model that is not split among devices.

    Raises:
        ValueError: it is split, by tensor parallelism.
    """
    if any(getattr(m, "_hf_tp_plan", None) is not None and getattr(m, "_hf_device_mesh", None) is not None for m in model.modules()):
        raise ValueError("The model is split by the tensor parallelism of an older transformers; load it without `tp_plan`.")


def transpose(weight: Tensor, fan_in_fan_out: bool) -> Tensor:
    """The weight, transposed where ``fan_in_fan_out``."""
    if not fan_in_fan_out:
        return weight
    return nn.Parameter(weight.T) if isinstance(weight, nn.Parameter) else weight.T


def infer_device() -> str:
    """The kind of device that torch computes on here."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return "cpu" if found is None else found.type


def check_target_module_exists(config: Any, key: str) -> bool:
    """Whether a configuration means a module of this name; its type is not looked at."""
    model = nn.Module()
    owner, *parts = model, *key.split(".")
    for part in parts[:-1]:
        owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    owner.add_module(parts[-1], nn.Linear(1, 1, device="meta"))
    return key in explain_targets(model, config).matched


def fsdp_auto_wrap_policy(model: nn.Module) -> Any:
    """Which modules FSDP is to shard each for itself: the model's blocks, by ``FSDP_TRANSFORMER_CLS_TO_WRAP`` or its own list.

    Adapters stay with the layer that they sit in, which is what reads them; so blocks have frozen and trained parameters
    together, which FSDP 1 takes with ``fsdp_use_orig_params: true`` only (not accelerate's default), and FSDP 2 as it is.

    Raises:
        TypeError: a class that is named is not in the model.
    """
    from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

    own = {n for m in _base(model).modules() for n in getattr(m, "_no_split_modules", None) or ()}
    wanted = [n for n in os.environ.get("FSDP_TRANSFORMER_CLS_TO_WRAP", ",".join(sorted(own))).split(",") if n]
    classes = {type(m).__name__: type(m) for m in _base(model).modules()}
    absent = [n for n in wanted if n not in classes and n not in own]
    if absent:
        raise TypeError(f"Could not find the transformer layer class to wrap in the model: {', '.join(absent)}.")
    return functools.partial(transformer_auto_wrap_policy, transformer_layer_cls={classes[n] for n in wanted if n in classes})
