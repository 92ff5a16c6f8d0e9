"""Writing the output's tensors, in the order of the base's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.method import full
from ...core.place import Place
from ...formats import streaming
from ...formats.packed import Packed
from ...formats.streaming import Entry, Writing
from .folding import Factors, added, filled, folded, rowwise
from .journal import Journal
from .plan import Plan, Rounding, Unit


class Writer:
    """
    Args:
        writing: writes behind the computation.
        progress: called with numbers of bytes that have been written since the last time.
    """

    def __init__(self, plan: Plan, writing: Writing, progress: Callable[[int], object]) -> None:
        self.plan, self.writing, self.progress = plan, writing, progress

    def write(self, journal: Journal) -> None:
        """All tensors of the shards that are not finished."""
        plan = self.plan
        in_unit = {key: unit for unit in plan.units for key in plan.keys(unit)}
        left = {name: set(shard.at) for name, shard in plan.shards.items() if name not in journal.finished}
        ready: set[int] = set()
        for name, shard in plan.shards.items():
            for keys in self._runs([k for k in shard.at if k in left.get(name, ()) and k not in in_unit]):
                self._copy(keys)
                left[name] -= set(keys)
            for key in shard.at:
                unit = in_unit.get(key)
                if unit is None or id(unit) in ready:
                    continue
                ready.add(id(unit))
                wanted = {k for k in plan.keys(unit) if k in left.get(plan.where[k], ())}
                if wanted:
                    self._merge(unit, wanted)
                    for k in wanted:
                        left[plan.where[k]].discard(k)
            for file in [f for f, keys in left.items() if not keys]:
                self.writing.wait()
                plan.shards[file].close()
                del left[file]
                journal.note(plan.shards[file])

    # -- what no adapter touches --
    def _runs(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Tensors that lie side by side in both files and stay as they are, together; others one by one."""
        plan, run = self.plan, []
        for key in keys:
            entry = plan.sources[key]
            if run:
                last, shard = plan.sources[run[-1]], plan.shards[plan.where[key]]
                beside = last.start + last.nbytes == entry.start and shard.at[run[-1]] + last.nbytes == shard.at[key]
                size = entry.start + entry.nbytes - plan.sources[run[0]].start
                if not beside or plan.casts(key) or plan.casts(run[-1]) or size > streaming.AT_ONCE * 4:
                    yield run
                    run = []
            run.append(key)
        if run:
            yield run

    def _copy(self, keys: Sequence[str]) -> None:
        plan = self.plan
        first, last, shard = plan.sources[keys[0]], plan.sources[keys[-1]], plan.shards[plan.where[keys[0]]]
        if plan.casts(keys[0]):
            for rows in slices(first) if first.shape else (None,):
                self._put(first.key, plan.files.read(first, rows).to(plan.dtype(first.torch_dtype)), rows)
            return
        nbytes, source = last.start + last.nbytes - first.start, plan.files.descriptor(first.file)

        def copy() -> None:
            shard.copy(keys[0], source, first.start, nbytes)
            self.progress(nbytes)

        self.writing.submit(copy, 0)

    def _put(self, key: str, tensor: Tensor, rows: slice | None = None) -> None:
        shard = self.plan.shards[self.plan.where[key]]
        skipped = 0 if rows is None or not len(tensor) else rows.start * (tensor.nbytes // len(tensor))

        def write() -> None:
            shard.put(key, tensor, skipped)
            self.progress(tensor.nbytes)

        self.writing.submit(write, tensor.nbytes)

    # -- what adapters touch --
    def _merge(self, unit: Unit, wanted: set[str]) -> None:
        plan, base = self.plan, self.plan.base

        def put(key: str, tensor: Tensor, rows: slice | None = None) -> None:
            entry = plan.checkpoint.tensors.get(key)
            kept = isinstance(entry, Packed) and plan.keeps(entry)
            tensor = tensor if kept else tensor.to(plan.dtype(tensor.dtype))
            if not is_finite(tensor):
                raise ValueError(f"Merging gives values of {key!r} that are not finite; an adapter seems broken, or its weight too large.")
            if not kept:
                if key in wanted:
                    self._put(key, tensor, rows)
                return
            assert isinstance(entry, Packed)
            for part, codes in self._packed(entry, tensor).items():
                if part in wanted:
                    self._put(part, codes)

        with base.holding() as held, filled(plan, unit):
            if (site := rowwise(plan, unit)) is not None:
                place: Any = next(p for p in unit.places if isinstance(p, Place) and p.site is site)
                group = base.group_of[base.names[id(site.module._parameters[site.name])]]
                for other in unit.groups:
                    if other is not group and other.keys[0] in wanted:
                        self._copy(other.keys)
                entry = plan.checkpoint.tensors[group.keys[0]]
                factors = [Factors(place.adapters[n]) for n in place.here(plan.order)]
                for rows in slices(entry):
                    put(entry.key, added(site, plan.files.read(entry, rows), rows, factors).to(entry.torch_dtype), rows)
                return
            found = folded(plan, unit)
            for name in unit.new:
                put(name, found[name] if name in found else base.fetch(base.canonical(name)))
            for group in unit.groups:
                tensors = {}
                for name in group.targets:
                    same = base.canonical(name) if name in plan.following else name
                    source = found.pop(same, None) if len(base.aliases.get(same, ())) < 2 else found.get(same)
                    tensors[name] = base.fetch(base.canonical(name)) if source is None else source
                    held.pop(name, None)
                for key, tensor in group.revert(tensors, base.model, base.key_of(group)).items():
                    put(key, tensor)

    def _packed(self, entry: Packed, w: Tensor) -> dict[str, Tensor]:
        """A merged weight as its file keeps it; what rounding takes is noted."""
        found, q = entry.pack(w)
        error, weight, change = torch.zeros(3, dtype=torch.float64)
        own = w.mT if entry.transposed else w
        whole = self.plan.files.read(entry).mT if entry.transposed else None
        for start, stop, now in q.pieces(torch.float32):
            wanted = full(own[start:stop])
            before = self.plan.files.read(entry, slice(start, stop)) if whole is None else whole[start:stop]
            error += (now - wanted).square().sum()
            weight += wanted.square().sum()
            change += (wanted - full(before)).square().sum()
        self.plan.rounding[entry.key] = Rounding(error.item(), weight.item(), change.item())
        return found


def slices(entry: Entry) -> Iterator[slice]:
    """Rows of a tensor (slices of its first axis) that hold about as many numbers as are worth computing at once."""
    width = max(1, torch.Size(entry.shape[1:]).numel())
    step = max(1, streaming.AT_ONCE // 4 // width) if entry.sliceable else max(1, entry.shape[0])
    for start in range(0, max(1, entry.shape[0]), step):
        yield slice(start, min(entry.shape[0], start + step))


def is_finite(tensor: Tensor) -> bool:
    """Infinities and what is no number show in the extremes, which are found many times faster than by looking at each."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(bool(x.isfinite()) for x in torch.aminmax(tensor))
