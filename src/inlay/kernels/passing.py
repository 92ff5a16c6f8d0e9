"""Linear layers that multiply with a passing copy of their weight: made in the forward pass, and made again for the backward one.

Only the input and the parameters are saved, whatever the copy is computed by.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import compute_dtype, folding_pays, linear, rows_of, takes_the_formula

Fold = Callable[..., tuple[Tensor, Tensor | None]]


# ---- any map of the weight -----------------------------------------------------------------------------------------------------
def linear_through(x: Tensor, w: Tensor, bias: Tensor | None, fold: Fold, *params: Tensor) -> Tensor:
    """``x W2' + bias2`` with ``W2, bias2 = fold(W, bias, *params)``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. params: all that `fold` trains.
    """
    exact = w.dtype == params[0].dtype and not torch.is_autocast_enabled(x.device.type)
    if takes_the_formula(x, w, bias) or not exact or not torch.is_grad_enabled():
        with torch.autocast(x.device.type, enabled=False):
            raised = w.dtype if w.dtype.itemsize > 2 else torch.float32
            w2, b2 = fold(w.to(raised), None if bias is None else bias.to(raised), *(q.to(raised) for q in params))
        return F.linear(x, w2.to(w.dtype), None if b2 is None else b2.to(w.dtype))
    return _LinearThrough.apply(x, w, bias, fold, *params)


class _LinearThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, fold: Fold, *params: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, bias, *params)
        ctx.fold = fold
        return linear(x, *fold(w, bias, *params))

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, *params = ctx.saved_tensors
        again = torch.is_grad_enabled()
        rows, inputs = rows_of(g, w.dtype), rows_of(x, w.dtype)
        with torch.enable_grad():
            own = params if again else [q.detach().requires_grad_(q.requires_grad) for q in params]
            folded = [t for t in ctx.fold(w, bias, *own) if t is not None]
        dx = rows @ folded[0]
        parts = [(folded[0], rows.t() @ inputs), *((b, rows.sum(0)) for b in folded[1:])]
        parts = [(t, d) for t, d in parts if t.requires_grad]
        wanted = [q for q in own if q.requires_grad]
        found = iter(torch.autograd.grad([t for t, _ in parts], wanted, [d for _, d in parts], allow_unused=True, create_graph=again))
        return dx.view(x.shape), None, None, None, *(next(found) if q.requires_grad else None for q in own)


# ---- one block side by side ----------------------------------------------------------------------------------------------------
def sums_of_shards(x: Tensor, length: int) -> Tensor:
    """The sums of pieces of ``x (*, in)`` of one length, the last filled with zeros: ``(*, length)``."""
    rest = -x.shape[-1] % length
    return (F.pad(x, (0, rest)) if rest else x).unflatten(-1, (-1, length)).sum(-2)


def side_by_side(block: Tensor, width: int) -> Tensor:
    """``[E E ... E]``, cut at the width."""
    length = block.shape[-1]
    return block.repeat(*(1 for _ in block.shape[:-1]), -(-width // length))[..., :width]


def linear_plus_shards(x: Tensor, w: Tensor, bias: Tensor | None, block: Tensor, scale: float) -> Tensor:
    """``x W' + bias + scale * x [E E ... E]'``. Kept in place of the input are its sums.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. block: ``E (out, r)``.
    """
    if takes_the_formula(x, w, bias) or w.dtype != compute_dtype(x, block):
        y = F.linear(x, w, bias)
        sums = sums_of_shards(x.to(compute_dtype(x, block)), block.shape[-1])
        return torch.add(y, F.linear(sums, block), alpha=scale).to(y.dtype)
    if torch.is_grad_enabled():
        # Autograd knows how the sums come from the input, of which it keeps nothing for that: see `kernels.image`.
        return _LinearPlusShards.apply(x, rows_of(sums_of_shards(x, block.shape[-1]), w.dtype), w, bias, block, scale)
    return linear(x, _with_shards(w, block, scale), bias)


def _with_shards(w: Tensor, block: Tensor, scale: float) -> Tensor:
    return torch.add(w, side_by_side(block, w.shape[1]), alpha=scale)


class _LinearPlusShards(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, sums: Tensor, w: Tensor, bias: Tensor | None, block: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(sums, w, block)
        ctx.scale = scale
        rows = len(sums)
        if folding_pays(rows, w, w.dtype):
            return linear(x, _with_shards(w, block, scale), bias)
        y = linear(x, w, bias)
        y.view(rows, -1).addmm_(sums, block.t(), alpha=scale)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        sums, w, block = ctx.saved_tensors
        rows, width = rows_of(g, w.dtype), w.shape[1]
        dx = rows @ _with_shards(w, block, ctx.scale)
        dblock = (rows.t() @ sums).mul_(ctx.scale) if ctx.needs_input_grad[4] else None
        return dx.view(*g.shape[:-1], width), None, None, None, dblock, None
