"""A linear layer whose weight is known in a basis, ``W = U diag(l0) V'``, and changes there, as one autograd function.

The entries of the change need the gradient in the basis, ``g U`` and ``x V``. So where a weight is higher than wide, the input's
gradient is cheapest from there as well: ``(g U) (diag(l0) + change) V'`` in place of ``g (W + U change V')``. What the layer gives
out is computed from the weight itself, so that no change leaves it as it is to the bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .lowrank import linear, rows_of
from .spread import sampled


def linear_plus_rebased(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, start: Tensor, places: Tensor, scale: float,
    spread: Callable[..., Tensor], lengths: Tensor, entries: Tensor,
) -> Tensor:  # fmt: skip
    """``x (W + scale * spread(lengths, entries))' + bias`` with ``spread = U (diag(lengths - start) + S) V'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``, which is ``U diag(start) V'``. bias: ``(out,)`` or None. All frozen but x.
        u: ``(out, in)``. v: ``(in, in)``. start: ``(in,)``. places: rows and columns of the entries of S, ``(2, k)``.
        lengths: ``(in,)``. entries: ``(k,)``. Both trained.
    """
    return _LinearPlusRebased.apply(x, w, bias, u, v, start, places, scale, spread, lengths, entries)


def times_sparse(t: Tensor, places: Tensor, entries: Tensor) -> Tensor:
    """``T S`` for ``T (n, width)`` and S square. Written so that no dense factor has to be turned."""
    width = t.shape[1]
    turned = torch.sparse_coo_tensor(places.flip(0), entries, (width, width), check_invariants=False)
    return torch.sparse.mm(turned, t.t()).t()


class _LinearPlusRebased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, start: Tensor, places: Tensor, scale: float,
        spread: Callable[..., Tensor], lengths: Tensor, entries: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, u, v, start, places, lengths, entries)
        ctx.scale = scale
        return linear(x, torch.add(w, spread(lengths, entries), alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, start, places, lengths, entries = ctx.saved_tensors
        scale, left = ctx.scale, rows_of(g, g.dtype) @ u
        if torch.is_grad_enabled():
            # Gradients that are differentiated themselves are written as autograd can follow them.
            sparse = torch.zeros_like(v, dtype=entries.dtype).index_put((places[0], places[1]), entries, accumulate=True)
            changed, right = torch.diag(torch.lerp(start, lengths, scale)) + sparse * scale, rows_of(x, x.dtype) @ v
            wanted = left.t() @ right * scale
            return (left @ changed @ v.t()).view(x.shape), *(None,) * 8, wanted.diagonal(), wanted[places[0], places[1]]
        dx = dlengths = dentries = None
        if ctx.needs_input_grad[0]:
            inner = left * torch.lerp(start, lengths, scale)
            if len(entries):
                inner = torch.add(inner, times_sparse(left, places, entries), alpha=scale)
            dx = (inner @ v.t()).view(x.shape)
        if any(ctx.needs_input_grad[9:]):
            turned, right = left.t().contiguous(), (rows_of(x, x.dtype) @ v).t().contiguous()
            dlengths = (turned * right).sum(-1).mul_(scale)
            flat = places[0] * len(v) + places[1]
            dentries = sampled(turned, right, flat).mul_(scale) if len(entries) else torch.zeros_like(entries)
        return dx, None, None, None, None, None, None, None, None, dlengths, dentries
