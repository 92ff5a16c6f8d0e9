"""A linear layer with a low-rank update, as one autograd function.

The frozen layer's own cost is ``x W'`` and ``g W``. The update adds ``6 n r (in + out)`` operations and no more: the forward
pass accumulates ``u B'`` (with ``u = x A'``) into the base's output, the backward pass ``(g B) A`` into ``g W``. Where there are
more rows than the weight has, both accumulate ``B A`` into a passing copy of the weight instead, which is then the smaller
tensor. Saved are ``x`` as it came, ``u``, and an eighth of a byte an element for dropout; layers with one input share what
they save of it.

What has rank r is kept as ``(r, n)``. Products that are narrow in one direction are bound by how they walk through memory, and
with the long axis last they run up to twice as fast as with rows of r numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dropout import draw_bits, factors
from .image import image
from .rows import rows_of as rows_of

FEW_ROWS = 32


def linear_plus_low_rank(
    x: Tensor,
    w: Tensor | Callable[[], Tensor],
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scale: float,
    rate: float,
    trained: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """``x W' + bias + scale * drop(x) A' B'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``, or what gives it: it is then made for either way and kept for none.
        bias: ``(out,)`` or None. a: ``(r, in)``. b: ``(out, r)``.
        scale: the factor in front of the update.
        rate: share of ``x`` that the update leaves out, in [0, 1).
        trained: other factors, of a lower rank, whose product differs from ``B A`` by a constant: the gradients are found for them.

    Returns:
        ``(*, out)`` in the dtype of the base's output. The update is computed in the dtype of ``a`` and ``b``, under autocast
        in autocast's, and rounded once.
    """
    if isinstance(w, Tensor) and takes_the_formula(x, w, bias):
        dropped = (F.dropout(x, rate) if rate else x).to(a.dtype)
        y = F.linear(x, w, bias)
        return torch.add(y, F.linear(F.linear(dropped, a), b), alpha=scale).to(y.dtype)
    bits = draw_bits(x, rate) if rate else None
    # A frozen A lets u be kept in place of the input, so that is worth computing.
    u = image(x, a, compute_dtype(x, a), rate, bits) if trained is None and not a.requires_grad else None
    if torch.is_grad_enabled():
        return _LinearPlusLowRank.apply(x, u, w, bias, a, b, scale, rate, bits, *(trained or (None, None)))
    return _forward(x, u, _made(w), bias, a, b, scale, rate, bits)[0]


def _made(w: Tensor | Callable[[], Tensor]) -> Tensor:
    return w if isinstance(w, Tensor) else w()


def restoring_pays(x: Tensor, a: Tensor, computed_in: torch.dtype) -> bool:
    """Whether a quantised layer is best done as the product with its restored weight: where its own forward does the same."""
    return (
        x.device.type == "cpu"
        and x.dtype == a.dtype == computed_in == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not takes_the_formula(x, x.detach(), None)
    )


def takes_the_formula(x: Tensor, w: Tensor, bias: Tensor | None) -> bool:
    """Whether a formula is to be written in single operations.

    Few rows, as in decoding, are served best by few calls. And some have to take the formula apart: the compiler, which fuses it
    by itself, vmap, jvp and their like, and the autograd of a base that is trained as well. Nothing here may depend on whether
    gradients are asked for: a checkpointed block runs both ways, and has to draw the same dropout mask.
    """
    return (
        torch.compiler.is_compiling()
        or x.numel() <= FEW_ROWS * x.shape[-1]
        or w.requires_grad
        or (bias is not None and bias.requires_grad)
        or torch._C._functorch.peek_interpreter_stack() is not None  # type: ignore[attr-defined]
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


def folding_pays(rows: int, w: Tensor, dtype: torch.dtype) -> bool:
    """Whether writing ``W + B A`` twice (forward and backward) moves less memory than adding to output and input gradient.

    Never in half precision: what is small beside the weight would be lost in it for every input.
    """
    out, inp = w.shape
    return w.dtype == dtype and dtype in (torch.float32, torch.float64) and 2 * out * inp < rows * (out + inp)


def linear(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear`, never as a view: what a custom function returns as one could not be written to, as an in-place ReLU does."""
    y = F.linear(x, w, bias)
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


