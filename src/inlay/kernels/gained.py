"""A linear layer with a frozen low-rank pair between trained gains, as one autograd function.

The gradients of both gains are sums over one product of the pair's size, ``M = u g`` with ``u = A x'``: that of the outer gain
``(M * B') d``, that of the inner ``(M * B') e``. So neither the pair nor what passes through it at the layer's own width needs a
gradient or is kept; saved is u, which layers with one input and one A have in common. Where there are more rows than the weight
has, the pair is added to a passing copy of the weight.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import draw_bits, factors
from .image import image
from .lowrank import accumulate, compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def linear_plus_gained(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, d: Tensor, e: Tensor, scale: float, rate: float
) -> Tensor:
    """``x W' + bias + scale * ((drop(x) A') * d) B' * e``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(r, in)``. b: ``(out, r)``. Both frozen.
        d: ``(r,)``. e: ``(out,)``. The trained gains.
        scale: the factor in front of the update.
        rate: share of ``x`` that the update leaves out, in [0, 1).
    """
    if takes_the_formula(x, w, bias):
        y = F.linear(x, w, bias)
        dropped = (F.dropout(x, rate) if rate else x).to(d.dtype)
        return torch.add(y, F.linear(F.linear(dropped, a) * d, b) * e, alpha=scale).to(y.dtype)
    bits, dtype = draw_bits(x, rate) if rate else None, compute_dtype(x, d)
    trains = torch.is_grad_enabled() and (d.requires_grad or e.requires_grad)
    u = image(x, a, dtype, rate, bits, common=True) if trains or not _folds(x, w, dtype, bits) else None
    if torch.is_grad_enabled():
        return _LinearPlusGained.apply(x, u, w, bias, a, b, d, e, scale, rate, bits)
    return _forward(x, u, w, bias, a, b, d, e, scale, bits)


def _forward(
    x: Tensor,
    u: Tensor | None,
    w: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    e: Tensor,
    scale: float,
    bits: Tensor | None,
) -> Tensor:
    dtype = compute_dtype(x, d)
    a, b, d, e = (t.to(dtype) for t in (a, b, d, e))
    if _folds(x, w, dtype, bits):
        return linear(x, torch.addmm(w, b * e.unsqueeze(1), a * d.unsqueeze(1), alpha=scale), bias)
    assert u is not None
    y = linear(x, w, bias)
    return accumulate(y.view(-1, y.shape[-1]), (u * d.unsqueeze(1)).t(), (b * e.unsqueeze(1)).t(), scale).view(y.shape)


def _folds(x: Tensor, w: Tensor, dtype: torch.dtype, bits: Tensor | None) -> bool:
    return bits is None and folding_pays(x.numel() // x.shape[-1], w, dtype)


class _LinearPlusGained(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        d: Tensor,
        e: Tensor,
        scale: float,
        rate: float,
        bits: Tensor | None,
    ) -> Tensor:
        y = _forward(x, u, w, bias, a, b, d, e, scale, bits)
        ctx.save_for_backward(w, a, b, d, e, u if any(ctx.needs_input_grad[6:8]) else None, bits)
        ctx.scale, ctx.rate, ctx.dtype = scale, rate, compute_dtype(x, d)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, a, b, d, e, u, bits = ctx.saved_tensors
        dtype, scale = ctx.dtype, ctx.scale
        a, b, inner, outer = (t.to(dtype) for t in (a, b, d, e))
        rows = rows_of(g, dtype)
        dx = dd = de = None
        if u is not None:
            sums = (u @ rows).mul_(b.t())
            dd, de = torch.mv(sums, outer).mul_(scale).to(d.dtype), torch.mv(sums.t(), inner).mul_(scale).to(e.dtype)
        if ctx.needs_input_grad[0]:
            dx = _input_gradient(rows_of(g, g.dtype), w, a * inner.unsqueeze(1), b * outer.unsqueeze(1), scale, ctx.rate, bits)
            dx = dx.view(*g.shape[:-1], a.shape[1])
        return dx, None, None, None, None, None, dd, de, None, None, None


def _input_gradient(g: Tensor, w: Tensor, a: Tensor, b: Tensor, scale: float, rate: float, bits: Tensor | None) -> Tensor:
    """``g W + scale * drop((g B) A)``."""
    if bits is None and g.dtype == a.dtype and folding_pays(len(g), w, a.dtype):
        return g @ torch.addmm(w, b, a, alpha=scale)
    dx, gu = g @ w.to(g.dtype), g.to(a.dtype) @ b
    if bits is None:
        return accumulate(dx, gu, a, scale)
    kept = factors(bits, rate, (len(g), a.shape[1]), a.dtype).mul_(gu @ a)
    return torch.add(dx, kept, alpha=scale).to(dx.dtype)
