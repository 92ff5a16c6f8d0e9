"""A linear layer whose input is turned: ``(x M) W'``, as one autograd function for each of two ways to have ``M``.

``M`` is a chain of block-diagonal matrices between permutations, its product scaled by outputs where that is asked for, or
``I - V U'`` with thin ``U`` and ``V``. Where there are more
rows than outputs, the forward pass multiplies with a passing copy ``M W'`` of the weight. The backward pass needs ``d = g W``, as
the frozen layer does, and everything else follows from ``d`` and ``x`` by cheap products: ``dx = d M'``, ``dM = x' d`` on the
blocks. Saved are ``x`` as it came and what ``M`` is made of; no turned copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .decomposed import gain_gradient, probe
from .lowrank import linear, rows_of, takes_the_formula

# Blocks below this size are too small for a matrix product of their own and are put together.
WIDE = 32
# A chain whose product has blocks up to this size is multiplied out: one product with larger blocks is cheaper than several.
WIDEST = 64

# How many pairs of pieces a permutation takes apart, and the length of a piece; None leaves all where it is.
Order = tuple[int, int] | None


def bring(x: Tensor, order: Order, axis: int = -1) -> Tensor:
    """``x P``: of every ``2 m`` pieces along an axis, those of the second half go between those of the first."""
    return x if order is None else _swapped(x, (2, order[0], order[1]), axis)


def take_back(x: Tensor, order: Order, axis: int = -1) -> Tensor:
    """``x P'``, the inverse: of every ``2 m`` pieces the even ones, then the odd ones."""
    return x if order is None else _swapped(x, (order[0], 2, order[1]), axis)


def _swapped(x: Tensor, sizes: tuple[int, int, int], axis: int) -> Tensor:
    split = x.unflatten(axis, (-1, *sizes))
    at = x.ndim - 1 if axis == -1 else axis
    return split.transpose(at + 1, at + 2).flatten(at, at + 3)


# ---- chains of block-diagonal matrices ---------------------------------------------------------------------------------------
def linear_turned(x: Tensor, w: Tensor, bias: Tensor | None, blocks: Tensor, orders: Sequence[Order], gain: Tensor | None = None) -> Tensor:
    """``gain * (x M W') + bias`` with the chain ``M = M_1 M_2 ...``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. blocks: ``(factors, blocks, size, size)``.
        orders: the permutation ``P`` of each factor ``P B P'``, whose ``B`` is block-diagonal.
        gain: ``(out,)``, or None for one.
    """
    dtype = x.dtype
    blocks, orders = multiplied(blocks, orders)
    if takes_the_formula(x, w, bias) or torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            turned = turn(x.to(blocks.dtype), blocks, orders).to(dtype)
        if gain is None:
            return F.linear(turned, w, bias)
        y = F.linear(turned, w)
        return (y * gain if bias is None else torch.addcmul(bias.to(gain.dtype), y, gain)).to(y.dtype)
    blocks = widened(blocks)
    if torch.is_grad_enabled():
        return _LinearTurned.apply(x, w, bias, blocks, orders, gain)
    return _forward_turned(x, w, bias, blocks, orders, gain)


def turn(x: Tensor, blocks: Tensor, orders: Sequence[Order]) -> Tensor:
    """``x M`` for ``x (*batch, *, in)`` and ``blocks (*batch, factors, blocks, size, size)``."""
    for factor, order in zip(blocks.unbind(-4), orders, strict=True):
        x = _times(x, factor, order)
    return x


def _times(x: Tensor, factor: Tensor, order: Order) -> Tensor:
    """``x M_i`` for one factor ``(*batch, blocks, size, size)``."""
    pieces = bring(x, order).unflatten(-1, factor.shape[-3:-1]).transpose(-3, -2)
    return take_back((pieces @ factor).transpose(-3, -2).flatten(-2), order)


