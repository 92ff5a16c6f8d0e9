"""A linear layer with a low-rank update, as one autograd function.

The frozen layer's own cost is ``x W'`` and ``g W``. The update adds ``6 n r (in + out)`` operations and no more: the forward
pass accumulates ``u B'`` (with ``u = x A'``) into the base's output, the backward pass ``(g B) A`` into ``g W``. Saved are
``x``, ``u`` and the parameters, ``x`` in the dtype in which it came.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import Mask, draw_mask


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
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    if autocast is not None:
        x, a, b = x.to(autocast), a.to(autocast), b.to(autocast)
    trained_base = w.requires_grad or (bias is not None and bias.requires_grad)
    if torch.compiler.is_compiling() or trained_base or not torch.is_grad_enabled() or _transformed(x):
        # The compiler fuses this by itself; without gradients there is nothing to save.
        y = F.linear(x, w, bias)
        dropped = F.dropout(x, rate) if rate else x
        return _accumulate(y, F.linear(dropped.to(a.dtype), a), b, scale, fresh=not torch.is_grad_enabled())
    mask = draw_mask(x, rate) if rate else None
    return _LinearPlusLowRank.apply(x, w, bias, a, b, scale, mask)


def _transformed(x: Tensor) -> bool:
    """vmap, jvp and their like take functions apart; they get the plain formula."""
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def _accumulate(y: Tensor, u: Tensor, b: Tensor, scale: float, fresh: bool) -> Tensor:
    """``y + scale * u B'``; in place where nobody else has seen ``y``."""
    if fresh and y.dtype == u.dtype and y.is_contiguous():
        y.view(-1, y.shape[-1]).addmm_(u.reshape(-1, u.shape[-1]), b.t(), alpha=scale)
        return y
    return torch.add(y, F.linear(u, b), alpha=scale).to(y.dtype)


class _LinearPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, mask: Mask | None
    ) -> Tensor:
        y = F.linear(x, w, bias)
        u = F.linear((x if mask is None else mask.drop(x)).to(a.dtype), a)
        y = _accumulate(y, u, b, scale, fresh=True)
        ctx.save_for_backward(x, w, a, b, u, *(() if mask is None else (mask.bits,)))
        ctx.scale, ctx.mask = scale, mask and mask.without_bits()
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, u, *bits = ctx.saved_tensors
        mask: Mask | None = ctx.mask and ctx.mask.with_bits(bits[0])
        dropped = x if mask is None else mask.drop(x)
        if torch.is_grad_enabled():
            # A second derivative needs u as a function of its inputs.
            u = F.linear(dropped.to(a.dtype), a)
        out, inp, r = w.shape[0], w.shape[1], a.shape[0]
        flat = g.reshape(-1, out)
        low = flat.to(a.dtype)
        # A transposed factor with rows of length `out` makes the narrow products several times faster than (out, r) does.
        gu = F.linear(low, b.t().contiguous()).mul_(ctx.scale) if not torch.is_grad_enabled() else low @ b * ctx.scale
        dx = da = db = None
        if ctx.needs_input_grad[3]:
            da = (gu.t() @ dropped.reshape(-1, inp).to(a.dtype))
        if ctx.needs_input_grad[4]:
            db = (u.reshape(-1, r).t() @ low).t() * ctx.scale
        if ctx.needs_input_grad[0]:
            base = flat @ w.to(flat.dtype)
            if mask is None and base.dtype == gu.dtype and not torch.is_grad_enabled():
                dx = base.addmm_(gu, a)
            else:
                through = gu @ a
                dx = base + (through if mask is None else mask.drop(through.view(x.shape)).reshape(-1, inp))
            dx = dx.to(x.dtype).view(x.shape)
        return dx, None, None, da, db, None, None
