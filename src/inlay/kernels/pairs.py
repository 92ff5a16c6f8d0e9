"""Pairs of outputs, turned and scaled, as one autograd function. Kept is what comes in, and nothing else of its size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .lowrank import takes_the_formula


def turn_pairs(y: Tensor, straight: Tensor, across: Tensor, group: int) -> Tensor:
    """``straight * y + across * y'``, where ``y'`` is ``(-v, u)`` for the halves ``(u, v)`` of each group.

    Args:
        y: ``(*, width)``. straight, across: ``(width,)``. group: even, divides the width.

    Returns:
        ``(*, width)`` in the dtype of ``y``.
    """
    if takes_the_formula(y, y.detach(), None) or not torch.is_grad_enabled():
        return formula(y, straight, across, group)
    return _TurnPairs.apply(y, straight, across, group)


def formula(y: Tensor, straight: Tensor, across: Tensor, group: int) -> Tensor:
    """The same in single operations; leading axes broadcast."""
    return (straight * y + across * _aside(y, group)).to(y.dtype)


def _aside(y: Tensor, group: int) -> Tensor:
    u, v = y.unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return torch.stack((-v, u), -2).flatten(-3)


class _TurnPairs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, straight: Tensor, across: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(y, straight, across)
        ctx.group = group
        turned = straight * y
        u, v = _halves(y, group)
        below, above = _halves(across, group)
        first, second = _halves(turned, group)
        first.addcmul_(v, below, value=-1)
        second.addcmul_(u, above)
        return turned.to(y.dtype)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        y, straight, across = ctx.saved_tensors
        group, width = ctx.group, g.shape[-1]
        if torch.is_grad_enabled():
            # A second derivative is asked for: by the formula, whose operations are recorded.
            crossed = across * g
            dy = (straight * g - _aside(crossed, group)).to(y.dtype)
            rows, inputs = g.reshape(-1, width), y.reshape(-1, width)
            return dy, (rows * inputs).sum(0).to(straight.dtype), (rows * _aside(inputs, group)).sum(0).to(across.dtype), None
        dy = straight * g
        gu, gv = _halves(g, group)
        below, above = _halves(across, group)
        first, second = _halves(dy, group)
        first.addcmul_(gv, above)
        second.addcmul_(gu, below, value=-1)
        u, v = (t.reshape(-1, width // 2) for t in _halves(y, group))
        gu, gv = (t.reshape(-1, width // 2) for t in (gu, gv))
        dots = [torch.linalg.vecdot(one.to(dy.dtype), other.to(dy.dtype), dim=0) for one, other in ((gu, u), (gv, v), (gu, v), (gv, u))]
        straight_u, straight_v, across_u, across_v = (d.view(-1, group // 2) for d in dots)
        return dy.to(y.dtype), torch.stack((straight_u, straight_v), 1).flatten(), torch.stack((-across_u, across_v), 1).flatten(), None


def _halves(y: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Views of the halves of each group, ``(*, groups, group / 2)``."""
    u, v = y.unflatten(-1, (-1, 2, group // 2)).unbind(-2)
    return u, v
