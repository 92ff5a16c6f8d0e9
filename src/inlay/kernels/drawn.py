"""A linear layer with a frozen low-rank pair whose middle is drawn from a distribution, as one autograd function.

With ``u = A x'`` for the means' and the variances' half, the middle is ``h = d1 u1 + t`` with ``t = noise exp(d2 u2 / 2)``. Kept are
u, which layers with one input and one A have in common, t, and ``h' B'`` for the gradient of the outer gain, which would cost as much
to compute again as it did the first time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .image import image
from .lowrank import accumulate, compute_dtype, linear, rows_of

Draw = Callable[[Tensor], Tensor]


def linear_plus_drawn(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, d: Tensor, e: Tensor, draw: Draw, scale: float
) -> Tensor:
    """``x W' + bias + scale * (m + noise exp(v / 2)) B' * e`` with m and v the halves of ``(x A') * d``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(2 r, in)``. b: ``(out, r)``. Both frozen.
        d: ``(2 r,)``. e: ``(out,)``. The trained gains.
        draw: the noise for a tensor ``(*, r)``.
        scale: the factor in front of the update.
    """
    return _LinearPlusDrawn.apply(x, image(x, a, compute_dtype(x, d), common=True), w, bias, a, b, d, e, draw, scale)


class _LinearPlusDrawn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, u: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, d: Tensor, e: Tensor, draw: Draw, scale: float
    ) -> Tensor:
        dtype, r = u.dtype, b.shape[1]
        gains = d.to(dtype).unsqueeze(1)
        noise = draw(x.new_empty((1,), dtype=dtype).expand(*x.shape[:-1], r)).reshape(-1, r).t()
        t = (u[r:] * (gains[r:] / 2)).exp_().mul_(noise)
        y = linear(x, w, bias)
        through = torch.addcmul(t, u[:r], gains[:r]).t() @ b.to(dtype).t()
        flat = y.view(-1, y.shape[-1])
        flat.copy_(torch.addcmul(flat, through, e.to(dtype), value=scale))
        ctx.save_for_backward(w, a, b, d, e, u, t, through if ctx.needs_input_grad[7] else None)
        ctx.scale = scale
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        w, a, b, d, e, u, t, through = ctx.saved_tensors
        dtype, r = u.dtype, b.shape[1]
        gains, rows = d.to(dtype).unsqueeze(1), rows_of(g, dtype)
        dx = dd = de = None
        if torch.is_grad_enabled():
            # The same numbers, as functions of what they came from.
            power = u[r:] * (gains[r:] / 2)
            t = t * (power - power.detach()).exp()
            through = None if through is None else torch.addcmul(t, u[:r], gains[:r]).t() @ b.to(dtype).t()
        outer = _scaled(b, e, dtype)
        if through is not None:
            de = (rows * through).sum(0).mul_(ctx.scale).to(e.dtype)
        # The gradients of u1 d1 and of u2 d2.
        inner = (outer.t().contiguous() @ rows.t()).mul_(ctx.scale)
        inner = torch.cat((inner, (inner * t).mul_(0.5)))
        if ctx.needs_input_grad[6]:
            dd = (inner * u).sum(1).to(d.dtype)
        if ctx.needs_input_grad[0]:
            own, right = rows_of(g, g.dtype), a.to(dtype) * gains
            if own.dtype == w.dtype == dtype and dtype.itemsize > 2 and len(w) < len(own):
                # The mean is linear in the input, and goes into a passing copy of the weight.
                dx, inner, right = own @ torch.addmm(w, outer, right[:r], alpha=ctx.scale), inner[r:], right[r:]
            else:
                dx = own @ w.to(own.dtype)
            dx = accumulate(dx, inner.t(), right).view(*g.shape[:-1], a.shape[1])
        return dx, None, None, None, None, None, dd, de, None, None


def _scaled(b: Tensor, e: Tensor, dtype: torch.dtype) -> Tensor:
    return b.to(dtype) * e.to(dtype).unsqueeze(1)
