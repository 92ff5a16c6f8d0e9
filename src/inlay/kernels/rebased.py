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
from torch.nn import functional as F

from .lowrank import linear, rows_of
from .spread import remembered, sampled, scattered, times_sparse


def linear_plus_rebased(
    x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, start: Tensor, places: Tensor, scale: float,
    spread: Callable[[Tensor], Tensor], values: Tensor,
) -> Tensor:  # fmt: skip
    """``x (W + scale * spread(values))' + bias`` with ``spread = U S V'``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``, which is ``U diag(start) V'``. bias: ``(out,)`` or None. All frozen but x.
        u: ``(out, in)``. v: ``(in, in)``. start: ``(in,)``. places: flat, of the entries of S, ``(in + k,)``; first its diagonal.
        values: ``(in + k,)``, trained.
    """
    return _LinearPlusRebased.apply(x, w, bias, u, v, start, places, scale, spread, values)


def _turned(places: Tensor, width: int) -> Tensor:
    return places % width * width + places // width


class _LinearPlusRebased(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor, start: Tensor, places: Tensor, scale: float,
        spread: Callable[[Tensor], Tensor], values: Tensor,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(x, u, v, start, places, values)
        ctx.scale = scale
        return linear(x, torch.add(w, spread(values), alpha=scale), bias)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, u, v, start, places, values = ctx.saved_tensors
        width, dx, dvalues = len(v), None, None
        left = u.t() @ rows_of(g, g.dtype).t()
        middle = torch.add(F.pad(start, (0, len(values) - width)), values, alpha=ctx.scale)
        if torch.is_grad_enabled():
            # Gradients that are differentiated themselves are written as autograd can follow them.
            dx = left.t() @ scattered(middle, places, (width, width)) @ v.t()
            wanted = left @ rows_of(x, x.dtype) @ v * ctx.scale
            return dx.view(x.shape), *(None,) * 8, wanted.flatten()[places]
        if ctx.needs_input_grad[0]:
            dx = (times_sparse(middle, remembered(places, _turned, width), left).t() @ v.t()).view(x.shape)
        if ctx.needs_input_grad[9]:
            dvalues = sampled(left.t(), rows_of(x, x.dtype) @ v, places).mul_(ctx.scale)
        return dx, None, None, None, None, None, None, None, None, dvalues
