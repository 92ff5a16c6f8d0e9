"""A linear layer with a trained matrix added to its frozen weight, as one autograd function.

Forward and backward pass multiply with a passing sum of the two, so the update costs nothing beside its own gradient. Saved is the
input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def linear_plus_matrix(x: Tensor, w: Tensor, bias: Tensor | None, d: Tensor, d_bias: Tensor | None, scale: float) -> Tensor:
    """``x (W + scale * d)' + bias + scale * d_bias``.

    Args:
        x: ``(*, in)``. w, d: ``(out, in)``. bias, d_bias: ``(out,)`` or None.
        scale: the factor in front of what is added.
    """
    dtype = compute_dtype(x, d)
    if takes_the_formula(x, w, bias) or not folding_pays(x.numel() // max(x.shape[-1], 1), w, dtype):
        y = F.linear(x, w, bias)
        return torch.add(y, F.linear(x.to(dtype), d.to(dtype), None if d_bias is None else d_bias.to(dtype)), alpha=scale).to(y.dtype)
    if d_bias is not None:
        bias = scale * d_bias if bias is None else torch.add(bias, d_bias, alpha=scale)
    if torch.is_grad_enabled():
        return _LinearPlusMatrix.apply(x, w, bias, d, scale)
    return linear(x, torch.add(w, d, alpha=scale), bias)


class _LinearPlusMatrix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, d: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, w, d)
        ctx.scale = scale
        return linear(x, torch.add(w, d, alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, d = ctx.saved_tensors
        rows = rows_of(g, w.dtype)
        dx = (rows @ torch.add(w, d, alpha=ctx.scale)).view(x.shape) if ctx.needs_input_grad[0] else None
        d_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return dx, None, d_bias, (rows.t() @ rows_of(x, w.dtype)) * ctx.scale if ctx.needs_input_grad[3] else None, None
