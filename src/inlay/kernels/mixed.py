"""Low-rank updates of several adapters on the rows of one batch: the base's product is done once, for all rows.

Prefill and training go by segments, ``y[rows] += s x[rows] A' B'`` for each adapter. With few tokens, as in decoding, what costs is
the calling, and adapters of one rank go through one batched product, however their rows lie. On a GPU with Triton one kernel serves
all adapters at any count, where their factors were not put side by side before.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

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
    """The tokens of several adapters, as `add_few` takes them.

    Attributes:
        grid: where the tokens stand side by side in the adapters' order, as many for each: which ones, and how many adapters.
        padded: ``(adapters, most tokens)``, shorter rows filled up with their first token.
        kept: which of the padded places count, or None where all do.
        tokens: those places' tokens, in their order.
    """

    grid: tuple[slice, int] | None
    padded: Tensor
    kept: Tensor | None
    tokens: Tensor


@lru_cache(256)
def few(rows: Rows, times: int, device: torch.device) -> Few:
    """
    Args:
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
    """
    tokens = [[row * times + i for row in mine for i in range(times)] for mine in rows]
    most, every = max(map(len, tokens)), [token for mine in tokens for token in mine]
    even = len({len(mine) for mine in tokens}) == 1
    beside = even and every == list(range(every[0], every[0] + len(every)))
    padded = torch.tensor([(mine + mine[:1] * most)[:most] or [0] * most for mine in tokens])
    kept = None if even else torch.cat([i * most + torch.arange(len(t)) for i, t in enumerate(tokens)]).to(device)
    grid = (slice(every[0], every[-1] + 1), len(rows)) if beside else None
    return Few(grid, padded.to(device), kept, torch.tensor(every).to(device))


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
        y: ``(tokens, out)``. x: ``(tokens, in)``.
    """
    a, b, scale = factors
    if where.grid is not None:
        beside, count = where.grid
        inputs = x[beside].view(count, -1, x.shape[-1])
    else:
        inputs = x[where.padded]
    u = torch.bmm(inputs.to(a.dtype), a)
    if isinstance(scale, Tensor):
        u, scale = u * scale, 1.0
    if where.grid is not None and y.dtype == u.dtype:
        y[where.grid[0]].view(len(u), -1, y.shape[-1]).baddbmm_(u, b, alpha=scale)
        return y
    h = torch.bmm(u, b).flatten(0, 1)
    return y.index_add_(0, where.tokens, (h if where.kept is None else h[where.kept]).to(y.dtype), alpha=scale)


def add_segments(y: Tensor, x: Tensor, rows: Rows, times: int, factors: Sequence[Factors], kept: Stack | None = None) -> Tensor:
    """``y[rows] += s x[rows] A' B'`` for each adapter, in place.

    Args:
        y: ``(*, out)``, fresh from the base and no view. x: ``(tokens, in)``.
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
        factors: of each adapter. kept: the same side by side, if they were kept so; no gradients are asked for then.
    """
    few_do = x.shape[0] <= FEW_TOKENS and not torch.is_autocast_enabled(x.device.type)
    if kept is None or not few_do:
        flat, scales = [t for a, b, _ in factors for t in (a, b)], [s for *_, s in factors]
        if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or any(t.requires_grad for t in flat)):
            return _Segments.apply(y, x, rows, times, scales, *flat)
        if not few_do or by_triton(x, flat) or (kept := stack(factors)) is None:
            return _added(y, x, rows, times, scales, flat)
    add_few(y.view(-1, y.shape[-1]), x, few(rows, times, x.device), kept)
    return y


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
            accumulate(into[mine], u, b.to(dtype).t(), scale)
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
