"""Weights in pieces: as they lie in the base's files, some rows at a time, and what adapters make of those."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core.adapter import Adapter
from ...core.additive import Additive, LowRank
from ...core.method import biased, folded, full
from ...core.part import PLACES, Parts, axes_apart, axes_within
from ...core.place import Place
from ...core.site import Conv, Embedding, Linear, Site, Stack, TransposedLinear
from ...formats import streaming
from ...formats.packed import Packed, slices
from ..effects import Update
from ..slicing import Sliced
from .plan import Plan

# Layouts whose weight is a matrix, or a stack of matrices, and nothing else.
MATRICES = (Linear, TransposedLinear, Embedding, Stack, Conv)


def at_once() -> int:
    """How many numbers are worth computing at once."""
    return streaming.AT_ONCE // 4


# ---- reading ----------------------------------------------------------------------------------------------------------------
@dataclass
class Lying:
    """A weight as it lies in the base's files.

    Attributes:
        shape: its slices can be read by themselves.
        read: gives some of them, in memory of their own.
        turned: the matrices that adapters see are the transposed ones.
        together: slices that must not be parted.
    """

    shape: Sequence[int]
    read: Callable[[slice], Tensor]
    turned: bool
    together: int = 1

    @property
    def axis(self) -> str:
        """What of the adapters' matrices a slice has some of."""
        return "batch" if len(self.shape) > 2 else "in" if self.turned else "out"

    def matrix(self, piece: Tensor) -> Tensor:
        """A slice as adapters see it: a view."""
        return piece.mT if self.turned else piece

    def unrolled(self) -> Lying:
        """The same as a matrix, a row to each slice."""
        rows, *rest = self.shape
        return Lying((rows, prod(rest)), lambda piece: self.read(piece).flatten(1), self.turned, self.together)


def lying(plan: Plan, site: Site, packs: bool) -> Lying | None:
    """How the weight of a layer lies in the files; None where slices of it mean nothing.

    Args:
        packs: it will be written as it lies there, quantised.
    """
    base, own = plan.base, site.module._parameters.get(site.name)
    name = None if own is None else base.names.get(id(own))
    if name is None or own is None or type(site) not in MATRICES:
        return None
    if isinstance(site, Conv):
        whole = None if site.batch else lying_as(plan, name, False, packs)
        return None if whole is None else whole.unrolled()
    turned = site.matrix(own).shape != own.shape or isinstance(site, TransposedLinear)
    if isinstance(site, Stack):
        turned = site._transposed
    return lying_as(plan, name, turned, packs)


def lying_as(plan: Plan, name: str, turned: bool = False, packs: bool = False) -> Lying | None:
    """How a tensor of the model lies in the files; None where slices of it mean nothing.

    Args:
        name: of several, the first.
    """
    base = plan.base
    if name in base.values:
        brought = base.fetch(name)
        return Lying(brought.shape, lambda rows: brought[rows].clone(), turned)
    group = base.group_of.get(name)
    if group is None:
        return None
    if group.converter is not None:
        return _one_by_one(plan, name, turned)
    entry, files = plan.checkpoint.tensors[group.keys[0]], plan.files
    if packs:
        assert isinstance(entry, Packed)
        stored = entry.stored
        return Lying(stored.shape, lambda rows: files.read(stored, rows), turned != entry.transposed, entry.together)
    if not entry.sliceable:
        whole = files.read(entry)
        return Lying(entry.shape, lambda rows: whole[rows].clone(), turned)
    return Lying(entry.shape, lambda rows: files.read(entry, rows), turned)


def _one_by_one(plan: Plan, name: str, turned: bool) -> Lying | None:
    """A stack of experts that the files keep one by one."""
    base = plan.base
    group = base.group_of[name]
    if not group.is_stack(base):
        return None

    return Lying(group.targets[name].shape, lambda rows: group.some(rows).convert(base.read, base.model)[name], turned)


# ---- folding ----------------------------------------------------------------------------------------------------------------
class Step(Protocol):
    """What is done to a piece of a weight. It may write to what it is given."""

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]: ...


class Folding:
    """An adapter's fold."""

    def __init__(self, p: Adapter, axis: str) -> None:
        self.parts = Parts(p, axis)

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
        p = self.parts[piece]
        if p.site.batch and w.ndim == 2:
            w, b = folded(p, w.unsqueeze(0), b)
            return w[0], b
        return folded(p, w, biased(p, b))

    def within(self, matrix: int, axis: str) -> Folding:
        """The same of one matrix of a stack."""
        return Folding(self.parts[slice(matrix, matrix + 1)], axis)


class Adding:
    """``w + scale * B A``, in place."""

    def __init__(self, a: Tensor, b: Tensor, scale: float, strength: float, axis: str) -> None:
        self.a, self.b, self.scale, self.strength, self.axis = full(a), full(b), scale, strength, axis

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
        left = self.b if self.axis == "in" else self.b[piece]
        right = self.a[..., piece] if self.axis == "in" else self.a[piece] if self.axis == "batch" else self.a
        if w.ndim > 2:
            w.add_((left @ right).mul_(self.scale), alpha=self.strength)
        else:
            w.addmm_(left, right, alpha=self.scale * self.strength)
        return w, b

    def within(self, matrix: int, axis: str) -> Adding:
        """The same of one matrix of a stack."""
        return Adding(self.a[matrix], self.b[matrix], self.scale, self.strength, axis)


