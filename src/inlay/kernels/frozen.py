"""A frozen linear layer that keeps its weight in another form: the way forward is its own, the way back restores the weight.

Nothing is kept for the way back, neither the input nor a restored weight. Many backends have no way back at all, or one that keeps
or restores more than it needs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Restore = Callable[[], Tensor]


def frozen_linear(x: Tensor, call: Callable[[Tensor], Tensor], restore: Restore) -> Tensor:
    """``call(x)``, whose derivative is the weight's.

    Args:
        x: ``(*, in)``. call: the layer. restore: gives its weight ``(out, in)``.
    """
    if not (x.requires_grad and torch.is_grad_enabled()) or torch.compiler.is_compiling():
        return call(x)
    return _Frozen.apply(x, call, restore)


class _Frozen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, call: Callable[[Tensor], Tensor], restore: Restore) -> Tensor:
        ctx.restore, ctx.dtype = restore, x.dtype
        y = call(x)
        return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        return (g @ ctx.restore().to(g.dtype)).to(ctx.dtype), None, None
