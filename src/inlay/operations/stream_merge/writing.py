"""Writing the output's tensors, in the order of the base's bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from ...core.method import full
from ...formats import streaming
from ...formats.packed import Packed, Packing, slices
from ...formats.streaming import Entry, Shard, Writing
from ..disk_base import Group
from ..slicing import Sliced
from .adapters import is_finite
from .folding import Folds, filled
from .journal import Journal
from .pieces import Pieces, fold_within
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
                del left[file]
                self.writing.afterwards(partial(self._finish, plan.shards[file], journal))

    @staticmethod
    def _finish(shard: Shard, journal: Journal) -> None:
        shard.close()
        journal.note(shard)

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
        with base.holding() as held, filled(plan, unit):
            folds = Folds(plan, unit)
            # What adapters were derived from; few look at it again.
            held.clear()
            for group, names in folds.outputs():
                if not wanted.isdisjoint(names if group is None else plan.keys_of(group)):
                    self._write(folds, group, names, wanted)
                    held.clear()

    def _write(self, folds: Folds, group: Group | None, names: Sequence[str], wanted: set[str]) -> None:
        """What becomes of tensors of the model that the files keep together."""
        plan, base, name = self.plan, self.plan.base, names[0]
        entry = None if group is None or group.converter is not None else plan.checkpoint.tensors[group.keys[0]]
        if entry is not None and folds.stays(name) and not plan.keeps(entry):
            self._copy([entry.key])
            return
        pieces = folds.pieces(name, plan.keeps(entry)) if len(names) == 1 else None
        if pieces is not None:
            b = self._merge_in_pieces(pieces, name, group, entry, wanted)
            folds.keep_bias(pieces.place, b)
            return
        apart = group is None or group.converter is None or group.is_stack(base)
        made = folds.retrained(name) if len(names) == 1 and apart and not plan.keeps(entry) else None
        if made is not None:
            self._put_sliced(name, group, made, wanted)
            return
        tensors = {n: folds.take(n) for n in names}
        for key, tensor in (tensors if group is None else group.revert(tensors, base.model, base.key_of(group))).items():
            self._put_whole(key, tensor, wanted)

    def _merge_in_pieces(self, pieces: Pieces, name: str, group: Group | None, entry: Entry | None, wanted: set[str]) -> Tensor | None:
        """Of a weight no more is in memory in full precision than some rows. Returns what becomes of the bias."""
        plan, lies, steps = self.plan, pieces.lies, pieces.steps
        site, bias = pieces.place.site, pieces.place.site.bias()
        dtype, biases, change = plan.dtype(site.dtype), list[Tensor](), 0.0
        packing = entry.packing(plan.files) if isinstance(entry, Packed) and plan.keeps(entry) else None
        for rows in slices(lies.shape, 1 if packing is None else lies.together):
            before = lies.read(rows)
            if packing is None and pieces.parts_matrices:
                before = w = fold_within(pieces, before, rows.start, dtype)
            else:
                w, b = lies.matrix(full(before)), None if bias is None else full(bias if lies.axis == "in" else bias[rows])
                if packing is None:
                    # What was read is no longer needed.
                    del before
                elif full(before) is before:
                    w = w.clone()
                for step in steps:
                    w, b = step.fold(w, b, rows)
                w = lies.matrix(w)
                if b is not None:
                    biases = [b] if lies.axis == "in" else [*biases, b]
            if packing is not None:
                check_finite(name, w)
                packing.add(w)
                change += apart(w, before)
            else:
                self._put_rows(name, group, w.to(dtype), rows, wanted)
            # The next rows are read into the room of these.
            before = w = None
        if packing is not None:
            self._put_packed(packing, change, wanted)
        return torch.cat(biases) if biases else bias

    def _put_sliced(self, name: str, group: Group | None, made: Sliced, wanted: set[str]) -> None:
        if group is None or group.converter is None:
            for rows in slices(made.shape):
                self._put_rows(name, group, made.make(rows), rows, wanted)
            return
        shape = group.targets[name].shape
        height = made.shape[0] // shape[0]
        for i in range(shape[0]):
            one = made.part(slice(i * height, (i + 1) * height)).whole()
            self._put_rows(name, group, one.view(1, *shape[1:]), slice(i, i + 1), wanted)

    def _put_rows(self, name: str, group: Group | None, tensor: Tensor, rows: slice, wanted: set[str]) -> None:
        """Some slices of a tensor of the model, as the files keep them."""
        base = self.plan.base
        if group is not None and group.converter is not None:
            some = group.some(rows)
            for key, part in some.revert({name: tensor}, base.model, base.key_of(some)).items():
                self._put_whole(some.kept_as[key], part, wanted)
            return
        key = name if group is None else group.keys[0]
        if key in wanted:
            self._put_merged(key, tensor, rows)

    def _put_whole(self, key: str, tensor: Tensor, wanted: set[str]) -> None:
        entry = self.plan.checkpoint.tensors.get(key)
        if isinstance(entry, Packed) and self.plan.keeps(entry):
            self._pack(entry, tensor, wanted)
        elif key in wanted:
            self._put_merged(key, tensor)

    def _pack(self, entry: Packed, tensor: Tensor, wanted: set[str]) -> None:
        """A merged weight that is there as a whole, quantised again."""
        check_finite(entry.key, tensor)
        packing, own = entry.packing(self.plan.files), tensor.mT if entry.transposed else tensor
        before, change = self.plan.files.read(entry), 0.0
        before = before.mT if entry.transposed else before
        for rows in slices(entry.stored.shape, entry.together):
            packing.add(own[rows])
            change += apart(own[rows], before[rows])
        self._put_packed(packing, change, wanted)

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


def apart(w: Tensor, before: Tensor) -> float:
    """The square of the norm of what lies between two tensors."""
    pairs = ((w[rows], before[rows]) for rows in slices(w.shape))
    return sum((one - full(other)).square_().sum(dtype=torch.float64).item() for one, other in pairs)


def check_finite(key: str, tensor: Tensor) -> None:
    """
    Raises:
        ValueError: an adapter has made something else of a weight.
    """
    if not is_finite(tensor):
        raise ValueError(f"Merging gives values of {key!r} that are not finite; an adapter seems broken, or its weight too large.")