def _forward(
    x: Tensor, u: Tensor | None, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, rate: float, bits: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """The output, and ``u'`` where it was needed or is there already."""
    dtype = compute_dtype(x, a)
    if u is None:
        dropped = rows_of(x, dtype)
        if bits is not None:
            dropped = factors(bits, rate, dropped.shape, dtype).mul_(dropped)
        elif folding_pays(len(dropped), w, dtype):
            return linear(x, torch.addmm(w, b, a, alpha=scale), bias), None
        u = a.to(dtype) @ dropped.t()
    y = linear(x, w, bias)
    accumulate(y.view(-1, y.shape[-1]), u.t(), b.to(dtype).t().contiguous(), scale)
    return y, u


class _LinearPlusLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        u: Tensor | None,
        w: Tensor | Callable[[], Tensor],
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        rate: float,
        bits: Tensor | None,
        a_trained: Tensor | None,
        b_trained: Tensor | None,
    ) -> Tensor:
        apart = a_trained is not None
        *_, a_trains, b_trains = ctx.needs_input_grad[:6]
        y, u = _forward(x, u, _made(w), bias, a, b, scale, rate, bits)
        kept, ctx.restore = (w, None) if isinstance(w, Tensor) else (None, w)
        kept_u = u if b_trains and not apart else None
        ctx.save_for_backward(x if a_trains or apart else None, kept, a, b, kept_u, bits, a_trained, b_trained)
        ctx.scale, ctx.rate, ctx.dtype = scale, rate, compute_dtype(x, a)
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, a, b, u, bits, *trained = ctx.saved_tensors
        apart = trained[0] is not None
        x_trains, *_, a_trains, b_trains = ctx.needs_input_grad[:6]
        if apart:
            *_, a_trains, b_trains = ctx.needs_input_grad
        dx = da = db = dropped = keep = None
        a, b, rows, low = a.to(ctx.dtype), b.to(ctx.dtype), rows_of(g, g.dtype), rows_of(g, ctx.dtype)
        inner, outer = (q.to(ctx.dtype) for q in trained) if apart else (a, b)
        at_once = a_trains and b_trains and u is None and _at_once_pays(len(rows), inner, outer)
        # gu' = scale B' g'
        gu = None if at_once else (outer.t().contiguous() @ low.t()).mul_(ctx.scale)
        if bits is not None:
            keep = factors(bits, ctx.rate, (len(rows), a.shape[1]), ctx.dtype)
        if x is not None:
            dropped = rows_of(x, ctx.dtype) if keep is None else keep * rows_of(x, ctx.dtype)
        if at_once:
            assert dropped is not None
            update = (low.t() @ dropped).mul_(ctx.scale)
            da, db = outer.t() @ update, update @ inner.t()
        elif a_trains:
            assert gu is not None
            da = gu @ dropped
        if b_trains and not at_once:
            if u is None or (dropped is not None and torch.is_grad_enabled()):
                # A second derivative needs u as a function of what it came from; where A is frozen, it is.
                assert dropped is not None
                u = inner @ dropped.t()
            db = (u @ low).mul_(ctx.scale).t()
        if x_trains:
            w = w if ctx.restore is None else ctx.restore()
            dx = _input_gradient(rows, low, w, a, b, None if apart else gu, ctx.scale, keep).view(*g.shape[:-1], a.shape[1])
        return dx, None, None, None, *((None, None) if apart else (da, db)), None, None, None, *((da, db) if apart else (None, None))


def _at_once_pays(rows: int, a: Tensor, b: Tensor) -> bool:
    """Whether the gradients of both factors are cheaper by way of that of their product: where the rank is high."""
    (rank, inp), out = a.shape, len(b)
    return 2 * rows * rank * (out + inp) > out * inp * (rows + 2 * rank)


def _input_gradient(
    rows: Tensor, low: Tensor, w: Tensor, a: Tensor, b: Tensor, gu: Tensor | None, scale: float, keep: Tensor | None
) -> Tensor:
    """``g W + drop((g B) A)``."""
    if keep is None and rows.dtype == low.dtype and folding_pays(len(rows), w, low.dtype):
        return rows @ torch.addmm(w, b, a, alpha=scale)
    if gu is None:
        gu = (b.t().contiguous() @ low.t()).mul_(scale)
    dx = rows @ w.to(rows.dtype)
    if keep is None:
        return accumulate(dx, gu.t(), a)
    if dx.dtype == gu.dtype:
        return dx.addcmul_(gu.t() @ a, keep)
    return dx.copy_(torch.addcmul(dx, gu.t() @ a, keep))
