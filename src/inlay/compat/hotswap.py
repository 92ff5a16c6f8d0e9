"""Swapping the values of an adapter for another's in place: no tensor, scale or shape changes, so nothing is compiled again.

The new adapter is built beside the model, as for loading it, and everything is checked before the first value is copied. Where
its ranks are smaller it is padded with zeros. Where its scale is another, that goes into one of its tensors, relative to the
scale of the adapter whose place it takes; configuration, tensors and what is saved from them stay consistent. Whether padding
and scale are right is not known from the method's name but tested: both do the same to the weight, or the swap is refused.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from .. import PeftModel, load_peft_weights
from ..core.adapter import Adapter
from ..core.config import PeftConfig
from ..core.inlaid import places
from ..core.method import LowRank, Method, folded, full
from ..core.place import Place
from ..core.plan import Biases, Part, Plan, materialise
from ..core.retrained import Retrained
from ..core.targets import Target
from ..core.tied import Tied
from ..formats.state import PREFIX, AdapterMismatch, fill, slots, slots_of_parts
from ..methods.lora import LoraConfig
from .functions import infer_device

# Options that change what is computed from the tensors in a way that the weight does not show.
MUST_AGREE = ("use_dora", "lora_dropout")
# The tensors of LoRA that stand behind the scale.
SCALED = ("lora_B", "lora_embedding_B", "lora_B_bias")


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """
    Raises:
        ValueError: adapters of these configurations cannot take each other's place; the message says why.
    """
    if config0.peft_type != config1.peft_type:
        raise ValueError(f"Incompatible PEFT types found: {config0.peft_type} and {config1.peft_type}")
    if not isinstance(config0, Method):
        raise ValueError(f"Hotswapping is for adapters of weights, and {config0.peft_type} acts on inputs; load it beside this one.")
    for name in (f.name for f in fields(config0)):
        old, new = getattr(config0, name), getattr(config1, name)
        if (name in MUST_AGREE or name.endswith("dropout")) and old != new:
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
    found = [one for one in _seated(model) if isinstance(getattr(one.adapter.method, "r", None), int)]
    if not found:
        raise ValueError("No adapter layers found on the model: load the first adapter, then prepare the model, then load the second.")
    if target_rank is None:
        return
    too_large = next((one.place.path for one in found if one.rank > target_rank), None)
    if too_large is not None:
        raise ValueError(f"The adapter on {too_large!r} has a larger rank than {target_rank}; give the largest one.")
    grown = [(one, *_grown(one.adapter, target_rank)) for one in found]
    configs = found[0].place.session.configs
    for one, method, values in grown:
        _take(one.adapter, method, values)
    for name in {one.name for one in found}:
        _say_ranks(configs[name], [one.adapter for one in found if one.name == name])


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
    larger: list[tuple[Adapter, Method, dict[str, Tensor]]] = []
    for key, place in here.items():
        old, new = place.adapters[adapter_name], (parts.get(key) or idle[key]).adapter
        if not isinstance(old, Adapter) or not isinstance(new, Adapter):
            copies += _of_modules(old, new, place.path)
        elif not isinstance(old.method, Tied):
            rank: Any = getattr(new.method, "r", None)
            grows = isinstance(rank, int) and rank > getattr(old.method, "r", rank)
            method = _of_rank(old.method, rank) if grows else old.method
            bank, mine = None, old.shared
            if isinstance(mine, nn.Module) and isinstance(new.shared, nn.Module):
                bank = _padded(mine, new.shared, place.path)
                copies += [(tensor, bank[name]) for name, tensor in _named_tensors(mine).items() if old.bank_at is None]
                mine = _filled(mine, bank)
            values = _fitted(new, old, method, mine)
            if grows:
                larger.append((old, method, values))
            else:
                copies += [(_tensor(old, name), value) for name, value in values.items()]
            copies += _of_biases(old, new)
    for adapter, method, values in larger:
        _take(adapter, method, values)
    if larger:
        _say_ranks(own, [p for place in here.values() if isinstance(p := place.adapters[adapter_name], Adapter)])
    with torch.no_grad():
        for target, value in copies:
            target.copy_(value)


def hotswap_adapter(model: nn.Module, model_name_or_path: str, adapter_name: str, torch_device: str | None = None, **kwargs: Any) -> None:
    """Put the values of a saved adapter into one that is there, of the same method.

    Raises:
        ValueError, RuntimeError: as for `check_hotswap_configs_compatible` and `hotswap_adapter_from_state_dict`.
    """
    config = PeftConfig.from_pretrained(model_name_or_path, **kwargs)
    bare = _bare(model)
    here = {(p.path, p.name): p for p in places(bare) if adapter_name in p.adapters}
    if not here:
        raise ValueError(f"There is no adapter {adapter_name!r} in the model; load it before swapping others into it.")
    check_hotswap_configs_compatible(_config_of(here, adapter_name), config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device or infer_device(), **kwargs)
    hotswap_adapter_from_state_dict(model, tensors, adapter_name, config)


# ---- the new adapter, beside the model -----------------------------------------------------------------------------------
Key = tuple[str, str]


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


def _built(
    model: nn.Module, config: Any, here: Mapping[Key, Place | Retrained], given: Mapping[str, Tensor], name: str
) -> dict[Key, Part]:
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


# ---- fitting one into the other ------------------------------------------------------------------------------------------
def _fitted(new: Adapter, old: Adapter, method: Method, bank: nn.Module | None) -> dict[str, Tensor]:
    """Values under which ``method`` does at this place what ``new`` does.

    Args:
        bank: what the layers will share.

    Raises:
        ValueError: there are none that padding and scaling would find.
    """
    site, declared = old.site, method.params(old.site)
    if not set(declared) == set(new.declared) == set(old.declared):
        kinds = f"{', '.join(sorted(new.declared))}, and the old one {', '.join(sorted(old.declared))}"
        raise ValueError(f"Configs are incompatible at {old.path!r}: the new adapter consists of {kinds}.")
    values = {}
    for name, param in declared.items():
        tensor, shape = _tensor(new, name).detach(), param.shape(site)
        if tensor.ndim != len(shape) or any(a > b for a, b in zip(tensor.shape, shape, strict=True)):
            found = tuple(tensor.shape)
            raise ValueError(
                f"{name} of the new adapter is {found} at {old.path!r} and has to go into {shape}: give the model the larger rank first, "
                "with `prepare_model_for_compiled_hotswap(model, target_rank=...)` or by loading the largest adapter first."
            )
        value = tensor.new_zeros(shape)
        value[tuple(slice(n) for n in tensor.shape)] = tensor
        values[name] = value
    padded = any(values[name].shape != _tensor(new, name).shape for name in declared)
    if not padded and new.strength == 1 and _same_options(method, new.method):
        return values
    if method.unmergeable:
        raise ValueError(f"Only adapters with the same options can take each other's place here: {method.unmergeable}")
    probe = _Probe(old, method, bank)
    wanted = probe.effect_of(new)
    if isinstance(method, LoraConfig) and isinstance(new.method, LoraConfig):
        if method.scaling == 0:
            raise ValueError(f"The adapter at {old.path!r} has lora_alpha=0, so nothing that takes its place can have an effect.")
        by = new.method.scaling * new.strength / method.scaling
        choices = [[name for name in SCALED if name in declared]]
    else:
        plain = probe.effect(values)
        by = float((wanted * plain).sum() / plain.square().sum().clamp_min(1e-30))
        choices = [[], *([name] for name in reversed(declared) if declared[name].trainable)]
    tolerance = 1e-4 * float(wanted.abs().max()) + 1e-8
    for names in choices:
        scaled = values | {name: values[name] * by for name in names}
        if torch.allclose(probe.effect(scaled), wanted, rtol=1e-3, atol=tolerance):
            return scaled
    differing = _differing(method, new.method)
    raise ValueError(
        f"Configs are incompatible at {old.path!r}: the new adapter differs in {', '.join(differing) or 'its shapes'}, which neither "
        "padding nor a factor makes up for. Load it beside the old one, or delete that first."
    )


class _Probe:
    """What an adapter does to the weight at one place: to a few inputs where it is low-rank, else to all of it."""

    def __init__(self, old: Adapter, method: Method, bank: nn.Module | None) -> None:
        meta = torch.device("meta")
        self.twin = Adapter(method, old.site, old.path, dtype=torch.float32, device=meta, shared=bank, bank_at=("", ""))
        self.site = old.site

    @torch.no_grad()
    def effect_of(self, p: Adapter) -> Tensor:
        return self._effect(p, p.strength)

    @torch.no_grad()
    def effect(self, values: Mapping[str, Tensor]) -> Tensor:
        for name, value in values.items():
            table = self.twin._parameters if name in self.twin._parameters else self.twin._buffers
            table[name] = nn.Parameter(value, requires_grad=False) if table is self.twin._parameters else value  # type: ignore[assignment]
        return self._effect(self.twin, 1.0)

    def _effect(self, p: Adapter, strength: float) -> Tensor:
        method, site = p.method, self.site
        if isinstance(method, LowRank) and type(method).fold is LowRank.fold and type(method).delta is LowRank.delta:
            a, b = map(full, method.factors(p))
            x = torch.randn(a.shape[-1], 4, generator=torch.Generator().manual_seed(0)).to(a)
            extra = method.delta_bias(p)
            found = [strength * method.scaling * (b @ (a @ x)).flatten()]
            return torch.cat([*found, *([] if extra is None else [strength * full(extra).flatten()])])
        w, b = site.read()
        w, b = full(w), None if b is None else full(b)
        before, p.strength = p.strength, strength
        try:
            new_w, new_b = folded(p, w, b)
        finally:
            p.strength = before
        found = [(new_w - w).flatten()]
        if new_b is not None:
            found.append((new_b - (torch.zeros_like(new_b) if b is None else b)).flatten())
        return torch.cat(found)


# Fields that say where an adapter acts, how it starts or where it came from: not what its tensors mean.
ELSEWHERE = {f.name for f in fields(Method)} | {f.name for f in fields(PeftConfig)} | {"rank_pattern", "alpha_pattern"}


def _differing(one: Method, other: Method) -> list[str]:
    names = (f.name for f in fields(one) if f.name not in ELSEWHERE and not f.name.startswith("init_"))
    return [name for name in names if getattr(one, name) != getattr(other, name)]


def _same_options(one: Method, other: Method) -> bool:
    return type(one) is type(other) and not _differing(one, other)


def _tensor(p: nn.Module, name: str) -> Tensor:
    found = p._parameters.get(name)
    return p._buffers[name] if found is None else found  # type: ignore[return-value]


def _of_biases(old: Adapter, new: Adapter) -> Iterator[tuple[Tensor, Tensor]]:
    if (old.trained_bias is None) != (new.trained_bias is None):
        raise ValueError(f"Configs are incompatible at {old.path!r}: only one of the two retrains the bias (`bias`).")
    if old.trained_bias is not None and new.trained_bias is not None:
        yield old.trained_bias, new.trained_bias


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _padded(old: nn.Module, new: nn.Module, path: str) -> dict[str, Tensor]:
    """What the layers share, in the shapes of the old one."""
    there, found = _named_tensors(new), {}
    for name, target in _named_tensors(old).items():
        value = there.get(name)
        if value is None or value.ndim != target.ndim or any(a > b for a, b in zip(value.shape, target.shape, strict=True)):
            raise ValueError(f"Configs are incompatible at {path!r}: {name}, which the layers share, is larger in the new adapter.")
        found[name] = target.detach().new_zeros(target.shape)
        found[name][tuple(slice(n) for n in value.shape)] = value.detach().to(target)
    return found


def _filled(bank: nn.Module, values: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a bank with other values."""
    copied = copy.deepcopy(bank)
    for name, tensor in _named_tensors(copied).items():
        tensor.data = values[name]
    return copied


