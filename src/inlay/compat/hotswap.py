"""Swapping the values of a LoRA adapter for another's in place: no tensor, scale or shape changes, so nothing is compiled again.

Ranks are padded with zeros, which add nothing. The scale ``alpha / r`` of the new adapter is folded into its B, relative to that
of the one whose place it takes, so configuration, tensors and what is saved from them stay consistent.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import PeftModel, load_peft_weights
from ..core.config import PeftConfig
from ..core.inlaid import Adapter, Place, places
from ..core.method import Method, Param
from ..formats.state import PREFIX
from .functions import infer_device

# Options that change what is computed from the tensors, beyond ranks and scales.
MUST_AGREE = ("use_dora", "lora_dropout")
# The tensors that stand behind the scale.
SCALED = ("lora_B", "lora_embedding_B", "lora_B_bias")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """
    Raises:
        ValueError: adapters of these configurations cannot take each other's place; the message says why.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    if config0.peft_type != "LORA":
        raise ValueError(f"Hotswapping only supports LORA but {config0.peft_type} was passed.")
    for name in MUST_AGREE:
        old, new = getattr(config0, name), getattr(config1, name)
        if old != new:
            raise ValueError(f"Configs are incompatible: for {name}, {old} != {new}")


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give LoRA adapters the rank of the largest one that is to come, before the model is compiled.

    Args:
        model: has the first adapter.
        target_rank: the rank; the adapters' own where None.
        config: the configuration, or several by adapter name, to be brought up to date.
        check_compiled: what to do about a model that is compiled already.

    Raises:
        ValueError: there is no LoRA adapter, one has a larger rank, or (``check_compiled``) the model is compiled.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(message)
        if check_compiled == "warn":
            warnings.warn(f"{message}: it will be compiled again.")
        elif check_compiled != "ignore":
            raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead.")
    found = [(p, n) for p in _lora_places(model) for n in p.adapters if _is_lora(p.adapters[n])]
    if not found:
        raise ValueError("No adapter layers found on the model: load the first adapter, then prepare the model, then load the second.")
    if target_rank is None:
        return
    too_large = next((p.path for p, n in found if p.adapters[n].method.r > target_rank), None)
    if too_large is not None:
        raise ValueError(f"The adapter on {too_large!r} has a larger rank than {target_rank}; give the largest one.")
    scaled = {n: {p.path: p.adapters[n].method.scaling for p, other in found if other == n} for _, n in found}
    for place, name in found:
        grow(place.adapters[name], target_rank)
    configs = config if isinstance(config, dict) else {} if config is None else dict.fromkeys(scaled, config)
    for name, of_name in configs.items():
        if name in scaled:
            _set_rank(of_name, target_rank, scaled[name])


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """Put the values of another LoRA adapter into one that is there.

    Args:
        model: has the adapter; wrapped, compiled or bare.
        state_dict: the new tensors, by keys with or without the adapter's name and HF's prefix.
        adapter_name: the adapter whose place they take.
        config: the configuration that goes with them: their ranks and scales.
        parameter_prefix: for HF's signature.

    Raises:
        ValueError: the adapter is merged, or its scale is 0, so that nothing could be folded into it.
        RuntimeError: a tensor has no place here. The adapter is as it was.
    """
    found = [(p, a) for p in _lora_places(model) if (a := p.adapters.get(adapter_name)) is not None and _is_lora(a)]
    if any(adapter_name in place.merged for place, _ in found):
        raise ValueError(f"Cannot hot-swap adapter {adapter_name!r} while it is merged; unmerge it first.")
    given = {_plain(key, adapter_name): tensor for key, tensor in state_dict.items()}
    known = {f"{p.in_file}.{q.key or own}": (p, a, own) for p, a in found for own, q in a.declared.items()}
    unexpected = sorted(set(given) - set(known))
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {shown}.")
    if any(a.method.scaling == 0 for _, a in found):
        raise ValueError(f"Adapter {adapter_name!r} has lora_alpha=0, so nothing that takes its place can have an effect.")

    for place, adapter in found:
        new = config.at(place.path)
        tensors = {own: given[key] for key, (p, a, own) in known.items() if a is adapter and key in given}
        rank = _rank(tensors, place, adapter, new)
        if rank > adapter.method.r:
            grow(adapter, rank)
        ratio = new.scaling / adapter.method.scaling
        declared = replace_rank(adapter.method, rank).params(place.site)
        with torch.no_grad():
            for own in adapter.declared:
                getattr(adapter, own).zero_()
                if own in tensors:
                    _copy_into(getattr(adapter, own), declared[own], place, tensors[own], ratio if own in SCALED else 1.0)
            if "lora_magnitude_vector" in adapter.declared and "lora_magnitude_vector" not in tensors:
                # A layer that the new adapter leaves alone.
                adapter.method.start(adapter)