def multiplied(blocks: Tensor, orders: Sequence[Order]) -> tuple[Tensor, Sequence[Order]]:
    """The chain as one factor, where that has small blocks: permutations of a few pieces mix neighbours only."""
    *_, number, size, _ = blocks.shape
    together = max(2 * pairs * length // size for pairs, length in (order or (1, size // 2) for order in orders))
    width = together * size
    if len(orders) == 1 or width > WIDEST:
        return blocks, orders
    # (*batch, groups, factors, blocks of the group, size, size)
    groups = blocks.unflatten(-3, (number // together, together)).movedim(-4, -5)
    eye = torch.eye(width, dtype=blocks.dtype, device=blocks.device).expand(*groups.shape[:-4], width, width)
    return turn(eye, groups, orders).unsqueeze(-4), (None,)


def widened(blocks: Tensor) -> Tensor:
    """Small blocks put together into larger block-diagonal ones."""
    *ahead, number, size, _ = blocks.shape
    count = max(c for c in range(1, max(WIDE // size, 1) + 1) if number % c == 0)
    if count == 1:
        return blocks
    wide = blocks.new_zeros(*ahead, number // count, count, size, count, size)
    # The diagonal comes last: (*, wide, size, size, count).
    wide.diagonal(dim1=-4, dim2=-2).copy_(blocks.unflatten(-3, (-1, count)).movedim(-3, -1))
    return wide.flatten(-4, -3).flatten(-2)


def _forward_turned(x: Tensor, w: Tensor, bias: Tensor | None, blocks: Tensor, orders: Sequence[Order], gain: Tensor | None) -> Tensor:
    rows = rows_of(x, blocks.dtype)
    if len(rows) <= len(w) or w.dtype != blocks.dtype:
        turned = turn(rows, blocks, orders).to(x.dtype).view(x.shape)
        if gain is None:
            return linear(turned, w, bias)
        y = linear(turned, w, None)
        return y.copy_(y * gain if bias is None else torch.addcmul(bias.to(gain.dtype), y, gain))
    # M W' from the right end of the chain.
    passing = w.t()
    for factor, order in zip(reversed(blocks.unbind(0)), reversed(orders), strict=True):
        pieces = bring(passing, order, axis=0).unflatten(0, factor.shape[:2])
        passing = take_back((factor @ pieces).flatten(0, 1), order, axis=0)
    return linear(x, (passing if gain is None else passing * gain).t(), bias)


class _LinearTurned(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, blocks: Tensor, orders: Sequence[Order], gain: Tensor | None
    ) -> Tensor:
        y = _forward_turned(x, w, bias, blocks, orders, gain)
        # An alias of the output, for the gradient of the gain: see `kernels.decomposed`.
        ctx.save_for_backward(x, w, bias, blocks, gain, y.data if ctx.needs_input_grad[5] else None)
        ctx.probe, ctx.version, ctx.orders = probe(y), y._version, orders
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, blocks, gain, y = ctx.saved_tensors
        orders, factors, dgain = ctx.orders, blocks.unbind(0), None
        inputs, found = [rows_of(x, blocks.dtype)], []
        for factor, order in zip(factors[:-1], orders[:-1], strict=True):
            inputs.append(_times(inputs[-1], factor, order))
        if y is not None:
            low = rows_of(g, blocks.dtype)
            if ctx.probe._version != ctx.version or torch.is_grad_enabled() or not gain.all():
                z = _times(inputs[-1], factors[-1], orders[-1]).to(w.dtype) @ w.t()
                dgain = torch.linalg.vecdot(low, z.to(low.dtype), dim=0)
            else:
                dgain = gain_gradient(low, rows_of(y, low.dtype), bias, gain)
        d = _input_gradient(rows_of(g, w.dtype), w, gain).to(blocks.dtype)
        for factor, order, rows in zip(reversed(factors), reversed(orders), reversed(inputs), strict=True):
            d, rows = (bring(t, order).unflatten(-1, factor.shape[:2]).transpose(0, 1) for t in (d, rows))
            found.append(rows.mT @ d)
            d = take_back((d @ factor.mT).transpose(0, 1).flatten(-2), order)
        return d.view(x.shape).to(x.dtype), None, None, torch.stack(found[::-1]), None, dgain


def _input_gradient(g: Tensor, w: Tensor, gain: Tensor | None) -> Tensor:
    """``(gain * g) W``; the smaller of the two takes the gain."""
    if gain is None:
        return g @ w
    if len(g) > w.shape[1] and w.dtype == gain.dtype:
        return g @ (w * gain.unsqueeze(1))
    return (g * gain).to(w.dtype) @ w


# ---- all but a few directions kept -------------------------------------------------------------------------------------------
def linear_reflected(x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    """``x (I - V U') W' + bias``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. u, v: ``(in, r)``.
    """
    if takes_the_formula(x, w, bias) or torch.is_autocast_enabled(x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            rows = x.to(u.dtype)
            turned = (rows - (rows @ v) @ u.mT).to(x.dtype)
        return F.linear(turned, w, bias)
    if torch.is_grad_enabled():
        return _LinearReflected.apply(x, w, bias, u, v)
    return _forward_reflected(x, w, bias, u, v)


def _forward_reflected(x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
    rows = rows_of(x, u.dtype)
    if len(rows) <= len(w) or w.dtype != u.dtype:
        turned = torch.addmm(rows, (v.t() @ rows.t()).t(), u.t(), alpha=-1)
        return linear(turned.to(x.dtype).view(x.shape), w, bias)
    return linear(x, torch.addmm(w, (u.t() @ w.t()).t(), v.t(), alpha=-1), bias)


class _LinearReflected(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, u, v)
        return _forward_reflected(x, w, bias, u, v)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, u, v = ctx.saved_tensors
        rows, d = rows_of(x, u.dtype), (rows_of(g, w.dtype) @ w).to(u.dtype)
        du = dv = None
        # What has r rows is kept as such: see `kernels.lowrank`.
        away = u.t() @ d.t()
        if ctx.needs_input_grad[3]:
            du = -(v.t() @ rows.t() @ d).t()
        if ctx.needs_input_grad[4]:
            dv = -(away @ rows).t()
        dx = torch.addmm(d, away.t(), v.t(), alpha=-1) if torch.is_grad_enabled() else d.addmm_(away.t(), v.t(), alpha=-1)
        return dx.view(x.shape).to(x.dtype), None, None, du, dv
