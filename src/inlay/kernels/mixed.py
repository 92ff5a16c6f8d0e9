"""Low-rank updates of several adapters on the rows of one batch: the base's product is done once, for all rows.

Prefill and training go by segments, ``y[rows] += s x[rows] A' B'`` for each adapter. With few tokens, as in decoding, what costs is
the calling, and adapters of one rank go through one batched product, however their rows lie. On a GPU with Triton one kernel serves
all adapters at any count, where their factors were not put side by side before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import accumulate, compute_dtype
from .quantised import has_triton

# Up to so many tokens a few calls for all adapters are faster than a pair of products for each.
FEW_TOKENS = 96

# The rows of each adapter, rising.
Rows = tuple[tuple[int, ...], ...]
# ``a (r, in)``, ``b (out, r)`` and the factor in front.
Factors = tuple[Tensor, Tensor, float]
# What takes rows out of a batch: a slice where they stand side by side.
Selector = slice | Tensor


@lru_cache(2048)
def positions(rows: tuple[int, ...], times: int, device: torch.device) -> Tensor:
    """The entries of these rows, ``times`` to a row."""
    spread = torch.tensor(rows, dtype=torch.int64).unsqueeze(1) * times + torch.arange(times)
    return spread.flatten().to(device)


def selector(rows: tuple[int, ...], times: int, device: torch.device) -> Selector:
    """What takes these rows out of a tensor that has ``times`` entries a row in front."""
    if rows and rows == tuple(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0] * times, (rows[-1] + 1) * times)
    if torch.compiler.is_compiling():
        return torch.tensor([r * times + i for r in rows for i in range(times)], device=device)
    return positions(rows, times, device)


class Few(NamedTuple):
    """The tokens of several adapters, few enough for one product.

    Attributes:
        each: how many an adapter has, where all have as many and no token has two.
        order, back: then, all tokens in the adapters' order, those without one behind, and the way back; None where they stand so.
        padded: ``(adapters, most tokens)``, shorter rows filled up with their first token.
        kept: which of the padded places count, or None where all do.
        tokens: those places' tokens, in their order.
    """

    each: int | None
    order: Tensor | None
    back: Tensor | None
    padded: Tensor
    kept: Tensor | None
    tokens: Tensor


@lru_cache(256)
def few(rows: Rows, times: int, count: int, device: torch.device) -> Few:
    """
    Args:
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
        count: of the rows in the batch.
    """
    tokens = [[row * times + i for row in mine for i in range(times)] for mine in rows]
    most, every = max(map(len, tokens)), [token for mine in tokens for token in mine]
    even = len({len(mine) for mine in tokens}) == 1
    padded = torch.tensor([(mine + mine[:1] * most)[:most] or [0] * most for mine in tokens])
    kept = None if even else torch.cat([i * most + torch.arange(len(t)) for i, t in enumerate(tokens)]).to(device)
    order = [*every, *sorted(set(range(count * times)) - set(every))]
    each = most if even and len(order) == count * times else None
    moves = None if each is None or order == sorted(order) else torch.tensor(order)
    back = None if moves is None else moves.argsort().to(device)
    return Few(each, None if moves is None else moves.to(device), back, padded.to(device), kept, torch.tensor(every).to(device))


class Stack(NamedTuple):
    """Factors of several adapters side by side.

    Attributes:
        a: ``(adapters, in, r)``. b: ``(adapters, r, out)``.
        scale: the factor in front of all updates, or ``(adapters, 1, 1)`` where they differ.
    """

    a: Tensor
    b: Tensor
    scale: float | Tensor


def stack(factors: Sequence[Factors]) -> Stack | None:
    """The factors side by side; None where their shapes differ."""
    if len({a.shape for a, _, _ in factors}) > 1:
        return None
    a, b, scales = zip(*factors, strict=True)
    same = len(set(scales)) == 1
    scale = scales[0] if same else torch.tensor(scales, device=a[0].device, dtype=a[0].dtype).view(-1, 1, 1)
    return Stack(torch.stack(a).mT, torch.stack(b).mT, scale)


def add_few(y: Tensor, x: Tensor, where: Few, factors: Stack) -> Tensor:
    """What `add_segments` adds, for few tokens and without gradients, in place, by two products for all adapters of one rank.

    Args:
        y: ``(*, out)``. x: ``(tokens, in)``.
    """
    a, b, scale = factors
    into = y.view(-1, y.shape[-1])
    u = torch.bmm(x[where.padded].to(a.dtype), a)
    if isinstance(scale, Tensor):
        u, scale = u * scale, 1.0
    h = torch.bmm(u, b).flatten(0, 1)
    into.index_add_(0, where.tokens, (h if where.kept is None else h[where.kept]).to(y.dtype), alpha=scale)
    return y


class Turn(NamedTuple):
    """How a batch goes through a layer in the adapters' order, where each adapter has as many of its entries and none has two.

    Attributes:
        order, back: the entries by their adapters, those without one behind, and the way back; None where they stand so.
        entries: how many have an adapter; None where all do.
        inner, outer: their inputs ``(adapters, tokens, in)`` and outputs ``(adapters, tokens, out)``.
    """

    order: Tensor | None
    back: Tensor | None
    entries: int | None
    inner: tuple[int, int, int]
    outer: tuple[int, int, int]


def turn(where: Few, shape: torch.Size, factors: Stack) -> Turn | None:
    """
    Args:
        where: the entries in front of the batch, as if each were a token.
        shape: of the batch, ``(entries, *, in)``.
    """
    if where.each is None:
        return None
    count, inp, out = factors.a.shape[0], factors.a.shape[1], factors.b.shape[2]
    entries, tokens = count * where.each, where.each * prod(shape[1:-1])
    covered = None if entries == shape[0] else entries
    return Turn(where.order, where.back, covered, (count, tokens, inp), (count, tokens, out))


def linear_in_turn(x: Tensor, w: Tensor, bias: Tensor | None, how: Turn, factors: Stack) -> Tensor:
    """A linear layer with what `add_few` adds. The calls are what costs here, and these are the fewest.

    Args:
        x: ``(entries, *, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. All are of one dtype.
    """
    order, back, entries, inner, outer = how
    a, b, scale = factors
    if order is not None:
        x = x.index_select(0, order)
    y = F.linear(x, w, bias)
    if entries is None:
        mine, into = x, y
    else:
        mine, into = x[:entries], y[:entries]
    u = torch.bmm(mine.reshape(inner), a)
    if isinstance(scale, Tensor):
        u, scale = u * scale, 1.0
    into.view(outer).baddbmm_(u, b, alpha=scale)
    return y if back is None else y.index_select(0, back)


def are_few(x: Tensor) -> bool:
    """Whether so few tokens ``(tokens, in)`` have come that `add_few` is to do them."""
    return x.shape[0] <= FEW_TOKENS and not torch.is_autocast_enabled(x.device.type)


def add_segments(y: Tensor, x: Tensor, rows: Rows, times: int, factors: Sequence[Factors]) -> Tensor:
    """``y[rows] += s x[rows] A' B'`` for each adapter, in place.

    Args:
        y: ``(*, out)``, fresh from the base and no view. x: ``(tokens, in)``.
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
        factors: of each adapter.
    """
    flat, scales = [t for a, b, _ in factors for t in (a, b)], [s for *_, s in factors]
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or any(t.requires_grad for t in flat)):
        return _Segments.apply(y, x, rows, times, scales, *flat)
    if not are_few(x) or by_triton(x, flat) or (side_by_side := stack(factors)) is None:
        return _added(y, x, rows, times, scales, flat)
    return add_few(y, x, few(rows, times, len(x) // times, x.device), side_by_side)


def by_triton(x: Tensor, flat: Sequence[Tensor]) -> bool:
    """Whether the segments are left to Triton's kernels."""
    if x.device.type != "cuda" or not has_triton():
        return False
    from .segmented_triton import fits

    return fits(x, flat)


def _added(y: Tensor, x: Tensor, rows: Rows, times: int, scales: Sequence[float], flat: Sequence[Tensor]) -> Tensor:
    if by_triton(x, flat):
        from .segmented_triton import add

        return add(y, x, rows, times, scales, flat)
    into = y.view(-1, y.shape[-1])
    for i, (which, scale) in enumerate(zip(rows, scales, strict=True)):
        a, b, mine = flat[2 * i], flat[2 * i + 1], selector(which, times, x.device)
        dtype = compute_dtype(x, a)
        # With the long axis last the narrow product runs faster (see `kernels.lowrank`).
        u = (a.to(dtype) @ x[mine].to(dtype).t()).t()
        if isinstance(mine, slice):
            accumulate(into[mine], u, b.to(dtype).t().contiguous(), scale)
        else:
            into.index_add_(0, mine, (u @ b.to(dtype).t()).to(y.dtype), alpha=scale)
    return y


class _Segments(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Rows, times: int, scales: Sequence[float], *flat: Tensor) -> Tensor:
        ctx.save_for_backward(x, *flat)
        ctx.rows, ctx.times, ctx.scales = rows, times, scales
        ctx.mark_dirty(y)
        return _added(y, x, rows, times, scales, flat)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *flat = ctx.saved_tensors
        _, needs_x, _, _, _, *needs = ctx.needs_input_grad
        g_rows = g.reshape(-1, g.shape[-1])
        # A kernel has no second derivative.
        if by_triton(x, flat) and not torch.is_grad_enabled():
            from .segmented_triton import gradients

            dx, found = gradients(g_rows, x, ctx.rows, ctx.times, ctx.scales, flat, (needs_x, any(needs[::2]), any(needs[1::2])))
            return g, dx, None, None, None, *(t if needed else None for t, needed in zip(found, needs, strict=True))
        dx = torch.zeros_like(x) if needs_x else None
        found = []
        for i, (which, scale) in enumerate(zip(ctx.rows, ctx.scales, strict=True)):
            a, b, mine = flat[2 * i], flat[2 * i + 1], selector(which, ctx.times, x.device)
            dtype = compute_dtype(x, a)
            a, b, low, into = a.to(dtype), b.to(dtype), g_rows[mine].to(dtype), x[mine].to(dtype)
            gu = (low @ b).mul_(scale)
            if dx is not None:
                step = (gu @ a).to(dx.dtype)
                if isinstance(mine, slice):
                    dx[mine] += step
                else:
                    dx.index_add_(0, mine, step)
            found.append((gu.t() @ into).to(flat[2 * i].dtype) if needs[2 * i] else None)
            found.append((low.t() @ (into @ a.t())).mul_(scale).to(flat[2 * i + 1].dtype) if needs[2 * i + 1] else None)
        return g, dx, None, None, None, *found
