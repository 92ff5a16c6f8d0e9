"""What all ways of keeping a quantised weight in a file have in common: its tensors are seen as one weight, and written as those again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, Self

import torch
from torch import Tensor

from ...core.method import full
from .. import streaming
from ..streaming import NAMES, Entry, Files

Numbers = dict[str, Tensor]


def slices(shape: Sequence[int], together: int = 1) -> Iterator[slice]:
    """Slices of the first axis that hold about as many numbers as are worth computing at once.

    Args:
        together: how many must not be parted.
    """
    width = max(1, prod(shape[1:]))
    step = max(1, streaming.AT_ONCE // 4 // width // together) * together
    for start in range(0, max(1, shape[0]), step):
        yield slice(start, min(shape[0], start + step))


@dataclass(frozen=True, eq=False)
class Packed(Entry):
    """One quantised weight. As an entry, it is the weight in floating point.

    A format says which numbers of the file belong to some rows (`numbers`), and what they stand for (`dense`). One that can be
    written again says which numbers stand for other rows (`rounded`), and how a file keeps them (`in_file`). Rows are those of the
    weight as stored, ``(out, in)``; of a stack, its matrices.

    Attributes:
        parts: the tensors of the file, by the format's names for them.
        kind: what to call it.
        transposed: the model sees the file's matrix the other way round.
        unwritable: why a file cannot hold another weight in this way; empty where it can.
    """

    parts: Mapping[str, Entry] = field(default_factory=dict)
    kind: str = ""
    transposed: bool = False
    unwritable: str = ""

    def numbers(self, files: Files, rows: slice) -> Numbers:
        raise NotImplementedError

    def dense(self, numbers: Numbers) -> Tensor:
        """The rows in floating point, before they are rounded to the weight's dtype."""
        raise NotImplementedError

    def rounded(self, w: Tensor, before: Numbers) -> Numbers:
        """
        Args:
            w: rows in full precision; all but the last time a multiple of `together`.
            before: the numbers of these rows now.

        Returns:
            Those of them that are others for ``w``.
        """
        raise NotImplementedError

    def in_file(self, numbers: Numbers) -> Numbers:
        """What `rounded` gave, by the names of the parts."""
        return numbers

    def axis(self, name: str) -> int:
        """That of a part of the file along which rows lie."""
        return 0

    @property
    def together(self) -> int:
        """A multiple of so many stored rows is rounded apart from the others."""
        return 1

    @classmethod
    def of(cls, key: str, parts: Mapping[str, Entry], shape: tuple[int, ...], dtype: torch.dtype, **more: Any) -> Self:
        """
        Args:
            parts: the codes first.
            dtype: of the weight.
        """
        codes = next(iter(parts.values()))
        return cls(key, codes.file, NAMES[dtype], shape, codes.start, prod(shape) * dtype.itemsize, parts, **more)

    # ---- reading --------------------------------------------------------------------------------------------------------
    @property
    def stored(self) -> Packed:
        """The weight as the file has it."""
        return self.turned() if self.transposed else self

    def turned(self) -> Packed:
        """The same, the other way round."""
        return replace(self, shape=(*self.shape[:-2], self.shape[-1], self.shape[-2]), transposed=not self.transposed)

    @property
    def sliceable(self) -> bool:
        return not self.transposed

    def read(self, files: Files, rows: slice | None = None) -> Tensor:
        """The weight, or some of its rows, in floating point."""
        if self.transposed:
            found = self.stored.read(files).mT.contiguous()
            return found if rows is None else found[rows]
        rows = rows or slice(0, self.shape[0])
        made = torch.empty(rows.stop - rows.start, *self.shape[1:], dtype=self.torch_dtype)
        for piece in slices(made.shape):
            at = slice(rows.start + piece.start, rows.start + piece.stop)
            made[piece] = self.dense(self.numbers(files, at))
        return made

    # ---- writing --------------------------------------------------------------------------------------------------------
    def written(self) -> list[Entry]:
        """The tensors of a file that holds another weight in this way.

        Raises:
            ValueError: there is no such file.
        """
        if self.unwritable:
            raise ValueError(
                f"{self.key!r} cannot be quantised again: {self.unwritable} Merge into dense weights (--base-dtype dequantized), or "
                "into the original ones (--base-dtype original)."
            )
        return list(self.parts.values())

    def packing(self, files: Files) -> Packing:
        """Takes another weight."""
        return Packing(self.stored, files)


class Packing:
    """Another weight in the way of this one, from its stored rows one after another.

    Attributes:
        error: what rounding took; known in the end. weight: what was packed. Squares of norms.
    """

    def __init__(self, entry: Packed, files: Files) -> None:
        self.entry, self.files = entry, files
        self.pieces: list[Numbers] = []
        self.at = 0
        self.error = self.weight = 0.0

    def add(self, w: Tensor) -> None:
        """Further rows; all but the last are a multiple of `Packed.together`."""
        entry, w = self.entry, full(w)
        before = entry.numbers(self.files, slice(self.at, self.at + len(w)))
        made = entry.rounded(w, before)
        self.pieces.append(entry.in_file(made))
        self.at += len(w)
        now = before | made
        for rows in slices(w.shape):
            rest = w[rows] - entry.dense({name: t[rows] for name, t in now.items()})
            self.error += rest.square_().sum(dtype=torch.float64).item()
            self.weight += w[rows].square().sum(dtype=torch.float64).item()

    def parts(self) -> dict[str, Tensor]:
        """The tensors of the file by their keys."""
        made, found = self.pieces, {}
        for name, part in self.entry.parts.items():
            if name not in made[0]:
                found[part.key] = part.read(self.files)
                continue
            pieces = [piece.pop(name) for piece in made]
            found[part.key] = torch.cat(pieces, self.entry.axis(name)).to(part.torch_dtype).reshape(part.shape)
        return found
