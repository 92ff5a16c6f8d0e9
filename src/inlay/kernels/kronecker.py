"""A linear layer with LoKr's update ``kron(w1, w2)``, as one autograd function.

With ``out = l k`` and ``in = m q``, w1 is ``(l, m)`` and w2 ``(k, q)`` is either given whole or as ``a (k, r)`` times ``b (r, q)``. On an
input seen as ``X (m, q)`` the update is ``w1 X w2'``. Where there are many rows, forward and backward pass multiply with a passing
copy of the weight that has the update in it instead. The gradients of the factors need neither: they come from ``b X'`` and ``a' G'``,
kept as ``(r, n m)`` and ``(r, n l)`` for a moment, so that all products walk along their long axis. Saved are the input and the factors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def kronecker(w1: Tensor, w2: Tensor) -> Tensor:
    """``(*, l k, m q)`` from ``w1 (*, l, m)`` and ``w2 (*, k, q)``."""
    return (w1[..., :, None, :, None] * w2[..., None, :, None, :]).flatten(-4, -3).flatten(-2)


def plus_kronecker(w: Tensor, w1: Tensor, w2: Tensor, scale: float) -> Tensor:
    """``w + scale * kron(w1, w2)``, in one pass."""
    (rows, columns), within = w1.shape[-2:], w2.shape[-2:]
    blocks = w.unflatten(-1, (columns, within[1])).unflatten(-3, (rows, within[0]))
    return torch.addcmul(blocks, w1[..., :, None, :, None], w2[..., None, :, None, :], value=scale).reshape(w.shape)


def times_kronecker(x: Tensor, w1: Tensor, a: Tensor, b: Tensor | None) -> Tensor:
    """``x kron(w1, a b)'`` for ``x (*, m q)``; a alone is w2 where b is None."""
    u = x.unflatten(-1, (w1.shape[1], -1))
    u = u if b is None else F.linear(u, b)
    return F.linear(w1 @ u, a).flatten(-2)


def linear_plus_kronecker(
    x: Tensor, w: Tensor, bias: Tensor | None, w1: Tensor, a: Tensor, b: Tensor | None, kept: Tensor | None, scale: float, rate: float
) -> Tensor:
    """``x W' + bias + scale * kept * drop(x) kron(w1, a b)'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None.
        w1, a, b: the factors; a is ``w2 (k, q)`` where b is None.
        kept: what each row of the update is multiplied with, ``(out,)``, or None.
        scale: the factor in front of the update.
        rate: share of ``x`` that the update leaves out, in [0, 1).
    """
    dtype = compute_dtype(x, w1)
    rows = x.numel() // max(x.shape[-1], 1)
    if rate or takes_the_formula(x, w, bias) or not folding_pays(rows, w, dtype):
        y = F.linear(x, w, bias)
        x = (F.dropout(x, rate) if rate else x).to(dtype)
        h = times_kronecker(x, w1.to(dtype), a.to(dtype), None if b is None else b.to(dtype))
        return torch.add(y, h if kept is None else h * kept, alpha=scale).to(y.dtype)
    if torch.is_grad_enabled():
        return _LinearPlusKronecker.apply(x, w, bias, w1, a, b, kept, scale)
    return linear(x, _folded(w, w1, a, b, kept, scale), bias)


def _folded(w: Tensor, w1: Tensor, a: Tensor, b: Tensor | None, kept: Tensor | None, scale: float) -> Tensor:
    """``W + scale * kept * kron(w1, a b)``."""
    (l, m), k = w1.shape, len(a)  # noqa: E741
    w2 = (a if b is None else a @ b).unsqueeze(0)
    if kept is not None:
        w2 = w2 * kept.view(l, k, 1)
    return torch.addcmul(w.view(l, k, m, -1), w1[:, None, :, None], w2.unsqueeze(2), value=scale).view(w.shape)


class _LinearPlusKronecker(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, w1: Tensor, a: Tensor, b: Tensor | None, kept: Tensor | None, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, w, w1, a, b, kept)
        ctx.scale = scale
        return linear(x, _folded(w, w1, a, b, kept, scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, w1, a, b, kept = ctx.saved_tensors
        rows = rows_of(g, w.dtype)
        dx = (rows @ _folded(w, w1, a, b, kept, ctx.scale)).view(x.shape) if ctx.needs_input_grad[0] else None
        rows = rows if kept is None else rows * kept
        dw1, da, db = _gradients(rows.reshape(-1, len(a)), rows_of(x, w.dtype).reshape(-1, w.shape[1] // w1.shape[1]), w1, a, b)
        return dx, None, None, dw1 * ctx.scale, da * ctx.scale, None if db is None else db * ctx.scale, None, None


def _gradients(g: Tensor, x: Tensor, w1: Tensor, a: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Of w1, a and b, from ``g (n l, k)`` and ``x (n m, q)``."""
    l, m = w1.shape  # noqa: E741
    u = x.t().contiguous() if b is None else b @ x.t()
    h = a.t() @ g.t()
    by_row_u, by_row_h = u.view(-1, m), h.view(-1, l)
    da = ((by_row_u @ w1.t()).view(len(h), -1) @ g).t()
    db = None if b is None else (by_row_h @ w1).view(len(u), -1) @ x
    return by_row_h.t() @ by_row_u, da, db
