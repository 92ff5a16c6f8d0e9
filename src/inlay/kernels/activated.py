"""A linear layer with a low-rank update of some of its tokens, as one autograd function.

The update costs what its tokens cost, on the way back as well: their gradient is added to that of the input in place. Kept for the
backward pass are the tokens, or the input where that is less, since layers with one input share it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lowrank import compute_dtype, linear, rows_of

# From this share of the tokens on the input is kept: the seven layers of a block have four inputs.
MOST = 2 / 3


def linear_plus_tokens(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, index: Tensor) -> Tensor:
    """``x W' + bias``, and ``scale * x A' B'`` on top for some tokens.

    Args:
        x: ``(*, in)``. w: ``(out, in)``, frozen as the bias is.
        a: ``(r, in)``. b: ``(out, r)``. scale: the factor in front of the update.
        index: the tokens, as positions in ``x`` without its last axis, each at most once.
    """
    return _LinearPlusTokens.apply(x, rows_of(x, x.dtype).index_select(0, index), w, bias, a, b, scale, index)


def _add_rows(y: Tensor, index: Tensor, rows: Tensor, scale: float = 1.0) -> None:
    """``y[index] += scale * rows`` in the dtype of the rows, rounded once."""
    if y.dtype == rows.dtype:
        y.index_add_(0, index, rows, alpha=scale)
    else:
        y.index_copy_(0, index, torch.add(y.index_select(0, index), rows, alpha=scale).to(y.dtype))


class _LinearPlusTokens(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, chosen: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, index: Tensor
    ) -> Tensor:
        dtype = compute_dtype(x, a)
        y = linear(x, w, bias)
        # With the long axis last the narrow product runs faster (see `kernels.lowrank`).
        u = a.to(dtype) @ chosen.to(dtype).t()
        _add_rows(y.view(-1, y.shape[-1]), index, u.t() @ b.to(dtype).t(), scale)
        ctx.whole = len(index) * x.shape[-1] > MOST * x.numel()
        ctx.save_for_backward(x if ctx.whole else chosen, w, a, b, index)
        ctx.scale, ctx.dtype = scale, dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        kept, w, a, b, index = ctx.saved_tensors
        x_trains, _, _, _, a_trains, b_trains, *_ = ctx.needs_input_grad
        low = rows_of(g, g.dtype).index_select(0, index).to(ctx.dtype)
        chosen = (rows_of(kept, kept.dtype).index_select(0, index) if ctx.whole else kept).to(ctx.dtype)
        a, b = a.to(ctx.dtype), b.to(ctx.dtype)
        gu = (b.t() @ low.t()) * ctx.scale
        da = gu @ chosen if a_trains else None
        db = ((a @ chosen.t()) @ low).t() * ctx.scale if b_trains else None
        dx = found = None
        if x_trains:
            dx, found = g @ w.to(g.dtype), gu.t() @ a
            if not torch.is_grad_enabled():
                # The tokens are part of x, so that their gradient may as well go there at once.
                _add_rows(dx.view(-1, dx.shape[-1]), index, found)
                found = None
        return dx, found, None, None, da, db, None, None
