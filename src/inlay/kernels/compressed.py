"""A product ``x A'`` that keeps a few numbers of each input for its backward pass, and not the input (VeLoRA).

An input is cut into groups of neighbouring features, and of each group only its component along one direction is kept. With
``c`` those components ``(n, groups)`` and ``v`` the direction, the gradient of A is ``g' (c v')`` group by group, which is
``(g' c)`` spread along ``v``: the input is never built again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def in_groups(x: Tensor, groups: int) -> Tensor:
    """``(*, in)`` as ``(*, groups, size)``, the last group filled up with zeros."""
    size = -(-x.shape[-1] // groups)
    return F.pad(x, (0, groups * size - x.shape[-1])).unflatten(-1, (groups, size))


def linear_compressed(x: Tensor, a: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
    """``x A'``; exact but for the gradient of A.

    Args:
        x: ``(*, in)``. a: ``(r, in)``. v: a direction ``(ceil(in / groups),)`` of length 1.
        groups: how many numbers are kept of an input.
        scale: the factor in front of the gradient of A.
    """
    return _LinearCompressed.apply(x, a, v, groups, scale)


class _LinearCompressed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, v: Tensor, groups: int, scale: float) -> Tensor:
        ctx.save_for_backward(in_groups(x.reshape(-1, x.shape[-1]), groups) @ v.to(x.dtype), a, v)
        ctx.scale = scale
        return F.linear(x, a)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        c, a, v = ctx.saved_tensors
        dx = g @ a.to(g.dtype) if ctx.needs_input_grad[0] else None
        da = None
        if ctx.needs_input_grad[1]:
            of_groups = g.reshape(-1, g.shape[-1]).mT @ c.to(g.dtype)
            da = (of_groups.unsqueeze(-1) * (ctx.scale * v.to(g.dtype))).flatten(1)[:, : a.shape[1]].to(a.dtype)
        return dx, da, None, None, None
