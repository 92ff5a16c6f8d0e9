"""What becomes of the weights of one unit: its adapters get their values, and fold as in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...core.adapter import Adapter
from ...core.method import biased, full
from ...core.place import Place
from ...core.retrained import AnyPlace, Retrained
from ..combine import combined
from ..disk_base import Group
from ..effects import Effect, Slicing, effects, own_tensors
from ..slicing import Sliced
from .pieces import AddingSliced, Pieces, across, along, lying, lying_as, of_adapter, of_update
from .plan import Combining, Plan, Unit


@contextmanager
def filled(plan: Plan, unit: Unit) -> Iterator[None]:
    """Within, the adapters of a unit have their values, and its hosts their biases. Copies of retrained modules have none."""
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
        adapters = [p for place in unit.places for p in place.adapters.values() if isinstance(p, Adapter)]
        for p in adapters:
            for module in p.modules():
                keep(module._parameters)
                keep(module._buffers)
            for slot, adapter, key in plan.slots.get(id(p), ()):
                slot.put(adapter.read(key))
        for p in adapters:
            p.materialise()
        yield
    finally:
        for table, old in reversed(before):
            table.clear()
            table.update(old)


class Folds:
    """What becomes of the tensors of a unit whose adapters are `filled`."""

    def __init__(self, plan: Plan, unit: Unit) -> None:
        self.plan, self.unit = plan, unit
        # What is retrained as a whole is what it is, whatever else adapts it.
        found = sorted(unit.places, key=lambda place: isinstance(place, Retrained))
        self.at = {name: place for place in found for name in plan.touched(place) if name not in plan.following}
        # Tensors that are read in slices, by their identity.
        self.known: dict[int, Sliced] = {}
        self.effect = None if plan.combining is None else one_change(plan, unit, plan.combining, self.stored)
        # What folding a place has given beside what was asked for.
        self.found: dict[str, Tensor] = {}

    def source(self, name: str) -> str:
        """The name under which a tensor's adapters are."""
        return self.plan.base.canonical(name) if name in self.plan.following else name

    def take(self, name: str) -> Tensor:
        """What becomes of a tensor of the model, which is computed whole."""
        base, source = self.plan.base, self.source(name)
        place = self.at.get(source)
        if source not in self.found and place is not None:
            self.found |= self._folded(place, source)
        return self.found.pop(source) if source in self.found else base.fetch(base.canonical(name))

    def stays(self, name: str) -> bool:
        """Whether a tensor of the files is what it was."""
        base = self.plan.base
        return self.source(name) not in self.at and base.canonical(name) not in base.values

    def outputs(self) -> Iterator[tuple[Group | None, list[str]]]:
        """The model's tensors, together where the files keep them so, each with its place in the files; biases come last."""
        found: list[tuple[Group | None, list[str]]] = [(group, list(group.targets)) for group in self.unit.groups]
        found += [(None, [name]) for name in self.unit.new]
        biases = {f"{p.path}.{p.site.bias_name}" for p in self.unit.places if isinstance(p, Place)}
        yield from sorted(found, key=lambda output: output[1][0] in biases)

    def pieces(self, name: str, packs: bool) -> Pieces | None:
        """How a weight can be made in pieces; None where it cannot.

        Args:
            packs: it stays quantised.
        """
        place = self.at.get(self.source(name))
        if not isinstance(place, Place) or name.rpartition(".")[2] != place.site.name:
            return None
        lies = lying(self.plan, place.site, packs)
        if lies is None:
            return None
        if self.effect is not None:
            update = self.effect.weights.get((place.path, place.name))
            if update is not None and update.sliced is not None and lies.axis == "in":
                dtype = torch.float32 if packs else self.plan.dtype(place.site.dtype)
                return Pieces(place, lies, [along(lies, place, [("out", [AddingSliced(update.sliced)])], dtype)])
            return Pieces(place, lies, [] if update is None else [of_update(update, lies.axis)])
        adapters = [place.adapters[n] for n in place.here(self.plan.order)]
        steps = [of_adapter(p, lies.axis) for p in adapters]
        if None in steps:
            steps = [across(place, adapters, lies, torch.float32 if packs else self.plan.dtype(place.site.dtype))]
        return None if None in steps else Pieces(place, lies, [step for step in steps if step is not None])

    def retrained(self, name: str) -> Sliced | None:
        """What becomes of a tensor of a retrained module, as `stored` has it; None where it belongs to none."""
        plan, source = self.plan, self.source(name)
        place = self.at.get(source)
        if not isinstance(place, Retrained):
            return None
        key = source[len(place.path) + 1 :] if place.path else source
        if self.effect is None:
            made = self.stored(place.adapters[place.here(plan.order)[-1]].state_dict(keep_vars=True)[key])
        else:
            made, change = self.stored(own_tensors(place)[key]), self.effect.modules.get(place.path, {}).get(key)
            made = made if change is None else total(made, Sliced.of(change))
        dtype = plan.dtype(plan.shape(source)[1])
        return Sliced(made.shape, lambda rows: made.make(rows).to(dtype))

    def stored(self, t: Tensor) -> Sliced:
        """See the function of this name."""
        if id(t) not in self.known:
            self.known[id(t)] = stored(self.plan, t)
        return self.known[id(t)]

    def keep_bias(self, place: Place, b: Tensor | None) -> None:
        """What became of the bias while the weight was made in pieces."""
        b = b if self.effect is None else self.bias(place)
        if b is not None:
            self.found |= bias_of(self.plan, place, b)

    def bias(self, place: Place) -> Tensor | None:
        """The bias of a place whose adapters leave the weight alone, or have become one change."""
        b = place.site.bias()
        b = None if b is None else full(b)
        if self.effect is not None:
            key = (place.path, place.name)
            update = self.effect.weights.get(key)
            change = self.effect.biases.get(key) if update is None else update.bias
            return b if change is None else full(change) if b is None else b + full(change)
        for name in place.here(self.plan.order):
            b = biased(place.adapters[name], b)
        return b

    def _folded(self, place: AnyPlace, name: str) -> dict[str, Tensor]:
        if isinstance(place, Retrained):
            made = self.retrained(name)
            assert made is not None
            return {name: made.whole().view(self.plan.shape(name)[0])}
        plan, site, prefix = self.plan, place.site, f"{place.path}." if place.path else ""
        if prefix + site.name not in self.at:
            b = self.bias(place)
            return {} if b is None else bias_of(plan, place, b)
        if self.effect is None:
            w, b = place.fold(plan.order)
        else:
            w, update = full(site.read()[0]), self.effect.weights.get((place.path, place.name))
            w, b = w if update is None else w + full(update.matrix()), self.bias(place)
        group = plan.base.group_of.get(prefix + site.name)
        packed = group is not None and group.converter is None and plan.keeps(plan.checkpoint.tensors[group.keys[0]])
        found = {prefix + site.name: site.raw(w) if packed else site.raw(w).to(plan.dtype(site.dtype))}
        return found if b is None else found | bias_of(plan, place, b)


