"""An adapter in pieces: as if its layer had some rows, some columns or some matrices, so that a weight is folded piece by piece."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .additive import Additive, LowRank

if TYPE_CHECKING:
    from .adapter import Adapter
    from .method import Method

# Where an axis is in the weight, and what declarations call it.
PLACES = {"out": -2, "in": -1, "batch": 0}
NAMES = {"out": ("out", "channel"), "in": ("in", "feature")}


def axes_apart(p: Adapter) -> tuple[str, ...]:
    """The axes along which an adapter can be taken to pieces: ``"out"``, ``"in"``, or ``"batch"`` alone for a stack."""
    return _axes(p, p.method.apart(p.site))


def axes_within(p: Adapter) -> tuple[str, ...]:
    """The same for a single matrix of a stack: it is a piece of the stack, which can be taken to pieces once more."""
    return () if p.trained_bias is not None or p.site.bias() is not None else p.method.apart(p.site)


def _axes(p: Adapter, found: tuple[str, ...]) -> tuple[str, ...]:
    return ("batch",) if found and p.site.batch else found


def blocks_of(p: Adapter, height: int) -> tuple[slice, slice]:
    """Of blocks of so many rows those that hold the adapter's rows, and where these are in them."""
    start, stop = p.first_row, p.first_row + p.site.size("out")
    first = start // height
    return slice(first, -(-stop // height)), slice(start - first * height, stop - first * height)


class Parts:
    """The pieces of an adapter, which take no more memory than they are large.

    What is declared along the axis is cut. What else depends on where a piece is, a method finds by `Adapter.first_row` and
    `Adapter.whole`. What an additive method adds is made once and cut, where it does not follow from cut tensors.

    Args:
        axis: one of `axes_apart`, or of `axes_within`.
    """

    def __init__(self, p: Adapter, axis: str) -> None:
        self.p, self.axis, self.size = p, axis, p.site.shape[PLACES[axis]]
        # What stands for the methods of an additive one, and the axes of its tensors.
        self.made: dict[str, tuple[Any, tuple[Any, ...]]] = {}
        method = p.method
        if not isinstance(method, Additive):
            return
        cut = method.delta_apart(p.site)
        # Where a fold does without `delta`, there is nothing to be made of it.
        if axis in _axes(p, cut) or (axis in cut and type(method).fold is not Additive.fold):
            return
        self.made["delta_bias"] = method.delta_bias(p), ("out",)
        if isinstance(method, LowRank) and type(method).delta is LowRank.delta:
            self.made["factors"] = method.factors(p), (("rank", "in"), ("out", "rank"))
        else:
            self.made["delta"] = method.delta(p), ("out", "in")

    def __getitem__(self, piece: slice) -> Adapter:
        p, site, found = self.p, copy.copy(self.p.site), copy.copy(self.p)
        if piece.stop - piece.start == self.size:
            return p
        shape = list(p.site.shape)
        shape[PLACES[self.axis]] = piece.stop - piece.start

        def read() -> tuple[Tensor, Tensor | None]:
            w, b = p.site.read()
            return self._cut(w, ("out", "in"), piece), None if b is None else self._cut(b, ("out",), piece)

        vars(site).update(_shape=torch.Size(shape), read=read)
        found.site, found._whole, found.method = site, p.whole, self._method(piece)
        if self.axis == "out":
            found.first_row = piece.start
        vars(found)["_declared"] = p.declared
        found._parameters = {
            name: None if q is None else nn.Parameter(self._own(name, q, piece), requires_grad=False) for name, q in p._parameters.items()
        }
        found._buffers = {name: None if t is None else self._own(name, t, piece) for name, t in p._buffers.items()}
        return found

    def _method(self, piece: slice) -> Method:
        if not self.made:
            return self.p.method
        method: Any = copy.copy(self.p.method)
        for name, (whole, axes) in self.made.items():
            if isinstance(whole, tuple):
                found: Any = tuple(self._cut(t, own, piece) for t, own in zip(whole, axes, strict=True))
            else:
                found = None if whole is None else self._cut(whole, axes, piece)
            vars(method)[name] = lambda _, found=found: found
        if "delta" in self.made:
            # A cheaper way to add it than to make it would start from the tensors again.
            vars(method)["plus_delta"] = partial(Additive.plus_delta, method)
        return method

    def _own(self, name: str, t: Tensor, piece: slice) -> Tensor:
        """A piece of a tensor of the adapter; a bias (which nobody declares) has one number a row."""
        param = self.p.declared.get(name)
        if param is not None and self.axis == "batch" and not param.batched:
            return t
        return self._cut(t, ("out",) if param is None else param.axes, piece)

    def _cut(self, t: Tensor, axes: tuple[Any, ...], piece: slice) -> Tensor:
        """A piece of a tensor that has these axes behind those of a stack."""
        if self.axis == "batch":
            return t[piece]
        at = next((i for i, name in enumerate(axes) if name in NAMES[self.axis]), None)
        # What a stack has in front of these axes stays.
        return t if at is None else t.narrow(at - len(axes), piece.start, piece.stop - piece.start)
