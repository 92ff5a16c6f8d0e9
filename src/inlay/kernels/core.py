"""A linear layer with an update ``B C A`` of which the small core ``C``, and perhaps ``B``, is trained, as one autograd function.

Kept for their gradients are the inputs' coordinates ``A x``, of rank r, and not the input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .image import image
from .lowrank import accumulate, compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def linear_plus_core(
    x: Tensor, dropped: Tensor | None, w: Tensor, bias: Tensor | None, a: Tensor, core: Tensor, b: Tensor, scale: float
) -> Tensor:
    """``x W' + bias + scale * x A' C' B'``.

    Args:
        x: ``(*, in)``. dropped: what the update takes in place of ``x``, or None. w: ``(out, in)``. bias: ``(out,)`` or None.
        a: ``(r, in)``, frozen. core: ``(k, r)``. b: ``(out, k)``.
        scale: the factor in front of the update.
    """
    dtype = compute_dtype(x, core)
    if dropped is not None or takes_the_formula(x, w, bias):
        y = F.linear(x, w, bias)
        inputs = (x if dropped is None else dropped).to(core.dtype)
        return torch.add(y, F.linear(F.linear(F.linear(inputs, a.to(core.dtype)), core), b.to(core.dtype)), alpha=scale).to(y.dtype)
    a, core, b = a.to(dtype), core.to(dtype), b.to(dtype)
    u = image(x, a, dtype)
    if torch.is_grad_enabled():
        return _LinearPlusCore.apply(x, u, w, bias, a, core, b, scale)
    return _forward(x, u, w, bias, a, core, b, scale)


def _forward(x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, core: Tensor, b: Tensor, scale: float) -> Tensor:
    if folding_pays(u.shape[1], w, a.dtype):
        return linear(x, torch.addmm(w, b, core @ a, alpha=scale), bias)
    y = linear(x, w, bias)
    accumulate(y.view(-1, y.shape[-1]), (core @ u).t(), b.t().contiguous(), scale)
    return y


class _LinearPlusCore(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, core: Tensor, b: Tensor, scale: float) -> Tensor:
        y = _forward(x, u, w, bias, a, core, b, scale)
        ctx.save_for_backward(u, w, a, core, b)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        u, w, a, core, b = ctx.saved_tensors
        rows = rows_of(g, g.dtype)
        gu = (b.t().contiguous() @ rows.to(a.dtype).t()).mul_(ctx.scale)
        if rows.dtype == a.dtype and folding_pays(len(rows), w, a.dtype):
            dx = rows @ torch.addmm(w, b, core @ a, alpha=ctx.scale)
        else:
            dx = accumulate(rows @ w.to(rows.dtype), (core.t() @ gu).t(), a)
        db = (core @ u @ rows.to(a.dtype)).mul_(ctx.scale).t() if ctx.needs_input_grad[6] else None
        return dx.view(*g.shape[:-1], w.shape[1]), None, None, None, None, gu @ u.t(), db, None