def _of_modules(old: nn.Module, new: nn.Module, path: str) -> list[tuple[Tensor, Tensor]]:
    """Of two retrained modules."""
    mine, its = old.state_dict(keep_vars=True), new.state_dict(keep_vars=True)
    if {k: t.shape for k, t in mine.items()} != {k: t.shape for k, t in its.items()}:
        raise ValueError(f"Configs are incompatible: the retrained {path!r} has other shapes.")
    return [(tensor.detach(), its[key].detach()) for key, tensor in mine.items()]


# ---- ranks ----------------------------------------------------------------------------------------------------------------
def _grown(adapter: Adapter, rank: int) -> tuple[Method, dict[str, Tensor]]:
    """A method of a larger rank, and the values under which it does what the adapter does now.

    Raises:
        ValueError: a larger rank is another map, whatever the values.
    """
    method = adapter.method
    if method.r == rank:  # type: ignore[attr-defined]
        return method, {}
    if adapter.shared is not None and _named_tensors(adapter.shared):
        raise ValueError(f"The rank of {method.peft_type} is in what its layers share, which cannot be padded; load the largest one first.")
    larger = _of_rank(method, rank)
    strength, adapter.strength = adapter.strength, 1.0
    try:
        return larger, _fitted(adapter, adapter, larger, adapter.shared)
    finally:
        adapter.strength = strength