def stored(plan: Plan, t: Tensor) -> Sliced:
    """A tensor of the base, or of a retrained copy of a module, from the files where it has no values; in slices, of a stack in rows of
    its matrices."""
    whole = t
    if id(t) in plan.copies:
        adapter, key = plan.copies[id(t)]
        if t.ndim:
            shape = t.shape if t.ndim != 3 else (t.shape[0] * t.shape[1], t.shape[2])
            return Sliced(shape, lambda rows: adapter.read_rows(key, rows).to(t.dtype))
        whole = adapter.read(key).to(t.dtype)
    elif t.device.type == "meta":
        name = plan.base.names[id(t)]
        lies = lying_as(plan, name) if t.ndim else None
        if lies is not None:
            return Sliced(lies.shape, lies.read).rows()
        whole = plan.base.fetch(name)
    # A single number is as good as a row.
    return Sliced.of(whole if t.ndim else whole.view(1)).rows()


def total(one: Sliced, other: Sliced) -> Sliced:
    return Sliced(one.shape, lambda rows: full(one.make(rows)) + other.make(rows))


def one_change(plan: Plan, unit: Unit, by: Combining, sliced: Slicing) -> Effect:
    """What all adapters of a unit amount to where they become one change first."""
    found = effects(plan.base.model, plan.order, unit.places, sliced)
    effect = combined(found, by.weights, by.chosen, by.options, None, None, by.seed, sliced=True)
    for path, tokens in effect.tokens.items():
        effect.weights[path, tokens.site.name] = tokens.update(path)
    return effect


def bias_of(plan: Plan, place: Place, b: Tensor) -> dict[str, Tensor]:
    """The bias of a place as the model keeps it, under its name.

    Raises:
        ValueError: the base has no place for it.
    """
    own = place.site.bias()
    if own is not None:
        return {(f"{place.path}." if place.path else "") + str(place.site.bias_name): b.to(plan.dtype(own.dtype))}
    if b.any():
        raise ValueError(
            f"An adapter gives {place.path!r} a bias, and the layers of this architecture have none: a merged file could not hold it. "
            "Keep base and adapter apart, or train without biases."
        )
    return {}