class AddingDense:
    """``w + d``, in place."""

    def __init__(self, change: Tensor, axis: str) -> None:
        self.change, self.axis = change, axis

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
        return w.add_(self.change[..., piece] if self.axis == "in" else self.change[piece]), b


class AddingSliced:
    """``w + d``, in place, of what is not held, by the slices in which it is made."""

    def __init__(self, change: Sliced) -> None:
        self.change = change

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
        return w.add_(self.change.make(piece)), b


class Made:
    """What has been made of a whole weight before, in rows as it lies."""

    def __init__(self, lies: Lying, made: Tensor, bias: Tensor | None) -> None:
        self.lies, self.made, self.bias = lies, made, bias

    def fold(self, w: Tensor, b: Tensor | None, piece: slice) -> tuple[Tensor, Tensor | None]:
        bias = self.bias if self.bias is None or self.lies.axis == "in" else self.bias[piece]
        return w.copy_(self.lies.matrix(self.made[piece])), bias


def across(place: Place, adapters: Sequence[Adapter], lies: Lying, dtype: torch.dtype) -> Made | None:
    """The fold of adapters of which some act on pieces along the other axis than that of the file's slices. The weight is held in
    memory, and no more of it than some rows or columns is in full precision. None where an adapter needs the whole weight.

    Args:
        dtype: of the result.
    """
    other = "in" if lies.axis == "out" else "out"
    if lies.axis == "batch" or not all(map(axes_apart, adapters)):
        return None
    rounds = [(other, adapters)]
    if any(other not in axes_apart(p) for p in adapters):
        rounds, dtype = [(axes_apart(p)[0], [p]) for p in adapters], torch.float32
    return along(lies, place, [(axis, [Folding(p, axis) for p in some]) for axis, some in rounds], dtype)


def along(lies: Lying, place: Place, rounds: Sequence[tuple[str, Sequence[Step]]], dtype: torch.dtype) -> Made:
    """What steps make of a weight, round after round, in pieces along the axis of each. The weight is held in memory.

    Args:
        dtype: in which it is held.
    """
    made = torch.empty(lies.shape, dtype=dtype)
    for rows in slices(lies.shape, lies.together):
        made[rows] = lies.read(rows)
    matrix, bias = lies.matrix(made), place.site.bias()
    for axis, steps in rounds:
        at, before = PLACES[axis], None if bias is None else full(bias)
        found: list[Tensor] = []
        for piece in slices(matrix.shape if axis == "out" else matrix.mT.shape):
            part = matrix.narrow(at, piece.start, piece.stop - piece.start)
            w, b = full(part), before if before is None or axis == "in" else before[piece]
            for step in steps:
                w, b = step.fold(w, b, piece)
            part.copy_(w)
            if b is not None:
                found = [b] if axis == "in" else [*found, b]
        bias = torch.cat(found) if found else None
    return Made(lies, made, bias)


def of_adapter(p: Adapter, axis: str) -> Step | None:
    """What an adapter makes of pieces along an axis; None where it needs the whole weight."""
    if _only_adds(p):
        method: Any = p.method
        a, b = method.factors(p)
        return Adding(a, b, method.scaling, p.strength, axis)
    return Folding(p, axis) if axis in axes_apart(p) else None


def of_update(update: Update, axis: str) -> Step:
    """What several adapters that have become one change add. (Its bias is left out.)"""
    if update.sliced is not None:
        return AddingSliced(update.sliced)
    if update.dense is not None:
        return AddingDense(full(update.dense), axis)
    a, b = update.factors()
    return Adding(a, b, 1.0, 1.0, axis)


def _only_adds(p: Adapter) -> bool:
    """Whether an adapter's fold is ``w + s B A`` and leaves the bias alone."""
    method = p.method
    own: Any = type(method)
    if not isinstance(method, LowRank) or own.fold is not Additive.fold or own.delta is not LowRank.delta:
        return False
    return own.plus_delta is LowRank.plus_delta and p.trained_bias is None and method.delta_bias(p) is None


@dataclass
class Pieces:
    """How a weight is made in pieces.

    Attributes:
        steps: one after another.
    """

    place: Place
    lies: Lying
    steps: Sequence[Step]

    @property
    def parts_matrices(self) -> bool:
        """Whether single matrices of a stack are too large to be computed whole, and need not be."""
        shape, axis = self.lies.shape, "in" if self.lies.turned else "out"
        large = len(shape) > 2 and torch.Size(shape[1:]).numel() > at_once()
        return large and all(isinstance(s, Adding) or (isinstance(s, Folding) and axis in axes_within(s.parts.p)) for s in self.steps)


def fold_within(pieces: Pieces, stack: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """Matrices of a stack, of each of which no more is in full precision than some rows.

    Args:
        first: the number of the first of them.
        dtype: of the result, which takes the room of what is given where it fits.
    """
    made = stack if stack.dtype == dtype else torch.empty_like(stack, dtype=dtype)
    turned = pieces.lies.turned
    for i, matrix in enumerate(stack):
        steps = [step.within(first + i, "in" if turned else "out") for step in pieces.steps if isinstance(step, (Adding, Folding))]
        for rows in slices(matrix.shape):
            w = pieces.lies.matrix(full(matrix[rows]))
            for step in steps:
                w, _ = step.fold(w, None, rows)
            made[i, rows].copy_(pieces.lies.matrix(w))
    return made