def _of_rank(method: Method, rank: int) -> Method:
    """The method with another rank, and for LoRA with the same scale."""
    if not isinstance(method, LoraConfig):
        return _like(method, replace(method, r=rank))  # type: ignore[call-arg]
    one = replace(method, r=rank, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}, init_lora_weights=True)
    return cast(Method, replace(one, lora_alpha=method.scaling / one.scaling).variant())


def _like(method: Method, other: Method) -> Method:
    return other if type(other) is type(method) else other.become(type(method))


def _take(adapter: Adapter, method: Method, values: Mapping[str, Tensor]) -> None:
    """Give an adapter tensors of other shapes."""
    adapter.method = method
    for known in ("_declared", "_adds_low_rank_alone"):
        adapter.__dict__.pop(known, None)
    for name, value in values.items():
        old = _tensor(adapter, name)
        if old.shape == value.shape:
            with torch.no_grad():
                old.copy_(value)
        elif name in adapter._parameters:
            adapter._parameters[name] = nn.Parameter(value.to(old.dtype), requires_grad=old.requires_grad)
        else:
            adapter._buffers[name] = value.to(old.dtype)


def _say_ranks(config: Any, adapters: list[Adapter]) -> None:
    """Say in a configuration what growing has done to its layers."""
    ranks = {p.path: p.method.r for p in adapters if hasattr(p.method, "r")}  # type: ignore[attr-defined]
    config.r = Counter(ranks.values()).most_common(1)[0][0]
    others = {f"^{re.escape(path)}": rank for path, rank in ranks.items() if rank != config.r}
    if hasattr(config, "rank_pattern"):
        config.rank_pattern = others
    else:
        config.overrides = {**(config.overrides or {}), **{path: {"r": rank} for path, rank in others.items()}} or None
    if not isinstance(config, LoraConfig):
        return
    alphas = {}
    for p in adapters:
        if isinstance(p.method, LoraConfig):
            unit = replace(config, r=p.method.r, lora_alpha=1.0, rank_pattern={}, alpha_pattern={}).scaling
            alphas[p.path] = p.method.scaling / unit
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {f"^{re.escape(path)}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}


# ---- finding --------------------------------------------------------------------------------------------------------------
class _Seated(NamedTuple):
    """An adapter on one layer."""

    name: str
    place: Place
    adapter: Adapter

    @property
    def rank(self) -> int:
        return self.adapter.method.r  # type: ignore[attr-defined]


def _bare(model: nn.Module) -> Any:
    model = getattr(model, "_orig_mod", model)
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _seated(model: nn.Module) -> list[_Seated]:
    found = [p for p in places(_bare(model)) if isinstance(p, Place)]
    return [_Seated(n, p, a) for p in found for n, a in p.adapters.items() if not isinstance(a.method, Tied)]


def _plain(key: str, adapter_name: str) -> str:
    """The key as in a file, without HF's prefix and the adapter's name."""
    key = key.removeprefix("_orig_mod.").removeprefix(PREFIX)
    head, _, leaf = key.rpartition(".")
    if leaf == adapter_name:
        return head
    return f"{head.removesuffix(f'.{adapter_name}')}.{leaf}" if leaf in ("weight", "bias") and head.endswith(f".{adapter_name}") else key
