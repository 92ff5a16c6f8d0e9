"""What becomes of the weights of one unit: its adapters get their values, and fold as in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.additive import Additive, LowRank
from ...core.method import biased, full
from ...core.method import folded as fold_at_strength
from ...core.part import Parts, axes_apart
from ...core.place import Place
from ...core.retrained import Retrained
from ...core.site import Embedding, Linear, Site, Stack, TransposedLinear
from ...formats.packed import Packed
from ...formats.streaming import Entry
from ..combine import combined
from ..effects import effects
from .plan import Combining, Plan, Unit


@contextmanager
def filled(plan: Plan, unit: Unit) -> Iterator[None]:
    """Within, the adapters of a unit have their values, and its hosts their biases."""
    before: list[tuple[dict[str, Any], dict[str, Any]]] = []

    def keep(table: dict[str, Any]) -> None:
        before.append((table, dict(table)))

    try:
        for place in unit.places:
            if isinstance(place, Place):
                own, bias = place.site.module._parameters, place.site.bias_name
                stored = own.get(bias) if bias is not None else None
                if stored is not None and stored.device.type == "meta":
                    keep(own)
                    own[bias] = nn.Parameter(plan.base.fetch(plan.base.names[id(stored)]), requires_grad=False)  # type: ignore[index]
            elif plan.combining is not None:
                for module in place.module.modules():
                    keep(module._parameters)
                    for key, q in module._parameters.items():
                        if q is not None and id(q) in plan.base.names:
                            module._parameters[key] = nn.Parameter(plan.base.fetch(plan.base.names[id(q)]), requires_grad=False)
        for place in unit.places:
            for p in place.adapters.values():
                for module in p.modules():
                    keep(module._parameters)
                    keep(module._buffers)
                for slot, adapter, key in plan.slots.get(id(p), ()):
                    slot.put(adapter.read(key))
        for place in unit.places:
            for p in place.adapters.values():
                if isinstance(p, Adapter):
                    p.materialise()
        yield
    finally:
        for table, old in reversed(before):
            table.clear()
            table.update(old)


def folded(plan: Plan, unit: Unit) -> dict[str, Tensor]:
    """What becomes of a unit's tensors, by their names in the model."""
    if plan.combining is not None:
        return one_change(plan, unit, plan.combining)
    found: dict[str, Tensor] = {}
    for place in unit.places:
        base = f"{place.path}." if place.path else ""
        if isinstance(place, Retrained):
            for key, tensor in place.adapters[place.here(plan.order)[-1]].state_dict().items():
                found[base + key] = tensor.to(plan.shape(base + key)[1])
            continue
        site = place.site
        if base + site.name in plan.following:
            continue
        found |= _named(plan, place, *place.fold(plan.order))
    return found


def one_change(plan: Plan, unit: Unit, by: Combining) -> dict[str, Tensor]:
    """The same where all adapters become one change first."""
    effect = combined(effects(plan.base.model, plan.order, unit.places), by.weights, by.chosen, by.options, None, None, by.seed)
    for path, tokens in effect.tokens.items():
        effect.weights[path, tokens.site.name] = tokens.update(path)
    found: dict[str, Tensor] = {}
    for place in unit.places:
        if isinstance(place, Retrained):
            for key, change in effect.modules.get(place.path, {}).items():
                module = place.module.get_submodule(key.rpartition(".")[0])
                own: Any = (module._parameters | module._buffers)[key.rpartition(".")[2]]
                found[f"{place.path}.{key}"] = (full(own) + change).to(own.dtype)
            continue
        key = (place.path, place.name)
        update = effect.weights.get(key)
        bias = update.bias if update is not None else effect.biases.get(key)
        w, b = place.site.read()
        w = full(w) if update is None else full(w) + full(update.matrix())
        found |= _named(plan, place, w, b if bias is None else bias if b is None else full(b) + full(bias))
    return {name: tensor for name, tensor in found.items() if name not in plan.following}


