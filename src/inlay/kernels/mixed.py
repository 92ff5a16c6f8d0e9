"""Low-rank updates of several adapters on the rows of one batch: the base's product is done once, for all rows.

Prefill and training go by segments, ``y[rows] += s x[rows] A' B'`` for each adapter. With few tokens, as in decoding, what costs is
the calling, and adapters of one rank go through one batched product, however their rows lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .lowrank import accumulate, compute_dtype

# Up to so many tokens a few calls for all adapters are faster than a pair of products for each.
FEW_TOKENS = 96

Rows = slice | Tensor


class Few(NamedTuple):
    """The tokens of several adapters, as `add_few` takes them.

    Attributes:
        padded: ``(adapters, most tokens)``, shorter rows filled up with their first token.
        kept: which of the padded places count, or None where all do.
        tokens: those places' tokens, in their order.
    """

    padded: Tensor
    kept: Tensor | None
    tokens: Tensor


@lru_cache(256)
def few(rows: tuple[tuple[int, ...], ...], times: int, device: torch.device) -> Few:
    """
    Args:
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
    """
    tokens = [[row * times + i for row in sorted(mine) for i in range(times)] for mine in rows]
    most = max(map(len, tokens))
    padded = torch.tensor([mine + mine[:1] * (most - len(mine)) for mine in tokens])
    kept = None if len({len(mine) for mine in tokens}) == 1 else torch.cat([i * most + torch.arange(len(t)) for i, t in enumerate(tokens)])
    every = torch.tensor([token for mine in tokens for token in mine])
    return Few(padded.to(device), None if kept is None else kept.to(device), every.to(device))


def add_few(y: Tensor, x: Tensor, where: Few, factors: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """What `add_segments` adds, for few tokens and without gradients, in place, by two products for all adapters of one rank.

    Args:
        y: ``(tokens, out)``. x: ``(tokens, in)``.
        factors: ``a (r, in)``, ``b (out, r)`` and the factor in front, of each adapter.
    """
    a, b = torch.stack([a for a, _, _ in factors]), torch.stack([b for _, b, _ in factors])
    u = torch.bmm(x[where.padded].to(a.dtype), a.mT)
    scale = factors[0][2]
    if any(s != scale for *_, s in factors):
        u, scale = u * torch.tensor([s for *_, s in factors], device=u.device, dtype=u.dtype).view(-1, 1, 1), 1.0
    h = torch.bmm(u, b.mT).flatten(0, 1)
    return y.index_add_(0, where.tokens, (h if where.kept is None else h[where.kept]).to(y.dtype), alpha=scale)


def add_segments(y: Tensor, x: Tensor, segments: Sequence[tuple[Rows, Tensor, Tensor, float]]) -> Tensor:
    """``y[rows] += s x[rows] A' B'`` for each segment, in place.

    Args:
        y: ``(*, out)``, fresh from the base and no view. x: ``(tokens, in)``.
        segments: rows of tokens, ``a (r, in)``, ``b (out, r)`` and the factor in front.
    """
    flat = [t for _, a, b, _ in segments for t in (a, b)]
    rows, scales = [r for r, *_ in segments], [s for *_, s in segments]
    if torch.is_grad_enabled() and (y.requires_grad or x.requires_grad or any(t.requires_grad for t in flat)):
        return _Segments.apply(y, x, rows, scales, *flat)
    return _added(y, x, rows, scales, flat)


def _added(y: Tensor, x: Tensor, rows: Sequence[Rows], scales: Sequence[float], flat: Sequence[Tensor]) -> Tensor:
    into = y.view(-1, y.shape[-1])
    for i, (mine, scale) in enumerate(zip(rows, scales, strict=True)):
        a, b = flat[2 * i], flat[2 * i + 1]
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
    def forward(ctx: Any, y: Tensor, x: Tensor, rows: Sequence[Rows], scales: Sequence[float], *flat: Tensor) -> Tensor:
        indices = [r for r in rows if isinstance(r, Tensor)]
        ctx.save_for_backward(x, *indices, *flat)
        ctx.rows = [r if isinstance(r, slice) else None for r in rows]
        ctx.scales = scales
        ctx.mark_dirty(y)
        return _added(y, x, rows, scales, flat)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, *saved = ctx.saved_tensors
        flat = saved[len(saved) - 2 * len(ctx.rows) :]
        indices = iter(saved)
        low_rows = g.reshape(-1, g.shape[-1])
        dx = torch.zeros_like(x) if ctx.needs_input_grad[1] else None
        found: list[Tensor | None] = []
        for i, (known, scale) in enumerate(zip(ctx.rows, ctx.scales, strict=True)):
            a, b = flat[2 * i], flat[2 * i + 1]
            dtype = compute_dtype(x, a)
            mine = next(indices) if known is None else known
            a, b, low, into = a.to(dtype), b.to(dtype), low_rows[mine].to(dtype), x[mine].to(dtype)
            gu = (low @ b).mul_(scale)
            if dx is not None:
                step = (gu @ a).to(dx.dtype)
                if isinstance(mine, slice):
                    dx[mine] += step
                else:
                    dx.index_add_(0, mine, step)
            needs_a, needs_b = ctx.needs_input_grad[4 + 2 * i : 6 + 2 * i]
            found.append((gu.t() @ into).to(flat[2 * i].dtype) if needs_a else None)
            found.append((low.t() @ (into @ a.t())).mul_(scale).to(flat[2 * i + 1].dtype) if needs_b else None)
        return g, dx, None, None, *found
