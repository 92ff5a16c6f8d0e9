"""Swapping the values of a LoRA adapter for another's in place: no tensor, scale or shape changes, so nothing is compiled again.

Ranks are padded with zeros, which add nothing. The scale ``alpha / r`` of the new adapter is folded into its B, relative to that
of the one whose place it takes, so configuration, tensors and what is saved from them stay consistent.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import PeftModel, load_peft_weights
from ..core.config import PeftConfig
from ..core.inlaid import Adapter, Place, places
from ..formats.state import PREFIX
from ..methods.lora import LoraConfig
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
        config: for HF's signature; the configurations of the model's adapters are brought up to date in any case.
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
    found = _lora_adapters(model)
    if not found:
        raise ValueError("No adapter layers found on the model: load the first adapter, then prepare the model, then load the second.")
    if target_rank is None:
        return
    too_large = next((one.place.path for one in found if one.method.r > target_rank), None)
    if too_large is not None:
        raise ValueError(f"The adapter on {too_large!r} has a larger rank than {target_rank}; give the largest one.")
    for one in found:
        grow(one.adapter, target_rank)
    configs = found[0].place.session.configs
    for name in {one.name for one in found}:
        _set_rank(configs[name], target_rank, {one.place.path: one.method.scaling for one in found if one.name == name})


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
    found = [one for one in _lora_adapters(model) if one.name == adapter_name]
    if any(adapter_name in one.place.merged for one in found):
        raise ValueError(f"Cannot hot-swap adapter {adapter_name!r} while it is merged; unmerge it first.")
    if any(one.method.scaling == 0 for one in found):
        raise ValueError(f"Adapter {adapter_name!r} has lora_alpha=0, so nothing that takes its place can have an effect.")
    given = {_plain(key, adapter_name): tensor for key, tensor in state_dict.items()}
    keys = [{own: f"{one.place.in_file}.{param.key or own}" for own, param in one.adapter.declared.items()} for one in found]
    unexpected = sorted(set(given) - {key for of_one in keys for key in of_one.values()})
    if unexpected:
        shown = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {shown}.")
    for one, of_one in zip(found, keys, strict=True):
        _swap(one, {own: given[key] for own, key in of_one.items() if key in given}, config.at(one.place.path))


def _swap(one: _Lora, tensors: Mapping[str, Tensor], new: LoraConfig) -> None:
    """New values for the adapter on one layer; those that are not given are 0."""
    site, rank = one.place.site, _rank(one, tensors)
    if rank > one.method.r:
        grow(one.adapter, rank)
    ratio = new.scaling / one.method.scaling
    declared = replace_rank(one.method, rank).params(site)
    with torch.no_grad():
        for own in one.adapter.declared:
            target = getattr(one.adapter, own).zero_()
            if own in tensors:
                value = declared[own].from_file(site, tensors[own].to(target.device)) * (ratio if own in SCALED else 1.0)
                target[tuple(slice(n) for n in value.shape)] = value.to(target.dtype)
        if "lora_magnitude_vector" in one.adapter.declared and "lora_magnitude_vector" not in tensors:
            # DoRA's layers start at the norms of the base.
            one.method.start(one.adapter)


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
def replace_rank(method: LoraConfig, rank: int) -> LoraConfig:
    """The method with another rank and the same scale."""
    one = replace(method, r=rank, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}, init_lora_weights=True)
    return cast(LoraConfig, replace(one, lora_alpha=method.scaling / one.scaling).variant())


def grow(adapter: Adapter, rank: int) -> None:
    """Pad an adapter with zeros to a larger rank; what it does stays the same."""
    adapter.method = replace_rank(cast(LoraConfig, adapter.method), rank)
    adapter.__dict__.pop("_declared", None)
    for own, param in adapter.declared.items():
        tensor, shape = getattr(adapter, own), param.shape(adapter.site)
        if tuple(tensor.shape) != shape:
            padded = tensor.new_zeros(shape)
            padded[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
            adapter._parameters[own] = nn.Parameter(padded, requires_grad=tensor.requires_grad)


def _rank(one: _Lora, tensors: Mapping[str, Tensor]) -> int:
    """The rank of the new tensors. A rank more is as many rows more of A in every layout."""
    own = one.method.names(one.place.site)[0]
    if own not in tensors:
        return one.method.r
    rows_per_rank = one.adapter.declared[own].shape_in_file(one.place.site)[0] // one.method.r
    return tensors[own].shape[0] // rows_per_rank


def _set_rank(config: Any, rank: int, scales: Mapping[str, float]) -> None:
    """Say in a configuration what `grow` has done to its layers."""
    unit = replace(config, r=rank, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}).scaling
    alphas = {path: scale / unit for path, scale in scales.items()}
    config.r, config.rank_pattern = rank, {}
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {f"^{path}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


# ---- finding --------------------------------------------------------------------------------------------------------------
class _Lora(NamedTuple):
    """A LoRA adapter on one layer."""

    name: str
    place: Place
    adapter: Adapter

    @property
    def method(self) -> LoraConfig:
        return cast(LoraConfig, self.adapter.method)


def _bare(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _lora_adapters(model: nn.Module) -> list[_Lora]:
    found = [p for p in places(_bare(model)) if isinstance(p, Place)]
    return [_Lora(n, p, a) for p in found for n, a in p.adapters.items() if a.method.peft_type == "LORA"]


def _plain(key: str, adapter_name: str) -> str:
    """The key as in a file, without HF's prefix."""
    parts = key.removeprefix("_orig_mod.").removeprefix(PREFIX).split(".")
    return ".".join(part for i, part in enumerate(parts) if not (part == adapter_name and i and parts[i - 1].startswith("lora_")))
