"""Writing the output's tensors, in the order of the base's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.method import full
from ...core.place import Place
from ...formats import streaming
from ...formats.packed import Packed, Packing
from ...formats.streaming import Writing
from .folding import apart, bias_of, filled, folded, in_pieces, in_rows
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
            for rows in slices(first.shape) if first.sliceable else (None,):
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

        def put(key: str, tensor: Tensor) -> None:
            entry = plan.checkpoint.tensors.get(key)
            if isinstance(entry, Packed) and plan.keeps(entry):
                check_finite(key, tensor)
                packing, own = Packing(entry), tensor.mT if entry.transposed else tensor
                before = plan.files.read(entry)
                change = 0.0
                for rows in slices(entry.stored.shape, entry.together):
                    packing.add(own[rows])
                    change += squares(own[rows] - full((before.mT if entry.transposed else before)[rows]))
                self._put_packed(packing, change, wanted)
            elif key in wanted:
                self._put_merged(key, tensor)

        with base.holding() as held, filled(plan, unit):
            if (place := apart(plan, unit)) is not None:
                self._merge_in_pieces(unit, place, wanted)
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

    def _merge_in_pieces(self, unit: Unit, place: Place, wanted: set[str]) -> None:
        """Of a weight whose rows are folded apart no more is in memory in full precision than some of them."""
        plan, site, base = self.plan, place.site, self.plan.base
        group = base.group_of[base.names[id(site.module._parameters[site.name])]]
        entry: Any = plan.checkpoint.tensors[group.keys[0]]
        key, adapters, bias = entry.key, in_pieces(plan, place), site.bias()
        packing = Packing(entry) if plan.keeps(entry) else None
        # Rows that do not lie one behind another are read with all others, and changed in place.
        own = None if in_rows(site, entry) else plan.files.read(entry)
        stored = entry.stored if isinstance(entry, Packed) and own is None else entry
        shape, biases, change = site.shape, [], 0.0
        for rows in slices(shape, entry.together if isinstance(entry, Packed) else 1):
            if own is not None:
                before = site.matrix(own)[rows]
            else:
                before = plan.files.read(stored, rows)
                before = before if stored is not entry else site.matrix(before)
            w, b = full(before), None if bias is None else full(bias[rows])
            if packing is not None and w is before:
                w = w.clone()
            elif packing is None and own is None:
                # What was read is no longer needed.
                del before
            for adapter in adapters:
                w, b = adapter.fold(w, b, rows)
            if b is not None:
                biases.append(b)
            if packing is not None:
                check_finite(key, w)
                packing.add(w)
                change += squares(w - full(before))
            elif own is not None:
                before.copy_(w)
            elif key in wanted:
                w = w.to(entry.torch_dtype)
                self._put_merged(key, site.raw(w), rows)
            # The next rows are read into the room of these.
            before = w = None
        if packing is not None:
            self._put_packed(packing, change, wanted)
        elif own is not None and key in wanted:
            self._put_merged(key, own)
        found = bias_of(place, torch.cat(biases)) if biases else {}
        for other in unit.groups:
            if other is not group and other.keys[0] in wanted:
                if other.first in found:
                    self._put_merged(other.keys[0], found[other.first])
                else:
                    self._copy(other.keys)

    def _put_merged(self, key: str, tensor: Tensor, rows: slice | None = None) -> None:
        tensor = tensor.to(self.plan.dtype(tensor.dtype))
        check_finite(key, tensor)
        self._put(key, tensor, rows)

    def _put_packed(self, packing: Packing, change: float, wanted: set[str]) -> None:
        """A merged weight as its file keeps it; what rounding took is noted."""
        for part, codes in packing.parts().items():
            if part in wanted:
                self._put(part, codes)
        self.plan.rounding[packing.entry.key] = Rounding(packing.error, packing.weight, change)


def squares(tensor: Tensor) -> float:
    return tensor.square().sum(dtype=torch.float64).item()


def check_finite(key: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: an adapter has made something else of a weight.
    """
    if not is_finite(tensor):
        raise ValueError(f"Merging gives values of {key!r} that are not finite; an adapter seems broken, or its weight too large.")


def slices(shape: Sequence[int], together: int = 1) -> Iterator[slice]:
    """Slices of the first axis that hold about as many numbers as are worth computing at once.

    Args:
        together: how many must not be parted.
    """
    width = max(1, torch.Size(shape[1:]).numel())
    step = max(1, streaming.AT_ONCE // 4 // width // together) * together
    for start in range(0, max(1, shape[0]), step):
        yield slice(start, min(shape[0], start + step))


def is_finite(tensor: Tensor) -> bool:
    """Infinities and what is no number show in the extremes, which are found many times faster than by looking at each."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(bool(x.isfinite()) for x in torch.aminmax(tensor))
