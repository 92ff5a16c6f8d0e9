"""A linear layer whose update is dense and made of few numbers, as one autograd function.

The update is added to a passing copy of the weight, once forward and once backward, so that neither it nor anything of the size
of the output is kept. What the few numbers need of the weight's gradient ``g' x`` is often far less than all of it: single entries
(`sampled`), of the product itself or of its transform, which is the product of the transformed ``g`` and ``x``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .lowrank import linear, rows_of, takes_the_formula

Spread = Callable[..., Tensor]
Gather = Callable[..., tuple[Tensor, ...]]

# A sampled entry costs about as much as this many of a matrix product.
DENSE_SHARE = {"cpu": 4}
DENSE_SHARE_ELSEWHERE = 64
# How many numbers of g and x are looked at together.
MANY = 2**18


def linear_plus_spread(
    x: Tensor, w: Tensor | None, bias: Tensor | None, scale: float, spread: Spread, gather: Gather | None, *values: Tensor
) -> Tensor:
    """``x (W + scale * spread(values))' + bias``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``, frozen, or None for zero. bias: ``(out,)`` or None.
        spread: what is added to the weight, differentiable in the values.
        gather: ``(g, x, *values)`` with ``g (rows, out)`` and ``x (rows, in)``: the gradients of the values where that of
            ``spread(values)`` is ``g' x``. None lets autograd find them from ``g' x``.
    """
    if torch.is_grad_enabled():
        return _LinearPlusSpread.apply(x, w, bias, scale, spread, gather, *values)
    return linear(x, _made(w, scale, spread, values), bias)


def _made(w: Tensor | None, scale: float, spread: Spread, values: tuple[Tensor, ...]) -> Tensor:
    delta = spread(*values)
    if w is not None:
        return torch.add(w, delta, alpha=scale)
    return delta if scale == 1 else delta * scale


class _LinearPlusSpread(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor | None, bias: Tensor | None, scale: float, spread: Spread, gather: Gather | None, *values: Tensor
    ) -> Tensor:
        trains = any(ctx.needs_input_grad[6:])
        ctx.save_for_backward(x if trains else None, w, *values)
        ctx.scale, ctx.spread, ctx.gather = scale, spread, gather
        return linear(x, _made(w, scale, spread, values), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, *rest = ctx.saved_tensors
        values = tuple(rest)
        rows = rows_of(g, g.dtype)
        again = torch.is_grad_enabled()
        dx, found = None, (None,) * len(values)
        if ctx.needs_input_grad[0]:
            dx = rows @ _made(w, ctx.scale, ctx.spread, values)
            dx = dx.view(*g.shape[:-1], dx.shape[-1])
        if x is not None:
            if ctx.gather is not None and not again:
                found = tuple(t.mul_(ctx.scale) for t in ctx.gather(rows, rows_of(x, x.dtype), *values))
            else:
                found = _through_autograd(ctx, rows.t() @ rows_of(x, x.dtype), values, again)
        return dx, None, None, None, None, None, *found


def _through_autograd(ctx: Any, dw: Tensor, values: tuple[Tensor, ...], again: bool) -> tuple[Tensor | None, ...]:
    wanted = ctx.needs_input_grad[6:]
    with torch.enable_grad():
        leaves = values if again else tuple(v.detach().requires_grad_(n) for v, n in zip(values, wanted, strict=True))
        delta = ctx.spread(*leaves)
        found = torch.autograd.grad(delta, [v for v, need in zip(leaves, wanted, strict=True) if need], dw * ctx.scale, create_graph=again)
    gradients = iter(found)
    return tuple(next(gradients) if need else None for need in wanted)


def pieces(g: Tensor, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows at a time: what is made of them stays in the processor's cache, and its memory is used again where asking the system
    for more would cost as much as the work."""
    step = max(MANY // (g.shape[1] + x.shape[1]), 64) if g.device.type == "cpu" else max(len(g), 1)
    return zip(g.split(step), x.split(step), strict=True)


# ---- single entries ---------------------------------------------------------------------------------------------------------
def scattered(values: Tensor, places: Tensor, shape: tuple[int, int]) -> Tensor:
    """A matrix that holds the values ``(*batch, k)`` at flat places ``(k,)`` or ``(*batch, k)`` and zero elsewhere; places that
    occur more than once hold the sum."""
    zero = values.new_zeros(*values.shape[:-1], shape[0] * shape[1])
    return zero.scatter_add(-1, places.long().expand(values.shape), values).unflatten(-1, shape)


def sampled(g: Tensor, x: Tensor, places: Tensor, seen: Callable[[Tensor], Tensor] = Tensor.t) -> Tensor:
    """Entries of ``g' x`` at flat places ``(k,)``, or of ``seen(g) seen(x)'``.

    Args:
        g: ``(rows, out)``. x: ``(rows, in)``.
        seen: what is to be seen of some rows, with the rows last.
    """
    shape = len(seen(g[:1])), len(seen(x[:1]))
    if len(places) * DENSE_SHARE.get(g.device.type, DENSE_SHARE_ELSEWHERE) > shape[0] * shape[1]:
        return (seen(g) @ seen(x).t()).flatten()[places.long()]
    starts, columns, back = remembered(places, _rows_of_places, *shape)
    found = torch.sparse_csr_tensor(starts, columns, g.new_zeros(len(columns)), shape, check_invariants=False)
    for some, of in pieces(g, x):
        torch.sparse.sampled_addmm(found, seen(some).contiguous(), seen(of).contiguous().t(), out=found)
    return found.values()[back]


def times_sparse(values: Tensor, places: Tensor, t: Tensor) -> Tensor:
    """``S T`` with S square, of values ``(k,)`` at flat places ``(k,)``, for a frozen ``T (width, n)``."""
    if takes_the_formula(t, t, None):
        return scattered(values, places, (len(t), len(t))) @ t
    return _TimesSparse.apply(values, places, t)


class _TimesSparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, places: Tensor, t: Tensor) -> Tensor:
        ctx.save_for_backward(places, t)
        width = len(t)
        starts, columns, back = remembered(places, _rows_of_places, width, width)
        entries = values.new_zeros(len(columns)).index_add_(0, back, values)
        return torch.mm(torch.sparse_csr_tensor(starts, columns, entries, (width, width), check_invariants=False), t)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        places, t = ctx.saved_tensors
        return (g @ t.t()).flatten()[places], None, None


def _rows_of_places(places: Tensor, out: int, inp: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places as a compressed matrix has them, and where each went."""
    unique, back = torch.unique(places.long(), return_inverse=True)
    starts = torch.searchsorted(unique, torch.arange(out + 1, device=unique.device) * inp)
    return starts, unique % inp, back


_memory: WeakIdKeyDictionary = WeakIdKeyDictionary()


def remembered(key: Tensor, make: Callable[..., Any], *args: Any) -> Any:
    """``make(key, *args)``, made again only when the tensor has changed."""
    if torch.compiler.is_compiling() or key.is_inference():
        return make(key, *args)
    state = (key._version, make, args)
    found = _memory.get(key)
    if found is None or found[0] != state:
        found = _memory[key] = state, make(key, *args)
    return found[1]
