"""Tensors that are made some slices at a time, and rules of `arithmetic` on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from ..formats.packed import slices
from .arithmetic import Of, Options, Rule

# Whole numbers of the same bits.
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


@dataclass
class Sliced:
    """A tensor that is not held.

    Attributes:
        make: gives some slices of its first axis.
    """

    shape: Sequence[int]
    make: Callable[[slice], Tensor]

    def __iter__(self) -> Iterator[Tensor]:
        return map(self.make, slices(self.shape))

    def whole(self) -> Tensor:
        found: Tensor | None = None
        for rows in slices(self.shape):
            piece = self.make(rows)
            found = torch.empty(self.shape, dtype=piece.dtype, device=piece.device) if found is None else found
            found[rows] = piece
        assert found is not None
        return found

    def zeros(self) -> Sliced:
        return Sliced(self.shape, lambda rows: torch.zeros(rows.stop - rows.start, *self.shape[1:]))

    def rows(self) -> Sliced:
        """Of a stack the rows of its matrices, one after another. The matrix that was asked for last is kept."""
        if len(self.shape) != 3:
            return self
        (count, height, width), kept = self.shape, dict[int, Tensor]()

        def make(rows: slice) -> Tensor:
            found = []
            for i in range(rows.start // height, -(-rows.stop // height)):
                if i not in kept:
                    kept.clear()
                    kept[i] = self.make(slice(i, i + 1))[0]
                found.append(kept[i][max(0, rows.start - i * height) : rows.stop - i * height])
            return found[0] if len(found) == 1 else torch.cat(found)

        return Sliced((count * height, width), make)

    def part(self, rows: slice) -> Sliced:
        """Some of the slices."""
        return Sliced(
            (rows.stop - rows.start, *self.shape[1:]), lambda some: self.make(slice(rows.start + some.start, rows.start + some.stop))
        )

    @staticmethod
    def of(t: Tensor | Sliced) -> Sliced:
        return t if isinstance(t, Sliced) else Sliced(t.shape, lambda rows: t[rows])


class InSlices:
    """What rules ask of the whole of tensors that are not held, found in passes over them; else as `arithmetic.Whole`.

    Args:
        stacked: gives slices of all of them, ``(n, slices, ...)``.
        generator: as it is before the first draw for the whole.
    """

    def __init__(self, count: int, stacked: Sliced, generator: torch.Generator) -> None:
        self.count, self.stacked, self.generator = count, stacked, generator
        self.size = prod(stacked.shape)
        self.known: dict[tuple[str, int], Tensor] = {}
        self.generators: list[torch.Generator] = []

    def least(self, of: Of, kept: int) -> Tensor:
        """Positive numbers are in the order of their bits, which are found by sixteen, the highest ones first."""
        key = of.__qualname__, kept
        if key not in self.known:
            dtype = of(self.stacked.make(slice(0, 1))).dtype
            found, left = torch.zeros((), dtype=BITS[dtype]), torch.tensor(kept)
            for shift in range(8 * dtype.itemsize - 16, -1, -16):
                above = found
                known = (torch.where(bits >> 16 == above, bits & 0xFFFF, -1) for bits in self._bits(of, shift))
                next_ones, beyond = nearest_to(known, left)
                found, left = above << 16 | next_ones, left - beyond
            self.known[key] = found.to(BITS[dtype]).view(dtype)[:, 0]
        return self.known[key]

    def _bits(self, of: Of, shift: int) -> Iterator[Tensor]:
        """The bits of what is made of the tensors, without the lowest ones."""
        for t in self.stacked:
            made = of(t).flatten(1).abs()
            yield made.view(BITS[made.dtype]) >> shift

    def sums(self, of: Of) -> Tensor:
        key = of.__qualname__, 0
        if key not in self.known:
            found = [of(t) for t in self.stacked]
            self.known[key] = torch.stack(found).sum(0, dtype=torch.float64).to(found[0])
        return self.known[key]

    def draws(self, t: Tensor) -> Tensor:
        """For slices one after another, from the first one on."""
        return torch.stack([torch.rand(each.shape, generator=g) for each, g in zip(t, self.generators, strict=True)])

    def restart(self) -> None:
        """Draws begin anew: those for each tensor where they would if all tensors were drawn for, one after another."""
        going = self.generator.clone_state()
        self.generators = []
        for _ in range(self.count):
            self.generators.append(going.clone_state())
            for rows in slices((self.size,)):
                torch.rand(rows.stop - rows.start, generator=going)


def nearest_to(pieces: Iterable[Tensor], kept: Tensor | int) -> tuple[Tensor, Tensor]:
    """In each row the number that has ``kept`` numbers from it upwards, and how many are above it: ``(n, 1)`` each.

    Args:
        pieces: whole numbers ``(n, any)`` in [0, 2^16), or -1 for those that do not count.
    """
    counts: Tensor | int = 0
    for piece in pieces:
        counts = counts + torch.stack([torch.bincount(row + 1, minlength=2**16 + 1)[1:] for row in piece])
    assert isinstance(counts, Tensor)
    upwards = counts.flip(1).cumsum(1).flip(1)
    found = (upwards >= kept).sum(1, keepdim=True) - 1
    return found, (upwards - counts).gather(1, found)


def by_slices(rule: Rule, count: int, stacked: Sliced, w: Tensor, o: Options) -> Sliced:
    """What a rule makes of tensors that are not held. Slices have to be asked for one after another, from the first one on.

    Args:
        stacked: gives slices of all of them, ``(count, slices, ...)``.
    """
    whole = InSlices(count, stacked, o.generator)
    seeing = replace(o, whole=whole)

    def make(rows: slice) -> Tensor:
        if rows.start == 0:
            whole.restart()
        t = stacked.make(rows)
        return rule(t, w.to(t), seeing)

    return Sliced(stacked.shape, make)
