"""An adapter's values in the tensors of another one of the same method: padded to its rank, and scaled to its scale.

How a method is padded it says itself (`Method.padded`). Whether that and the scale are right is not known but tested: both
adapters do the same to the weight, or the values are refused.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.additive import LowRank
from ..core.config import PeftConfig
from ..core.method import Method, folded, full
from ..core.plan import adapter_dtype
from ..methods.lora import LoraConfig

# Fields that say where an adapter acts, how it starts or where it came from: not what its tensors mean.
ELSEWHERE = {f.name for f in fields(Method)} | {f.name for f in fields(PeftConfig)} | {"rank_pattern", "alpha_pattern"}


@torch.no_grad()
def fitted(new: Adapter, seat: Adapter, shared: nn.Module | None) -> dict[str, Tensor]:
    """Values for an adapter under which it does what another does.

    Args:
        seat: whose tensors the values are for; those that are in no file are what they will be.
        shared: what its layers will share.

    Raises:
        ValueError: there are none that padding and a factor would find.
    """
    method = seat.method
    try:
        values = method.padded(seat, new)
    except ValueError as error:
        larger = "" if size_of(new) <= size_of(seat) else (
            " Give the model the larger rank first, with `prepare_model_for_compiled_hotswap(model, target_rank=...)` or by loading "
            "the largest adapter first."
        )  # fmt: skip
        raise ValueError(f"Configs are incompatible at {seat.path!r} ({method.peft_type}): {error}.{larger}") from error
    same_shape = set(new.declared) == set(seat.declared) and all(t.shape == getattr(new, name).shape for name, t in values.items())
    differing = differing_fields(method, new.method)
    if same_shape and new.strength == 1 and not differing and type(method) is type(new.method):
        return values
    if method.unmergeable and not isinstance(method, LowRank):
        if new.strength == 1 and set(differing) <= {method.size_option}:
            return values
        raise ValueError(f"Only adapters with the same options can take each other's place at {seat.path!r}: {method.unmergeable}")
    probe = _Probe(seat, shared)
    wanted = probe.effect_of(new)
    tolerance = 1e-4 * float(wanted.abs().max()) + 1e-8
    for found in _scaled(values, seat, new, wanted, probe):
        if torch.allclose(probe.effect(found), wanted, rtol=1e-3, atol=tolerance):
            return found
    if getattr(method, "scaling", 1) == 0:
        raise ValueError(f"The adapter at {seat.path!r} has a scale of 0, so nothing that takes its place can have an effect.")
    drawn = [name for name, param in seat.declared.items() if not param.persistent]
    drawn += [] if shared is None else [name for name, _ in shared.named_buffers() if name not in shared.state_dict()]
    hint = f" ({', '.join(drawn)}: drawn or derived for these options, and in no file)" if drawn else ""
    raise ValueError(
        f"Configs are incompatible at {seat.path!r}: the new adapter differs in {', '.join(differing) or 'its shapes'}, which neither "
        f"padding nor a factor makes up for{hint}. Load it beside the old one, or delete that first."
    )


def _scaled(values: dict[str, Tensor], seat: Adapter, new: Adapter, wanted: Tensor, probe: _Probe) -> Iterator[dict[str, Tensor]]:
    """The values as they are; then with one tensor times a factor: that of the scales, or what the effects differ by."""
    yield values
    factors = []
    scales = [getattr(p.method, "scaling", None) for p in (seat, new)]
    if isinstance(scales[0], (int, float)) and isinstance(scales[1], (int, float)) and scales[0]:
        factors.append(scales[1] * new.strength / scales[0])
    plain = probe.effect(values)
    factors.append(float((wanted * plain).sum() / plain.square().sum().clamp_min(1e-30)))
    for factor in factors:
        for name, param in reversed(seat.declared.items()):
            if param.trainable:
                yield values | {name: values[name] * factor}


class _Probe:
    """What an adapter does to the weight at one place: to a few inputs where it is low-rank, else to all of it."""

    def __init__(self, seat: Adapter, shared: nn.Module | None) -> None:
        meta = torch.device("meta")
        self.twin = Adapter(seat.method, seat.site, seat.path, dtype=torch.float32, device=meta, shared=shared, bank_at=("", ""))
        self.seat = seat

    def effect_of(self, p: Adapter) -> Tensor:
        training = p.training
        try:
            return self._effect(p.eval(), p.strength)
        finally:
            p.train(training)

    def effect(self, values: Mapping[str, Tensor]) -> Tensor:
        for name in self.twin.declared:
            trained = name in self.twin._parameters
            table: Any = self.twin._parameters if trained else self.twin._buffers
            value = values[name] if name in values else getattr(self.seat, name)
            table[name] = nn.Parameter(value, requires_grad=False) if trained else value
        return self._effect(self.twin.eval(), 1.0)

    def _effect(self, p: Adapter, strength: float) -> Tensor:
        method, site = p.method, self.seat.site
        folds = type(method).fold is not LowRank.fold and not method.unmergeable
        if isinstance(method, LowRank) and not folds and type(method).delta is LowRank.delta:
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


def differing_fields(one: Method, other: Method) -> list[str]:
    """Options that change what is computed from the tensors, and that two configurations do not agree on."""
    names = (f.name for f in fields(one) if f.name not in ELSEWHERE and not f.name.startswith("init_weights"))
    return [name for name in names if getattr(one, name) != getattr(other, name, None)]


# ---- larger ranks ---------------------------------------------------------------------------------------------------------
def size_of(p: Adapter) -> int:
    """The rank, or what stands for it; 0 where the method has none."""
    size = getattr(p.method, p.method.size_option, None)
    return size if isinstance(size, int) and not isinstance(size, bool) else 0


class Seats:
    """Adapters of one name at all layers, some of them to become larger. Nothing changes before `take`.

    Attributes:
        at: by the adapter's path, whose tensors new values are for: the adapter's own, or a larger one's.
        shared: what the layers will share.
    """

    def __init__(self, adapters: Mapping[str, Adapter], config: Any, sizes: Mapping[str, int]) -> None:
        self.adapters, self.config = adapters, config
        self.shared = next((p.shared for p in adapters.values() if p.shared is not None), None)
        grows = {path for path, p in adapters.items() if sizes[path] > size_of(p)}
        if grows and self.shared is not None:
            most = max(sizes.values())
            if self.shared.state_dict():
                # What they share has one rank for all.
                grows, sizes = set(adapters), dict.fromkeys(adapters, most)
            self.shared = _shared(with_size(config, most), adapters)
        self.grown = grows
        self.at = {path: self._seat(p, sizes[path]) if path in grows else p for path, p in adapters.items()}

    def _seat(self, p: Adapter, size: int) -> Adapter:
        method, site = with_size(p.method, size), p.site
        reason = method.refuses(site)
        if reason:
            raise ValueError(f"The adapter on {p.path!r} cannot become larger: {reason}.")
        dtype = next((q.dtype for q in p.parameters()), torch.float32)
        seat = Adapter(method, site, p.path, dtype=dtype, device=site.device, shared=self.shared, bank_at=("", ""))
        method.derive(seat)
        return seat

    @torch.no_grad()
    def take(self, values: Mapping[str, Mapping[str, Tensor]], shared: Mapping[str, Tensor]) -> None:
        """Give the adapters these values, by path, and the configuration the new ranks.

        Args:
            shared: by name.
        """
        bank = next((p.shared for p in self.adapters.values() if p.shared is not None), None)
        for name, value in shared.items():
            assert bank is not None
            holder, _, leaf = name.rpartition(".")
            _put(bank.get_submodule(holder), leaf, value)
        for path, found in values.items():
            p, seat = self.adapters[path], self.at[path]
            if path in self.grown:
                _become(p, seat)
                found = dict(seat.named_buffers(recurse=False)) | dict(found)
            for name, value in found.items():
                _put(p, name, value)
        if self.grown:
            say_sizes(self.config, list(self.adapters.values()))


def _become(p: Adapter, seat: Adapter) -> None:
    """The method of another adapter, and tensors for what only that one has."""
    trained = any(q.requires_grad for q in p.parameters())
    for name in p.declared.keys() - seat.declared.keys():
        delattr(p, name)
    p.method = seat.method
    p.changes()
    for known in ("_declared", "_adds_low_rank_alone", "_reads_weight"):
        p.__dict__.pop(known, None)
    for name, param in seat.declared.items():
        if param.trainable and name not in p._parameters:
            p.register_parameter(name, nn.Parameter(getattr(seat, name).detach(), requires_grad=trained))
        elif not param.trainable and name not in p._buffers:
            p.register_buffer(name, getattr(seat, name), persistent=param.persistent)


def _put(holder: nn.Module, name: str, value: Tensor) -> None:
    """In the memory that is there, where it has the shape."""
    table: Any = holder._parameters if name in holder._parameters else holder._buffers
    old = table[name]
    if old.shape == value.shape:
        old.copy_(value)
    elif table is holder._parameters:
        table[name] = nn.Parameter(value.to(old.device, old.dtype), requires_grad=old.requires_grad)
    else:
        table[name] = value.to(old.device, old.dtype)


def _shared(config: Method, adapters: Mapping[str, Adapter]) -> nn.Module | None:
    """What layers share whose configuration is this one."""
    first = next(iter(adapters.values()))
    bank = config.shared({path: p.site for path, p in adapters.items()})
    if bank is None:
        return None
    dtype = next((q.dtype for q in first.parameters()), adapter_dtype(first.site.dtype, True))
    for q in bank.parameters():
        q.data = q.data.to(dtype)
    return bank.to(first.site.device)


def with_size(method: Method, size: int) -> Any:
    """The method with another rank; LoRA with the same scale.

    Raises:
        ValueError: there is none of this rank.
    """
    option = method.size_option
    patterns = [name for name, of in method.patterns.items() if of == option]
    changes: dict[str, Any] = {option: size} | {name: {} for name in patterns}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        checked = replace(method, **changes)
    made: Any = copy.copy(method)
    for name in changes:
        setattr(made, name, getattr(checked, name))
    if isinstance(method, LoraConfig) and made.scaling:
        alpha = method.lora_alpha * method.scaling / made.scaling
        made.lora_alpha = int(alpha) if float(alpha).is_integer() else alpha
    return made


def say_sizes(config: Any, adapters: list[Adapter]) -> None:
    """Say in a configuration how large its adapters are."""
    option = config.size_option
    sizes = {p.path: size for p in adapters if (size := size_of(p))}
    setattr(config, option, Counter(sizes.values()).most_common(1)[0][0])
    others = {f"^{re.escape(path)}": size for path, size in sizes.items() if size != getattr(config, option)}
    pattern = next((name for name, of in config.patterns.items() if of == option), None)
    if pattern is not None:
        setattr(config, pattern, others)
    else:
        config.overrides = {**(config.overrides or {}), **{path: {option: size} for path, size in others.items()}} or None
    if not isinstance(config, LoraConfig):
        return
    alphas = {}
    for p in adapters:
        if isinstance(p.method, LoraConfig):
            like = copy.copy(config)
            setattr(like, option, size_of(p))
            like.lora_alpha = 1
            alphas[p.path] = p.method.scaling / like.scaling
    config.lora_alpha = Counter(alphas.values()).most_common(1)[0][0]
    config.alpha_pattern = {f"^{re.escape(path)}": alpha for path, alpha in alphas.items() if alpha != config.lora_alpha}
