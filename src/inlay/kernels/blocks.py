"""A linear layer with an update of low rank in each of k x k blocks, as one autograd function.

``a (k, in / k, r)`` takes each piece of the input to r numbers. Of those the j-th part, of r / k, is for the j-th piece of the output,
which ``b (k, r, out / k)`` makes of the parts from all pieces. Saved are the input and the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def exchanged(h: Tensor) -> Tensor:
    """The parts ``(k, *, r)`` by the piece of input as parts by the piece of output, and back."""
    k, *lead, r = h.shape
    return h.reshape(k, -1, k, r // k).permute(2, 1, 0, 3).reshape(k, *lead, r)


def pieces(x: Tensor, k: int) -> Tensor:
    """``x (n, width)`` as ``(k, n, width / k)``, a view."""
    return x.unflatten(-1, (k, -1)).transpose(0, 1)


def joined(x: Tensor) -> Tensor:
    """The inverse of `pieces`."""
    return x.transpose(0, 1).flatten(1)


def through_blocks(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The update on ``x (*, in)``: ``(*, out)``."""
    h = pieces(x.reshape(-1, x.shape[-1]), len(a)) @ a
    return joined(exchanged(h) @ b).view(*x.shape[:-1], -1)


def update_of_blocks(a: Tensor, b: Tensor) -> Tensor:
    """The update as a matrix ``(*batch, out, in)``, of ``a (*batch, k, in / k, r)`` and ``b (*batch, k, r, out / k)``.

    Of fewer pieces of the output, these are as many in ``b`` and parts of r in ``a``.
    """
    # (*batch, k of the output, k of the input, ...)
    left = b.unflatten(-2, (a.shape[-3], -1)).mT
    right = a.unflatten(-1, (b.shape[-3], -1)).movedim(-2, -4).mT
    return (left @ right).transpose(-3, -2).flatten(-2).flatten(-3, -2)


def linear_plus_blocks(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``x W' + bias`` and ``scale`` times the update on ``x``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(k, in / k, r)``. b: ``(k, r, out / k)``.
    """
    dtype = compute_dtype(x, a)
    if takes_the_formula(x, w, bias) or not torch.is_grad_enabled():
        y = F.linear(x, w, bias)
        return torch.add(y, through_blocks(x.to(dtype), a.to(dtype), b.to(dtype)), alpha=scale).to(y.dtype)
    return _LinearPlusBlocks.apply(x, w, bias, a.to(dtype), b.to(dtype), scale)


class _LinearPlusBlocks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        ctx.scale = scale
        rows = rows_of(x, a.dtype)
        if folding_pays(len(rows), w, a.dtype):
            return linear(x, torch.add(w, update_of_blocks(a, b), alpha=scale), bias)
        y = linear(x, w, bias)
        return y.add_(through_blocks(rows, a, b).view(y.shape), alpha=scale)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b = ctx.saved_tensors
        rows, inputs = rows_of(g, g.dtype), pieces(rows_of(x, a.dtype), len(a))
        low = pieces(rows.to(a.dtype), len(a))
        gh = exchanged(low @ b.mT) * ctx.scale
        db, da = exchanged(inputs @ a).mT @ low * ctx.scale, inputs.mT @ gh
        if rows.dtype == a.dtype and folding_pays(len(rows), w, a.dtype):
            dx = rows @ torch.add(w, update_of_blocks(a, b), alpha=ctx.scale)
        else:
            dx = (rows @ w.to(rows.dtype) + joined(gh @ a.mT)).to(rows.dtype)
        return dx.view(x.shape), None, None, da, db, None
