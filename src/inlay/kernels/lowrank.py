"""A linear layer with a low-rank update, as one autograd function.

The frozen layer's own cost is ``x W'`` and ``g W``. The update adds ``6 n r (in + out)`` operations and no more: the forward
pass accumulates ``u B'`` (with ``u = x A'``) into the base's output, the backward pass ``(g B) A`` into ``g W``. Saved are
``x`` as it came, ``u``, and an eighth of a byte an element for dropout; layers with one input share what they save of it.

What has rank r is kept as ``(r, n)``. Products that are narrow in one direction are bound by how they walk through memory, and
with the long axis last they run up to twice as fast as with rows of r numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import draw_bits, factors


def linear_plus_low_rank(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float) -> Tensor:
    """``x W' + bias + scale * drop(x) A' B'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(r, in)``. b: ``(out, r)``.
        scale: the factor in front of the update.
        rate: share of ``x`` that the update leaves out, in [0, 1).

    Returns:
        ``(*, out)`` in the dtype of the base's output. The update is computed in the dtype of ``a`` and ``b``, under autocast
        in autocast's, and rounded once.
    """
    if must_be_plain(x, w, bias):
        dropped = (F.dropout(x, rate) if rate else x).to(a.dtype)
        y = F.linear(x, w, bias)
        return torch.add(y, F.linear(F.linear(dropped, a), b), alpha=scale).to(y.dtype)
    bits = draw_bits(x, rate) if rate else None
    if torch.is_grad_enabled():
        return _LinearPlusLowRank.apply(x, w, bias, a, b, scale, rate, bits)
    return _forward(x, w, bias, a, b, scale, rate, bits)[0]


def must_be_plain(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether a formula has to be written in operations that others can take apart: the compiler, which fuses them by itself,
    vmap, jvp and their like, and the autograd of a base that is trained as well."""
    return (
        torch.compiler.is_compiling()
        or w.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch.autograd.forward_ad._current_level >= 0
    )


def compute_dtype(x: Tensor, a: Tensor) -> torch.dtype:
    """The dtype of the update: autocast's, or that of its parameters."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else a.dtype


def accumulate(y: Tensor, left: Tensor, right: Tensor, scale: float = 1.0) -> Tensor:
    """``y += scale * left @ right`` in the dtype of the factors, rounded once."""
    if y.dtype == left.dtype:
        return y.addmm_(left, right, alpha=scale)
    return y.copy_(y.to(left.dtype).addmm_(left, right, alpha=scale))


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _forward(
    x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float, bits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The output, and ``u'``."""
    dtype = compute_dtype(x, a)
    y = F.linear(x, w, bias)
    dropped = _rows(x, dtype)
    if bits is not None:
        dropped = factors(bits, rate, dropped.shape, dtype).mul_(dropped)
    u = a.to(dtype) @ dropped.t()
    accumulate(y.view(-1, y.shape[-1]), u.t(), b.to(dtype).t().contiguous(), scale)
    return y, u


class _LinearPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float, bits: Tensor | None
    ) -> Tensor:
        y, u = _forward(x, w, bias, a, b, scale, rate, bits)
        _, _, _, a_trains, b_trains, *_ = ctx.needs_input_grad
        ctx.save_for_backward(x if a_trains else None, w, a, b, u if b_trains else None, bits)
        ctx.scale, ctx.rate, ctx.dtype = scale, rate, u.dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, u, bits = ctx.saved_tensors
        x_trains, _, _, a_trains, b_trains, *_ = ctx.needs_input_grad
        dx = da = db = dropped = keep = None
        a, rows, g_low = a.to(ctx.dtype), _rows(g, g.dtype), _rows(g, ctx.dtype)
        # gu' = scale B' g'
        gu = (b.to(ctx.dtype).t().contiguous() @ g_low.t()).mul_(ctx.scale)
        if bits is not None:
            keep = factors(bits, ctx.rate, (len(rows), a.shape[1]), ctx.dtype)
        if x is not None:
            dropped = _rows(x, ctx.dtype) if keep is None else keep * _rows(x, ctx.dtype)
        if torch.is_grad_enabled() and b_trains:
            if dropped is None:
                raise NotImplementedError("A second derivative needs the layer's input, which is not kept while A is frozen.")
            u = a @ dropped.t()
        if a_trains:
            da = gu @ dropped
        if b_trains:
            db = (u @ g_low).mul_(ctx.scale).t()
        if x_trains:
            dx = rows @ w.to(rows.dtype)
            if keep is None:
                accumulate(dx, gu.t(), a)
            elif dx.dtype == ctx.dtype:
                dx.addcmul_(gu.t() @ a, keep)
            else:
                dx.copy_(torch.addcmul(dx, gu.t() @ a, keep))
            dx = dx.view(*g.shape[:-1], -1)
        return dx, None, None, da, db, None, None, None
