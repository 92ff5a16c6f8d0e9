"""Swapping the values of an adapter for another's in place: no tensor, scale or shape changes, so nothing is compiled again.

The new adapter is built beside the model, as for loading it, and everything is checked before the first value is copied. Where
its ranks are smaller it is padded, and where its scale is another, that goes into one of its tensors (`operations.fitting`);
configuration, tensors and what is saved from them stay consistent.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .. import PeftModel, load_peft_weights
from ..core.adapter import Adapter
from ..core.config import PeftConfig
from ..core.inlaid import places
from ..core.method import Method
from ..core.place import Place
from ..core.plan import Biases, Part, Plan, materialise
from ..core.retrained import Retrained
from ..core.targets import Target
from ..core.tied import Tied
from ..formats.filling import AdapterMismatch, fill
from ..formats.slots import PREFIX, slots, slots_of_parts
from ..operations.fitting import Seats, fitted, size_of
from ..prompts import load_prompt
from .functions import infer_device

Key = tuple[str, str]

# Options that change what is computed from the tensors in a way that the weight does not show.
MUST_AGREE = ("use_dora", "lora_dropout")
# Those of methods on inputs. A virtual token more is no padding: attention would look at it.
MUST_AGREE_ON_INPUTS = (
    "num_virtual_tokens", "num_transformer_submodules", "num_layers", "num_attention_heads", "token_dim", "num_tasks", "prefix_projection",
    "cpt_mask", "cpt_tokens_type_mask",
)  # fmt: skip


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """
    Raises:
        ValueError: adapters of these configurations cannot take each other's place; the message says why.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    on_weights = isinstance(config0, Method)
    for name in (f.name for f in fields(config0)):
        old, new = getattr(config0, name), getattr(config1, name)
        # What a prompt's configuration leaves open follows from the base.
        known = on_weights or (old is not None and new is not None)
        matters = name in MUST_AGREE or name.endswith("dropout") if on_weights else name in MUST_AGREE_ON_INPUTS
        if matters and known and old != new:
            raise ValueError(f"Configs are incompatible: for {name}, {old} != {new}")


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Give adapters the rank of the largest one that is to come, before the model is compiled.

    Args:
        model: has the first adapter.
        target_rank: the rank; the adapters' own where None.
        config: for HF's signature; the configurations of the model's adapters are brought up to date in any case.
        check_compiled: what to do about a model that is compiled already.

    Raises:
        ValueError: there is no adapter with a rank, one has a larger rank or cannot be padded, or (``check_compiled``) the model
            is compiled.
    """
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        message = "Call prepare_model_for_compiled_hotswap *before* compiling the model"
        if check_compiled == "error":
            raise ValueError(message)
        if check_compiled == "warn":
            warnings.warn(f"{message}: it will be compiled again.")
        elif check_compiled != "ignore":
            raise ValueError(f"check_compiled should be one of 'error', 'warn', or 'ignore', got {check_compiled!r} instead.")
    adapters = _by_name(_bare(model))
    found = {name: inside for name, at in adapters.items() if (inside := {path: p for path, p in at.items() if size_of(p)})}
    if not found:
        raise ValueError("No adapter layers found on the model: load the first adapter, then prepare the model, then load the second.")
    if target_rank is None:
        return
    too_large = next((path for at in found.values() for path, p in at.items() if size_of(p) > target_rank), None)
    if too_large is not None:
        raise ValueError(f"The adapter on {too_large!r} has a larger rank than {target_rank}; give the largest one.")
    configs = next(p for p in places(_bare(model)) if isinstance(p, Place)).session.configs
    ready = []
    for name, at in found.items():
        seats = Seats(at, configs[name], dict.fromkeys(at, target_rank))
        first = next(iter(at.values()))
        grows = bool(seats.grown) and seats.shared is not None
        shared = _padded(seats.shared, first.shared, first) if grows else {}  # type: ignore[arg-type]
        to_be = _filled(seats.shared, shared)
        ready.append((seats, {path: _as_it_is(at[path], seats.at[path], to_be) for path in seats.grown}, shared))
    for seats, values, shared in ready:
        seats.take(values, shared)


def hotswap_adapter_from_state_dict(
    model: nn.Module, state_dict: Mapping[str, Tensor], adapter_name: str, config: Any, parameter_prefix: str = "lora_"
) -> None:
    """Put the values of another adapter into one that is there.

    Args:
        model: has the adapter; wrapped, compiled or bare.
        state_dict: the new tensors, by keys with or without the adapter's name and HF's prefix.
        adapter_name: the adapter whose place they take.
        config: the configuration that goes with them: their ranks and scales.
        parameter_prefix: for HF's signature.

    Raises:
        ValueError: the adapter is merged, has a scale of 0, or is one that the new values cannot be put into.
        RuntimeError: a tensor has no place here. The adapter is as it was, in both cases.
    """
    if (prompted := _prompted(model, adapter_name)) is not None:
        check_hotswap_configs_compatible(prompted.peft_config[adapter_name], config)
        load_prompt(prompted, adapter_name, state_dict)
        return
    bare = _bare(model)
    here = {(p.path, p.name): p for p in places(bare) if adapter_name in p.adapters}
    if not here:
        raise ValueError(f"There is no adapter {adapter_name!r} in the model; load it before swapping others into it.")
    if any(adapter_name in place.merged for place in here.values()):
        raise ValueError(f"Cannot hot-swap adapter {adapter_name!r} while it is merged; unmerge it first.")
    own = _config_of(here, adapter_name)
    if str(config.peft_type) != str(own.peft_type):
        raise ValueError(f"Incompatible PEFT types found: {own.peft_type} and {config.peft_type}")
    given = {_plain(key, adapter_name): tensor for key, tensor in state_dict.items()}
    parts = _built(bare, config, here, given, adapter_name)
    absent = sorted(path for path, name in parts if (path, name) not in here)
    if absent:
        why = f"{adapter_name!r} does not adapt {absent[0]!r}"
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {why}.")
    # Layers that the new one leaves alone become the base.
    alone = {key for key in here if key not in parts}
    idle = _fresh(bare, own, alone) if alone else {}
    copies: list[tuple[Tensor, Tensor]] = []
    pairs: dict[str, tuple[Adapter, Adapter]] = {}
    for key, place in here.items():
        old, new = place.adapters[adapter_name], (parts.get(key) or idle[key]).adapter
        if not isinstance(old, Adapter) or not isinstance(new, Adapter):
            copies += _of_modules(old, new, place.path)
        elif not isinstance(old.method, Tied):
            pairs[old.path] = old, new
            copies += _of_biases(old, new)
    values: dict[str, dict[str, Tensor]] = {}
    shared: dict[str, Tensor] = {}
    seats = Seats({path: old for path, (old, _) in pairs.items()}, own, {path: size_of(new) for path, (_, new) in pairs.items()})
    if pairs:
        # Its own bank where it has one, and not that of layers which it leaves alone.
        given_banks = [part.adapter.shared for part in (*parts.values(), *idle.values()) if isinstance(part.adapter, Adapter)]
        bank = next((found for found in given_banks if found is not None), None)
        shared = {} if bank is None or seats.shared is None else _padded(seats.shared, bank, next(iter(pairs.values()))[1])
        to_be = _filled(seats.shared, shared)
        values = {path: fitted(new, seats.at[path], to_be) for path, (_, new) in pairs.items()}
    seats.take(values, shared)
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)


def hotswap_adapter(model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any) -> None:
    """Put the values of a saved adapter into one that is there, of the same method.

    Raises:
        ValueError, RuntimeError: as for `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    here = {(p.path, p.name): p for p in places(_bare(model)) if adapter_name in p.adapters}
    if here:
        check_hotswap_configs_compatible(_config_of(here, adapter_name), config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


def _as_it_is(p: Adapter, seat: Adapter, shared: nn.Module | None) -> dict[str, Tensor]:
    """Values for a larger adapter under which it does what this one does; its strength stays beside them."""
    strength, p.strength = p.strength, 1.0
    try:
        return fitted(p, seat, shared)
    finally:
        p.strength = strength


# ---- the new adapter, beside the model -----------------------------------------------------------------------------------
def _config_of(here: Mapping[Key, Place | Retrained], name: str) -> PeftConfig:
    return next(iter(here.values())).session.configs[name]


class _Swap(Plan):
    """Builds an adapter for the places of another one, whatever its configuration says of targets."""

    def __init__(self, model: nn.Module, config: PeftConfig, at: list[Place], name: str) -> None:
        super().__init__(model, config, on_meta=True, autocast_adapter_dtype=True)
        self.at = [Target(p.path, p.site, p.in_file) for p in at if _meant(p.adapters[name])]

    def _targets(self, config: Method, only: Collection[str] | None) -> list[Target]:
        return self.at


def _meant(p: Adapter) -> bool:
    """Whether an adapter is there as its configuration's target, and not for its bias or its tokens."""
    return not isinstance(p.method, Biases) and not getattr(p.method, "as_part", False)


def _is_named(place: Place, name: str, given: Mapping[str, Tensor]) -> bool:
    """Whether a file holds tensors for a layer; layers that keep none of their own are all meant."""
    own = [slot.key for slot in slots(place.path, place.in_file, place.name, place.adapters[name], name)]
    own = [key for key in own if not key.startswith("base_model.")]
    return not own or any(key.startswith(f"{place.in_file}.") for key in given)


def _built(model: nn.Module, config: Any, here: Mapping[Key, Place | Retrained], given: Mapping[str, Tensor], name: str) -> dict[Key, Part]:
    """The new adapter's parts by place, with its values in them, at the layers of the old one that it has tensors for."""
    found = [place for place in here.values() if isinstance(place, Place) and not isinstance(place.adapters[name].method, Tied)]
    parts = _Swap(model, config, [place for place in found if _is_named(place, name, given)], name).parts(())
    try:
        fill(slots_of_parts(parts, name), model, given, name)
    except AdapterMismatch as error:
        unexpected = error.report.unexpected_keys
        if unexpected:
            shown = ", ".join(unexpected[:5]) + (f" and {len(unexpected) - 5} more" if len(unexpected) > 5 else "")
            raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {shown}.") from None
        raise
    for part in parts:
        materialise(part)
    return {(part.path, part.key): part for part in parts}


def _fresh(model: nn.Module, config: Any, keys: set[Key]) -> dict[Key, Part]:
    """The adapter that is there as it started, which is the base.

    Raises:
        ValueError: it cannot start as the base.
    """
    if config.never_identity:
        raise ValueError(f"The new adapter leaves {min(keys)[0]!r} alone, and the old one cannot: {config.never_identity}.")
    found = {(part.path, part.key): part for part in Plan(model, config, on_meta=True, autocast_adapter_dtype=True).parts()}
    for key in keys:
        materialise(found[key])
    return found


# ---- what stands beside the adapted weights -------------------------------------------------------------------------------
def _of_biases(old: Adapter, new: Adapter) -> Iterator[tuple[Tensor, Tensor]]:
    if (old.trained_bias is None) != (new.trained_bias is None):
        raise ValueError(f"Configs are incompatible at {old.path!r}: only one of the two retrains the bias (`bias`).")
    if old.trained_bias is not None and new.trained_bias is not None:
        yield old.trained_bias, new.trained_bias


def _of_modules(old: nn.Module, new: nn.Module, path: str) -> list[tuple[Tensor, Tensor]]:
    """Of two retrained modules."""
    mine, its = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in its.items()}:
        raise ValueError(f"Configs are incompatible: the retrained {path!r} has other shapes.")
    return [(tensor.detach(), its[key].detach()) for key, tensor in mine.items()]


# ---- what layers share ----------------------------------------------------------------------------------------------------
def _padded(bank: nn.Module, small: nn.Module, like: Adapter) -> dict[str, Tensor]:
    """
    Raises:
        ValueError: what is to come is larger, or of other parts.
    """
    try:
        return like.method.padded_shared(bank, small)
    except ValueError as error:
        raise ValueError(f"Configs are incompatible at {like.path!r}: {error}, which the layers share.") from error


def _filled(bank: nn.Module | None, values: Mapping[str, Tensor]) -> nn.Module | None:
    """A copy of a bank with other values."""
    if bank is None or not values:
        return bank
    copied = copy.deepcopy(bank)
    for name, tensor in copied.state_dict(keep_vars=True).items():
        tensor.data = values[name].to(tensor)
    return copied


# ---- finding --------------------------------------------------------------------------------------------------------------
def _bare(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _prompted(model: nn.Module, name: str) -> PeftModel | None:
    """The model, where this adapter acts on inputs."""
    wrapped = getattr(model, "_orig_mod", model)
    if not isinstance(wrapped, PeftModel) or name not in wrapped.peft_config or isinstance(wrapped.peft_config[name], Method):
        return None
    return wrapped


def _by_name(bare: nn.Module) -> dict[str, dict[str, Adapter]]:
    """The adapters on weights, by name and path."""
    found: dict[str, dict[str, Adapter]] = {}
    for place in places(bare):
        for name, p in place.adapters.items():
            if isinstance(p, Adapter) and not isinstance(p.method, Tied):
                found.setdefault(name, {})[p.path] = p
    return found


def _plain(key: str, adapter_name: str) -> str:
    """The key as in a file, without HF's prefix and the adapter's name."""
    key = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
    head, _, leaf = key.rpartition(".")
    if leaf == adapter_name:
        return head
    return f"{head.removesuffix(f'.{adapter_name}')}.{leaf}" if leaf in ("weight", "bias") and head.endswith(f".{adapter_name}") else key
