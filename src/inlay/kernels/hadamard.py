"""A linear layer with LoHa's update ``(A1 B1) * (A2 B2)``, as one autograd function.

Forward and backward pass multiply with a passing copy of the weight that has the update in it, so neither costs more than the
frozen layer's. What remains are the gradients of the factors. They come from ``G = g' x``, which costs half of the frozen layer, or
from the update's factors of rank r^2 (Khatri-Rao), whichever is cheaper. Saved are the input and the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import compute_dtype, folding_pays, linear, linear_plus_low_rank, rows_of, takes_the_formula


def hadamard(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> Tensor:
    """``(a1 b1) * (a2 b2)`` with ``a (*, out, r)`` and ``b (*, r, in)``."""
    return (a1 @ b1) * (a2 @ b2)


def khatri_rao(a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, Tensor]:
    """``A (*, r^2, in)`` and ``B (*, out, r^2)`` with ``B A = (a1 b1) * (a2 b2)``."""
    right = (b1.unsqueeze(-2) * b2.unsqueeze(-3)).flatten(-3, -2)
    left = (a1.unsqueeze(-1) * a2.unsqueeze(-2)).flatten(-2)
    return right, left


def linear_plus_hadamard(
    x: Tensor, w: Tensor, bias: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float, rate: float
) -> Tensor:
    """``x W' + bias + scale * drop(x) ((a1 b1) * (a2 b2))'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a1, a2: ``(out, r)``. b1, b2: ``(r, in)``.
        scale: the factor in front of the update.
        rate: share of ``x`` that the update leaves out, in [0, 1).
    """
    out, inp = w.shape
    rows = x.numel() // max(x.shape[-1], 1)
    if rate or takes_the_formula(x, w, bias) or not folding_pays(rows, w, compute_dtype(x, a1)):
        if a1.shape[1] ** 2 * (out + inp) < out * inp:
            return linear_plus_low_rank(x, w, bias, *khatri_rao(a1, b1, a2, b2), scale, rate)
        y = F.linear(x, w, bias)
        dropped = (F.dropout(x, rate) if rate else x).to(compute_dtype(x, a1))
        return torch.add(y, F.linear(dropped, hadamard(a1, b1, a2, b2)), alpha=scale).to(y.dtype)
    if torch.is_grad_enabled():
        return _LinearPlusHadamard.apply(x, w, bias, a1, b1, a2, b2, scale)
    return linear(x, _folded(w, a1, b1, a2, b2, scale), bias)


def _folded(w: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float) -> Tensor:
    return torch.addcmul(w, a1 @ b1, a2 @ b2, value=scale)


class _LinearPlusHadamard(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, w, a1, b1, a2, b2)
        ctx.scale = scale
        return linear(x, _folded(w, a1, b1, a2, b2, scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a1, b1, a2, b2 = ctx.saved_tensors
        rows, inputs = rows_of(g, w.dtype), rows_of(x, w.dtype)
        one, other = a1 @ b1, a2 @ b2
        dx = (rows @ torch.addcmul(w, one, other, value=ctx.scale)).view(x.shape) if ctx.needs_input_grad[0] else None
        r, (out, inp) = a1.shape[1], w.shape
        if 2 * r**2 * (out + inp) < out * inp:
            found = _by_factors(rows, inputs, a1, b1, a2, b2)
        else:
            d = rows.t() @ inputs
            d_one, d_other = d * other, d * one
            found = d_one @ b1.t(), a1.t() @ d_one, d_other @ b2.t(), a2.t() @ d_other
        return dx, None, None, *(d * ctx.scale for d in found), None


def _by_factors(g: Tensor, x: Tensor, a1: Tensor, b1: Tensor, a2: Tensor, b2: Tensor) -> tuple[Tensor, ...]:
    """The factors' gradients from ``g (n, out)`` and ``x (n, in)`` by way of those of rank r^2, whose long axes go last."""
    r = a1.shape[1]
    right, left = khatri_rao(a1, b1, a2, b2)
    d_left = (right @ x.t() @ g).view(r, r, -1)
    d_right = (left.t() @ g.t() @ x).view(r, r, -1)
    a1, a2 = a1.t(), a2.t()
    return (d_left * a2).sum(1).t(), (d_right * b2).sum(1), (d_left * a1.unsqueeze(1)).sum(0).t(), (d_right * b1.unsqueeze(1)).sum(0)