def apart(plan: Plan, unit: Unit) -> Place | None:
    """The place of a unit that changes one weight whose rows can be folded apart, so that it can be done in pieces."""
    if plan.combining is not None:
        return None
    acting = [p for p in unit.places if not isinstance(p, Place) or f"{p.path}.{p.site.name}" not in plan.following]
    if len(acting) != 1 or unit.new or not isinstance(place := acting[0], Place):
        return None
    site, base = place.site, plan.base
    if type(site) not in (Linear, TransposedLinear, Embedding, Stack):
        return None
    name = base.names.get(id(site.module._parameters.get(site.name)))
    if name is None or name in base.values or name not in base.group_of or any(g.converter is not None for g in unit.groups):
        return None
    stored = plan.checkpoint.tensors[base.group_of[name].keys[0]]
    if plan.keeps(stored) and not in_rows(site, stored):
        return None
    if sum(n in base.group_of for n in base.aliases.get(name, ())) > 1:
        return None
    return place if all(_only_adds(p) or axes_apart(p)[:1] in (("out",), ("batch",)) for p in place.adapters.values()) else None


def in_rows(site: Site, stored: Entry) -> bool:
    """Whether the rows of the matrix lie one behind another in the file (of a stack: its matrices)."""
    if isinstance(stored, Packed):
        return len(stored.shape) == 2 and stored.transposed == isinstance(site, TransposedLinear)
    return not isinstance(site, TransposedLinear)


def _named(plan: Plan, place: Place, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """The weight and the bias of a place as the model keeps them, under their names.

    Raises:
        ValueError: there is a bias, and the base has no place for it.
    """
    site, prefix = place.site, f"{place.path}." if place.path else ""
    name = prefix + site.name
    group = plan.base.group_of.get(name)
    rounded_later = group is not None and group.converter is None and plan.keeps(plan.checkpoint.tensors[group.keys[0]])
    found = {name: site.raw(w) if rounded_later else site.raw(w).to(site.dtype)}
    return found if b is None else found | bias_of(place, b)


def bias_of(place: Place, b: Tensor) -> dict[str, Tensor]:
    """The bias of a place as the model keeps it, under its name.

    Raises:
        ValueError: the base has no place for it.
    """
    own = place.site.bias()
    if own is not None:
        return {(f"{place.path}." if place.path else "") + str(place.site.bias_name): b.to(own.dtype)}
    if b.any():
        raise ValueError(
            f"An adapter gives {place.path!r} a bias, and the layers of this architecture have none: a merged file could not hold it. "
            "Keep base and adapter apart, or train without biases."
        )
    return {}


# ---- rows apart --------------------------------------------------------------------------------------------------------------
def _only_adds(p: Adapter) -> bool:
    """Whether an adapter's fold is ``w + s B A`` and leaves the bias alone."""
    method = p.method
    own: Any = type(method)
    if not isinstance(method, LowRank) or own.fold is not Additive.fold or own.delta is not LowRank.delta:
        return False
    return own.plus_delta is LowRank.plus_delta and p.trained_bias is None and method.delta_bias(p) is None


class Added:
    """What an adapter adds to rows; its factors are made once."""

    def __init__(self, p: Adapter) -> None:
        method: Any = p.method
        self.a, self.b = map(full, method.factors(p))
        self.scaling, self.strength = method.scaling, p.strength

    def fold(self, w: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        if w.ndim > 2:
            w.add_((self.b[rows] @ self.a[rows]).mul_(self.scaling), alpha=self.strength)
        else:
            w.addmm_(self.b[rows], self.a, alpha=self.scaling * self.strength)
        return w, b


class Rowwise:
    """What an adapter makes of rows."""

    def __init__(self, p: Adapter) -> None:
        self.parts = Parts(p, axes_apart(p)[0])

    def fold(self, w: Tensor, b: Tensor | None, rows: slice) -> tuple[Tensor, Tensor | None]:
        p = self.parts[rows]
        return fold_at_strength(p, w, biased(p, b))


def in_pieces(plan: Plan, place: Place) -> list[Added | Rowwise]:
    """What the adapters of a place make of some rows, one after another. They may write to what they are given."""
    return [Added(p) if _only_adds(p) else Rowwise(p) for p in (place.adapters[n] for n in place.here(plan.order))]
