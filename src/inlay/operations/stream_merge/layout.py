"""The output's files, to the byte: what each tensor is there, and in which of them it stands."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ...formats.packed import Packed
from ...formats.streaming import DTYPES, NAMES, Checkpoint, Entry, Planned, Shard
from ..disk_base import PACKED, DiskBase, Group
from .change import Unit


class Layout:
    """Where the tensors of a merged model go, once it is known which of them change.

    Attributes:
        base, checkpoint: the model without values, and its files.
        units: of weights that change together.
        resized: embeddings and heads that have another number of rows than in the files.
        sources: the tensors of the base that the output has under the same keys, in the order of their bytes.
        in_codes: tensors that stand for others only in the dtype that they have.
        shards: the output's files, by name. where: the file of each tensor.
    """

    base: DiskBase
    checkpoint: Checkpoint
    units: list[Unit]
    resized: set[str]
    out_dtype: torch.dtype | None
    base_dtype: str | None
    sources: dict[str, Entry]
    in_codes: set[str]
    shards: dict[str, Shard]
    where: dict[str, str]

    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.out_dtype if self.out_dtype is not None and dtype.is_floating_point and dtype not in PACKED else dtype

    def _planned(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Planned:
        dtype = self.dtype(dtype)
        return key, NAMES[dtype], tuple(shape), dtype.itemsize * torch.Size(shape).numel()

    def shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a tensor of the model that the files do not have, or not in this shape."""
        path, _, leaf = name.rpartition(".")
        module = self.base.model.get_submodule(path)
        own = module._parameters.get(leaf)
        own = module._buffers[leaf] if own is None else own
        return tuple(own.shape), own.dtype

    def keeps(self, entry: Entry | None) -> bool:
        """Whether a tensor of the base is quantised, and stays so."""
        return isinstance(entry, Packed) and self.base_dtype == "requantized"

    def written_as(self, key: str) -> list[str]:
        """What a tensor of the base is in the output's files."""
        entry = self.checkpoint.tensors[key]
        return [e.key for e in entry.parts.values()] if isinstance(entry, Packed) and self.keeps(entry) else [key]

    def keys_of(self, group: Group) -> list[str]:
        """What a group is in the output's files."""
        return [k for key in group.keys for k in self.written_as(key)]

    def keys(self, unit: Unit) -> list[str]:
        """What a unit is in the output's files."""
        return [k for g in unit.groups for k in self.keys_of(g)] + unit.new

    def _layout(self) -> tuple[dict[str, Shard], dict[str, str]]:
        """The output's files, and in which of them each tensor is. Sets where tensors that are copied come from."""
        planned: dict[str, list[Planned]] = {file: [] for file in self.checkpoint.files}
        other = {g.keys[0]: self.shape(n) for u in self.units for g in u.groups for n in g.targets if n in self.resized}
        changed = {key for unit in self.units for g in unit.groups for key in g.keys}
        entries: list[Entry] = []
        for key, entry in self.checkpoint.tensors.items():
            if not (isinstance(entry, Packed) and self.keeps(entry)):
                entries.append(entry)
            else:
                parts = entry.written() if key in changed else list(entry.parts.values())
                self.in_codes |= {e.key for e in parts}
                entries += parts
        self.sources = {e.key: e for e in sorted(entries, key=lambda e: (e.file.name, e.start))}
        for key, entry in self.sources.items():
            if key not in other and not self.casts(key):
                planned[entry.file.name].append((key, entry.dtype, entry.shape, entry.nbytes))
            else:
                planned[entry.file.name].append(self._planned(key, entry.torch_dtype, other[key][0] if key in other else entry.shape))
        for unit in self.units:
            for name in unit.new:
                shape, dtype = self.shape(name)
                planned[self.checkpoint.files[-1]].append(self._planned(name, dtype, shape))
        for tensors in planned.values():
            # Readers want each tensor to begin at a multiple of its numbers' width.
            tensors.sort(key=lambda p: -DTYPES[p[1]].itemsize if p[1] in DTYPES else 0)
        where = {p[0]: file for file, tensors in planned.items() for p in tensors}
        return {f: Shard(Path(f), tensors, self._said_of(f)) for f, tensors in planned.items()}, where

    def _said_of(self, file: str) -> dict[str, str]:
        """The metadata of a file. What they say of quantised weights goes with those."""
        said = self.checkpoint.metadata[file]
        return said if said and self.base_dtype != "dequantized" else {"format": "pt"}

    def casts(self, key: str) -> bool:
        """Whether a tensor of the output that no adapter touches has other bytes than in the base."""
        entry = self.sources[key]
        if key in self.in_codes:
            return False
        return isinstance(entry, Packed) or (entry.dtype in DTYPES and self.dtype(DTYPES[entry.dtype]) != DTYPES[entry.dtype])
