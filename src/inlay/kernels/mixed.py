"""Low-rank updates of several adapters on the rows of one batch: the base's product is done once, for all rows.

Prefill and training go by segments, ``y[rows] += s x[rows] A' B'`` for each adapter. With few tokens, as in decoding, what costs is
reading the adapters and calling: there the factors of all adapters stand side by side, ``y += ((x A') * m) B'``, and the mask m
leaves to each row its own columns of the rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .lowrank import accumulate, compute_dtype, rows_of

# Up to so many tokens the factors side by side are faster than a pair of products an adapter.
FEW_TOKENS = 96

Rows = slice | Tensor


class Side:
    """The factors of several adapters side by side: ``a (n, in)`` and ``b (n, out)``, with ``n`` the sum of the ranks."""

    def __init__(self, factors: Sequence[tuple[Tensor, Tensor, float]], rows: Sequence[Sequence[int]], batch: int) -> None:
        ranks = [a.shape[0] for a, _, _ in factors]
        self.a = torch.cat([a.detach() for a, _, _ in factors])
        self.b = torch.cat([b.detach().t() for _, b, _ in factors]).contiguous()
        self.mask = torch.zeros(batch, sum(ranks), dtype=self.a.dtype)
        start = 0
        for rank, mine, (_, _, scale) in zip(ranks, rows, factors, strict=True):
            self.mask[list(mine), start : start + rank] = scale
            start += rank
        self.mask = self.mask.to(self.a.device)

    def add_to(self, y: Tensor, x: Tensor) -> Tensor:
        """``y += ((x A') * m) B'`` in place.

        Args:
            y: ``(tokens, out)``. x: ``(tokens, in)``; the tokens of a row stand side by side.
        """
        u = rows_of(x, self.a.dtype) @ self.a.t()
        u = (u.view(len(self.mask), -1, u.shape[-1]) * self.mask.unsqueeze(1)).view(u.shape)
        return accumulate(y, u, self.b)


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
        u = x[mine].to(dtype) @ a.to(dtype).t()
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
