"""A linear layer under weight decomposition (DoRA), as one autograd function.

    y = gain * z + bias,   z = x V',   V = W + scale * B A

The gradients of x, A and B are those of a low-rank update ``(gain * B) A`` of ``gain * W``. That of the gain is ``sum(g * z)``
over the rows of the batch, and ``z = (y - bias) / gain`` is had from the output. It is kept without a copy, and as often as not
the next operation keeps it anyway.

Dropout, as HF peft has it, leaves ``x W'`` and what is added to it with one mask on their inputs:

    y = x W' + bias + (gain - 1) * z + scale * d A' B',   z = d V',   d = drop(x)

That is two products of the frozen layer's size each way. Kept are x, z and an eighth of a byte an element for the mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ..core.method import full
from .dropout import draw_bits, factors
from .lowrank import accumulate, compute_dtype, folding_pays, linear, rows_of, takes_the_formula


def linear_decomposed(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float, rate: float = 0.0
) -> Tensor:
    """``gain * (x W' + scale * x A' B') + bias``; with dropout what differs from ``x W' + bias`` in it has ``drop(x)`` for ``x``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(r, in)``. b: ``(out, r)``. gain: ``(out,)``.
        scale: the factor in front of the update.
        rate: share of ``x`` that is left out, in [0, 1).

    Returns:
        ``(*, out)`` in the dtype of the base's output.
    """
    if rate:
        return _with_dropout(x, w, bias, a, b, gain, scale, rate)
    if takes_the_formula(x, w, bias):
        y = F.linear(x, w)
        z = gain * torch.add(y, F.linear(F.linear(x.to(a.dtype), a), b), alpha=scale)
        return (z if bias is None else z + bias).to(y.dtype)
    if torch.is_grad_enabled():
        return _LinearDecomposed.apply(x, w, bias, a, b, gain, scale)
    return _forward(x, w, bias, a, b, gain, scale)


def _forward(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float) -> Tensor:
    dtype = compute_dtype(x, a)
    rows = rows_of(x, dtype)
    if folding_pays(len(rows), w, dtype):
        return linear(x, _folded(w, a, b, gain, scale), bias)
    y = linear(x, w, None)
    z = _unscaled(y.view(-1, y.shape[-1]), rows, a.to(dtype), b.to(dtype), scale).mul_(gain)
    if bias is not None:
        z.add_(bias)
    return y.copy_(z.view(y.shape)) if z.dtype != y.dtype else y


def _unscaled(y: Tensor, rows: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``z``, from ``y = x W'``: written over it, or apart where the update is more precise."""
    return y.to(a.dtype).addmm_((a @ rows.t()).t(), b.t().contiguous(), alpha=scale)


def _folded(w: Tensor, a: Tensor, b: Tensor, gain: Tensor, scale: float) -> Tensor:
    """``gain * V``."""
    gain = gain.unsqueeze(1)
    return (w * gain).addmm_(b * gain, a, alpha=scale)


def probe(y: Tensor) -> Tensor:
    """An empty tensor whose version counts the writes to ``y``, and which does not keep its memory."""
    probe = y.detach()
    probe.data = y.new_empty(0)
    return probe


def gain_gradient(g: Tensor, y: Tensor, bias: Tensor | None, gain: Tensor) -> Tensor:
    """The sums of ``g z`` over the rows of the batch, from the output ``y = gain * z + bias``."""
    sums = torch.linalg.vecdot(g, y, dim=0)
    return (sums if bias is None else sums - bias * g.sum(0)) / gain


class _LinearDecomposed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float) -> Tensor:
        y = _forward(x, w, bias, a, b, gain, scale)
        # Autograd refuses a backward pass after an in-place operation on a tensor that it keeps, such as a ReLU on this output.
        # So it gets an alias, and whether that was written to is looked up here.
        ctx.save_for_backward(x, w, bias, a, b, gain, y.data if ctx.needs_input_grad[5] else None)
        ctx.probe, ctx.version, ctx.scale, ctx.dtype = probe(y), y._version, scale, compute_dtype(x, a)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, a, b, gain, y = ctx.saved_tensors
        x_trains, _, _, a_trains, b_trains, gain_trains, *_ = ctx.needs_input_grad
        dx = da = db = dgain = None
        a, b, gain = a.to(ctx.dtype), b.to(ctx.dtype), gain.to(ctx.dtype)
        rows, low, inputs = rows_of(g, g.dtype), rows_of(g, ctx.dtype), rows_of(x, ctx.dtype)
        # gu' = scale (gain B)' g'
        gu = ((b * gain.unsqueeze(1)).t().contiguous() @ low.t()).mul_(ctx.scale)
        if a_trains:
            da = gu @ inputs
        if b_trains:
            db = (a @ inputs.t() @ low).t() * (gain * ctx.scale).unsqueeze(1)
        if gain_trains:
            overwritten = ctx.probe._version != ctx.version
            if overwritten or torch.is_grad_enabled() or not gain.all():
                z = _unscaled(rows_of(x, rows.dtype) @ w.to(rows.dtype).t(), inputs, a, b, ctx.scale)
                dgain = torch.linalg.vecdot(low, z, dim=0)
            else:
                dgain = gain_gradient(low, rows_of(y, low.dtype), bias, gain)
        if x_trains:
            if rows.dtype == ctx.dtype and folding_pays(len(rows), w, ctx.dtype):
                dx = rows @ _folded(w, a, b, gain, ctx.scale)
            else:
                dx = accumulate((low * gain).to(rows.dtype) @ w.to(rows.dtype), gu.t(), a)
            dx = dx.view(*g.shape[:-1], a.shape[1])
        return dx, None, None, da, db, dgain, None


