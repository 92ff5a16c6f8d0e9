"""The files of adapters, of which only those tensors are read that are needed."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.config import PeftConfig
from ...core.method import Method
from ...formats.folder import weight_files
from ...formats.packed import slices
from ...formats.slots import bare_key
from ...formats.streaming import AT_ONCE, Entry, Files, read_header


class AdapterFile:
    """An adapter's folder, of whose tensors only those are read that are needed.

    Attributes:
        name: in the model.
        weight: its strength.
    """

    def __init__(self, source: str, name: str, weight: float, files: Files) -> None:
        self.source, self.name, self.weight, self.files = source, name, weight, files
        self.config = PeftConfig.from_pretrained(source)
        self.config.inference_mode = True
        if not isinstance(self.config, Method):
            raise TypeError(f"{source}: {self.config.peft_type} acts on the inputs of the model, not its weights, and cannot be merged.")
        self.entries: dict[str, Entry] = {}
        self.paths = weight_files(source)
        for path in self.paths:
            self.entries |= read_header(path)[0]
        self.tensors: dict[str, Tensor] | None = None
        if type(self.config).as_read is not Method.as_read:
            self._as_read(self.config)

    def _as_read(self, method: Method) -> None:
        """Entries as a method wants them; tensors in memory, where it makes others of them than are in the file."""
        empty = {key: entry.meta() for key, entry in self.entries.items()}
        by_tensor = {id(tensor): self.entries[key] for key, tensor in empty.items()}
        try:
            found = method.as_read(empty)
        except NotImplementedError:
            found = {"": torch.empty(0)}
        if all(id(tensor) in by_tensor for tensor in found.values()):
            self.entries = {key: by_tensor[id(tensor)] for key, tensor in found.items()}
        else:
            self.tensors = dict(method.as_read({key: self.files.read(entry) for key, entry in self.entries.items()}))

    @property
    def keys(self) -> list[str]:
        return list(self.entries if self.tensors is None else self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape if self.tensors is None else tuple(self.tensors[key].shape)

    def read(self, key: str) -> Tensor:
        """
        Raises:
            ValueError: a value is not finite.
        """
        found = self.files.read(self.entries[key]) if self.tensors is None else self.tensors[key]
        self._check(key, found)
        return found

    def read_rows(self, key: str, rows: slice) -> Tensor:
        """Some slices of a tensor; of a stack some rows of its matrices, one after another.

        Raises:
            ValueError: a value is not finite.
        """
        if self.tensors is None:
            entry = self.entries[key]
            shape = entry.shape if len(entry.shape) != 3 else (entry.shape[0] * entry.shape[1], entry.shape[2])
            found = self.files.read(replace(entry, shape=shape), rows)
        else:
            whole = self.tensors[key]
            found = (whole.flatten(0, 1) if whole.ndim == 3 else whole)[rows]
        self._check(key, found)
        return found

    @torch.no_grad()
    def read_corner(self, key: str, into: Tensor) -> None:
        """As much of a tensor as there is room for, some rows at a time.

        Raises:
            ValueError: a value is not finite.
        """
        places = tuple(slice(size) for size in into.shape)
        if self.tensors is not None or not into.ndim:
            into.copy_(self.read(key)[places])
            return
        for rows in slices((into.shape[0], *self.shape(key)[1:])):
            found = self.files.read(self.entries[key], rows)
            self._check(key, found)
            into[rows].copy_(found[(slice(None), *places[1:])])

    def _check(self, key: str, found: Tensor) -> None:
        if not is_finite(found):
            raise ValueError(f"{self.source}: {key!r} holds values that are not finite; the adapter is broken.")

    def fingerprint(self) -> list[Any]:
        config = json.dumps(self.config.to_file(), sort_keys=True, default=str)
        return [self.weight, zlib.crc32(config.encode()), *map(_checksum, self.paths)]


def is_finite(tensor: Tensor) -> bool:
    """Infinities and what is no number show in the extremes, which are found many times faster than by looking at each."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(bool(x.isfinite()) for x in torch.aminmax(tensor))


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as source:
        while block := source.read(AT_ONCE):
            found = zlib.crc32(block, found)
    return found


class Given(Mapping[str, tuple[str, Tensor]]):
    """An adapter's tensors by their bare keys, each read when it is asked for."""

    def __init__(self, adapter: AdapterFile) -> None:
        self.adapter, self.own = adapter, {bare_key(key): key for key in adapter.keys}

    def __getitem__(self, key: str) -> tuple[str, Tensor]:
        return self.own[key], self.adapter.read(self.own[key])

    def __contains__(self, key: object) -> bool:
        return key in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)