def hotswap_adapter(model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any) -> None:
    """Put the values of a saved LoRA adapter into one that is there.

    Raises:
        ValueError, RuntimeError: as for `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    check_hotswap_configs_compatible(_bare(model).peft_config[adapter_name], config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


# ---- ranks ----------------------------------------------------------------------------------------------------------------
def replace_rank(method: Method, rank: int) -> Any:
    """The method with another rank and the same scale."""
    one = replace(method, r=rank, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}, init_lora_weights=True)
    return replace(one, lora_alpha=method.scaling / one.scaling).variant()  # type: ignore[attr-defined]


def grow(adapter: Adapter, rank: int) -> None:
    """Pad an adapter with zeros to a larger rank; what it does stays the same."""
    old = adapter.declared
    adapter.method = replace_rank(adapter.method, rank)
    adapter.__dict__.pop("_declared", None)
    for own, param in adapter.declared.items():
        tensor = getattr(adapter, own)
        shape = param.shape(adapter.site)
        if own in old and tuple(tensor.shape) != shape:
            padded = tensor.new_zeros(shape)
            padded[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
            adapter._parameters[own] = nn.Parameter(padded, requires_grad=tensor.requires_grad)


def _rank(tensors: Mapping[str, Tensor], place: Place, adapter: Adapter, new: Any) -> int:
    """The rank of the new tensors: what they have themselves, or else what their configuration says."""
    own = adapter.method.names(place.site)[0]  # type: ignore[attr-defined]
    if own not in tensors:
        return min(new.r, adapter.method.r)  # type: ignore[attr-defined]
    # A rank more is a row more of A, in every layout.
    per_rank = adapter.declared[own].shape_in_file(place.site)[0] // adapter.method.r or 1  # type: ignore[attr-defined]
    return tensors[own].shape[0] // per_rank


def _copy_into(own: Tensor, declared: Param, place: Place, tensor: Tensor, factor: float) -> None:
    value = declared.from_file(place.site, tensor.to(own.device)) * factor
    own[tuple(slice(n) for n in value.shape)] = value.to(own.dtype)


def _set_rank(config: Any, rank: int, scales: Mapping[str, float]) -> None:
    """Say in a configuration what `grow` has done to its layers."""
    unit = replace(config, r=rank, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}).scaling
    alphas = {path: scale / unit for path, scale in scales.items()}
    config.r, config.rank_pattern = rank, {}
    config.lora_alpha = max(set(alphas.values()), key=list(alphas.values()).count)
    config.alpha_pattern = {f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


# ---- finding --------------------------------------------------------------------------------------------------------------
def _bare(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _lora_places(model: nn.Module) -> list[Place]:
    return [p for p in places(_bare(model)) if isinstance(p, Place)]


def _is_lora(adapter: Adapter) -> bool:
    return adapter.method.peft_type == "LORA"


def _plain(key: str, adapter_name: str) -> str:
    """The key as in a file, without HF's prefix."""
    key = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
    parts = key.split(".")
    return ".".join(part for i, part in enumerate(parts) if not (part == adapter_name and i and parts[i - 1].startswith("lora_")))