# ---- with dropout --------------------------------------------------------------------------------------------------------
def _with_dropout(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float, rate: float) -> Tensor:
    if takes_the_formula(x, w, bias):
        y, dropped = F.linear(x, w, bias), F.dropout(x, rate)
        h = F.linear(F.linear(dropped.to(a.dtype), a), b)
        return (y + (gain - 1) * F.linear(dropped, w) + gain * scale * h).to(y.dtype)
    bits = draw_bits(x, rate)
    if torch.is_grad_enabled():
        return _LinearDecomposedDropped.apply(x, w, bias, a, b, gain, scale, rate, bits)
    return _forward_dropped(x, w, bias, a, b, gain, scale, rate, bits)[0]


def _forward_dropped(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor, scale: float, rate: float, bits: Tensor
) -> tuple[Tensor, Tensor]:
    """The output, and ``z`` in its dtype."""
    dtype = compute_dtype(x, a)
    rows = rows_of(x, dtype)
    dropped = factors(bits, rate, rows.shape, dtype).mul_(rows)
    y = linear(x, w, bias)
    a, b = a.to(dtype), b.to(dtype)
    update = (a @ dropped.t()).t(), b.t().contiguous()
    plain = F.linear(dropped.to(x.dtype), w)
    z = plain.to(dtype).addmm_(*update, alpha=scale)
    flat = y.view(-1, y.shape[-1])
    total = flat.to(dtype).addcmul_(z, (gain - 1).to(dtype)).addmm_(*update, alpha=scale)
    if total.dtype != y.dtype:
        flat.copy_(total)
    return y, z.to(y.dtype)


class _LinearDecomposedDropped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        gain: Tensor,
        scale: float,
        rate: float,
        bits: Tensor,
    ) -> Tensor:
        y, z = _forward_dropped(x, w, bias, a, b, gain, scale, rate, bits)
        ctx.save_for_backward(x, w, a, b, gain, z if ctx.needs_input_grad[5] else None, bits)
        ctx.scale, ctx.rate, ctx.dtype = scale, rate, compute_dtype(x, a)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, gain, z, bits = ctx.saved_tensors
        x_trains, _, _, a_trains, b_trains, gain_trains, *_ = ctx.needs_input_grad
        dx = da = db = dgain = None
        a, b, gain = a.to(ctx.dtype), b.to(ctx.dtype), gain.to(ctx.dtype)
        rows, low = rows_of(g, g.dtype), rows_of(g, ctx.dtype)
        keep = factors(bits, ctx.rate, (len(rows), w.shape[1]), ctx.dtype)
        dropped = keep * rows_of(x, ctx.dtype)
        gu = ((b * gain.unsqueeze(1)).t().contiguous() @ low.t()).mul_(ctx.scale)
        if a_trains:
            da = gu @ dropped
        if b_trains:
            db = (a @ dropped.t() @ low).t() * (gain * ctx.scale).unsqueeze(1)
        if gain_trains:
            if torch.is_grad_enabled():
                # A second derivative needs z as a function of what it came from.
                z = _unscaled(dropped.to(rows.dtype) @ w.to(rows.dtype).t(), dropped, a, b, ctx.scale)
            dgain = torch.linalg.vecdot(low, z.to(low.dtype), dim=0)
        if x_trains:
            plain = rows @ w.to(rows.dtype)
            if rows.dtype == ctx.dtype and folding_pays(len(rows), w, ctx.dtype):
                added = rows @ _folded(w, a, b, gain, ctx.scale).sub_(w)
            else:
                added = accumulate((low * (gain - 1)).to(rows.dtype) @ w.to(rows.dtype), gu.t(), a)
            dx = plain.addcmul_(added, keep) if plain.dtype == keep.dtype else torch.addcmul(plain, added, keep).to(plain.dtype)
            dx = dx.view(*g.shape[:-1], w.shape[1])
        return dx, None, None, da, db, dgain, None, None, None


# ---- |W|^2 ---------------------------------------------------------------------------------------------------------------
_squares = WeakTensorKeyDictionary()


def row_squares(w: Tensor) -> Tensor:
    """The sums of squares of the rows of a matrix, in full precision; those of a frozen weight are computed once.

    They are computed anew when the tensor gets other memory or is written to. What is written behind autograd's back, into
    ``w.data``, is not seen.
    """
    if w.requires_grad or torch.compiler.is_compiling() or type(w) not in (Tensor, Parameter) or w.is_inference():
        return _row_squares(w)
    state = (w._version, w.data_ptr(), w.dtype, w.shape)
    known = _squares.get(w)
    if known is None or known[0] != state:
        known = _squares[w] = state, _row_squares(w)
    return known[1]


def _row_squares(w: Tensor) -> Tensor:
    w = full(w.detach())
    return torch.linalg.vecdot(w, w)
