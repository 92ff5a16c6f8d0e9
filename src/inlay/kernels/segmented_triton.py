"""Low-rank updates of many adapters on one batch, on a GPU: a launch for all of their ``A``, and one for all of their ``B``.

The tokens are cut into tiles of one adapter each, and a program finds its adapter's factors by a table of pointers, so that nothing is
stacked, padded in memory or put in order: Punica (arXiv 2310.18547) and S-LoRA (2311.03285). Ranks are filled up with zeros on the chip.
The backward pass is the same two kernels with the factors changed about, and a third one for the factors' own gradients.

Loaded only where triton is there. With ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from .lowrank import compute_dtype
from .mixed import Rows

# Above this rank a product has enough to do by itself.
MOST_RANK = 256
COLUMNS = 64


@triton.jit
def _factor(table, adapter, r, k, rank, width, along_rank: tl.constexpr, dtype: tl.constexpr):
    """Elements (r, k) of an adapter's factor, which lies in memory as (rank, width) or, ``along_rank``, as (width, rank)."""
    start = tl.load(table + adapter).to(tl.pointer_type(dtype))  # pyright: ignore[reportArgumentType]
    at = k * rank + r if along_rank else r * width + k
    return tl.load(start + at, mask=(r < rank) & (k < width), other=0.0)


@triton.jit
def _tile(tokens, owner, first, bounds, tile: tl.constexpr):
    """Of the tile that a program does: the adapter, its positions, which of them it has, and the tokens that stand there."""
    adapter = tl.load(owner + tl.program_id(0))
    position = tl.load(first + tl.program_id(0)) + tl.arange(0, tile)
    inside = position < tl.load(bounds + adapter + 1)
    return adapter, position, inside, tl.load(tokens + position, mask=inside, other=0)


@triton.jit
def _shrink(
    x, tokens, owner, first, bounds, table, ranks, u, width,
    along_rank: tl.constexpr, dtype: tl.constexpr, compute: tl.constexpr, sums: tl.constexpr, precision: tl.constexpr,
    most: tl.constexpr, tile: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """``u[position] = F x[token]`` with the adapter's factor ``F (rank, width)``."""
    adapter, position, inside, token = _tile(tokens, owner, first, bounds, tile)  # pyright: ignore[reportGeneralTypeIssues]
    rank, r = tl.load(ranks + adapter), tl.arange(0, most)
    total = tl.zeros((tile, most), dtype=sums)
    for start in range(0, width, columns):
        k = start + tl.arange(0, columns)
        rows = tl.load(x + token[:, None] * width + k[None, :], mask=inside[:, None] & (k[None, :] < width), other=0.0)
        f = _factor(table, adapter, r[None, :], k[:, None], rank, width, along_rank, dtype)
        total += tl.dot(rows.to(compute), f.to(compute), input_precision=precision, out_dtype=sums)
    tl.store(u + position[:, None] * most + r[None, :], total, mask=inside[:, None])


@triton.jit
def _expand(
    u, tokens, owner, first, bounds, table, ranks, scales, y, width,
    along_rank: tl.constexpr, dtype: tl.constexpr, compute: tl.constexpr, sums: tl.constexpr, precision: tl.constexpr,
    most: tl.constexpr, tile: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """``y[token] += s F' u[position]`` with the adapter's factor ``F (rank, width)``; no token stands at two positions."""
    adapter, position, inside, token = _tile(tokens, owner, first, bounds, tile)  # pyright: ignore[reportGeneralTypeIssues]
    rank, r = tl.load(ranks + adapter), tl.arange(0, most)
    k = tl.program_id(1) * columns + tl.arange(0, columns)
    low = tl.load(u + position[:, None] * most + r[None, :], mask=inside[:, None], other=0.0)
    f = _factor(table, adapter, r[:, None], k[None, :], rank, width, along_rank, dtype)
    h = tl.dot(low.to(compute), f.to(compute), input_precision=precision, out_dtype=sums) * tl.load(scales + adapter)
    at = y + token[:, None] * width + k[None, :]
    mask = inside[:, None] & (k[None, :] < width)
    tl.store(at, (tl.load(at, mask=mask, other=0.0).to(sums) + h).to(y.dtype.element_ty), mask=mask)


@triton.jit
def _outer(
    u, v, tokens, bounds, offsets, ranks, scales, out, width,
    along_rank: tl.constexpr, compute: tl.constexpr, sums: tl.constexpr, precision: tl.constexpr,
    most: tl.constexpr, tile: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """``s u' v`` over the tokens of each adapter: the gradient of a factor ``(rank, width)``."""
    adapter = tl.program_id(0)
    begin, end = tl.load(bounds + adapter), tl.load(bounds + adapter + 1)
    rank, r = tl.load(ranks + adapter), tl.arange(0, most)
    k = tl.program_id(1) * columns + tl.arange(0, columns)
    total = tl.zeros((most, columns), dtype=sums)
    for start in range(begin, end, tile):
        position = start + tl.arange(0, tile)
        inside = position < end
        token = tl.load(tokens + position, mask=inside, other=0)
        low = tl.load(u + position[None, :] * most + r[:, None], mask=inside[None, :], other=0.0)
        rows = tl.load(v + token[:, None] * width + k[None, :], mask=inside[:, None] & (k[None, :] < width), other=0.0)
        total += tl.dot(low.to(compute), rows.to(compute), input_precision=precision, out_dtype=sums)
    at = k[None, :] * rank + r[:, None] if along_rank else r[:, None] * width + k[None, :]
    total = total * tl.load(scales + adapter)
    tl.store(out + tl.load(offsets + adapter) * width + at, total.to(out.dtype.element_ty), mask=(r[:, None] < rank) & (k[None, :] < width))


# ---- tables -------------------------------------------------------------------------------------------------------------------------
class Tiles(NamedTuple):
    """Where the tokens of the adapters are.

    Attributes:
        tokens: at each position, one adapter's after another's. bounds: each adapter's first position, and the end.
        owner, first: each tile's adapter and its first position. size: the positions of a tile.
    """

    tokens: Tensor
    bounds: Tensor
    owner: Tensor
    first: Tensor
    size: int


@lru_cache(256)
def tiles(rows: Rows, times: int, device: torch.device) -> Tiles:
    tokens = [row * times + i for mine in rows for row in mine for i in range(times)]
    bounds = [0]
    for mine in rows:
        bounds.append(bounds[-1] + len(mine) * times)
    size = 64 if max(len(mine) for mine in rows) * times > 16 else 16
    cut = [(i, start) for i in range(len(rows)) for start in range(bounds[i], bounds[i + 1], size)]
    on = partial(torch.tensor, dtype=torch.int64, device=device)
    return Tiles(on(tokens), on(bounds), on([i for i, _ in cut]), on([start for _, start in cut]), size)


@lru_cache(8192)
def _on_device(numbers: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=dtype, device=device)


def disjoint(rows: Rows) -> list[list[int]]:
    """The adapters in groups in which no row has two of them: what two programs add to at once would be lost."""
    groups: list[tuple[set[int], list[int]]] = []
    for i, mine in enumerate(rows):
        taken, members = next((g for g in groups if g[0].isdisjoint(mine)), (None, None))
        if taken is None or members is None:
            taken, members = set(), []
            groups.append((taken, members))
        taken.update(mine)
        members.append(i)
    return [members for _, members in groups]


_NAMES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def fits(x: Tensor, factors: Sequence[Tensor]) -> bool:
    """Whether these kernels can be used: factors of one dtype, as they lie in memory, and of small rank."""
    first = factors[0]
    return (
        x.dtype in _NAMES
        and first.dtype in _NAMES
        and all(t.dtype == first.dtype and t.device == x.device and t.is_contiguous() for t in factors)
        and max(min(t.shape) for t in factors) <= MOST_RANK
    )


class _Group:
    """The adapters of a group on their tokens, and the launches."""

    def __init__(self, x: Tensor, rows: Rows, times: int, scales: Sequence[float], flat: Sequence[Tensor]) -> None:
        self.a, self.b = flat[::2], flat[1::2]
        self.device, self.dtype = x.device, self.a[0].dtype
        sums = torch.float64 if self.dtype == torch.float64 else torch.float32
        compute = sums if self.device.type == "cpu" else compute_dtype(x, self.a[0])
        self.where = tiles(rows, times, self.device)
        ranks = tuple(len(a) for a in self.a)
        self.ranks = _on_device(ranks, torch.int64, self.device)
        self.offsets = _on_device(tuple(sum(ranks[:i]) for i in range(len(ranks))), torch.int64, self.device)
        self.count, self.scales, self.sums = ranks, _on_device(tuple(scales), sums, self.device), sums
        self.most = max(16, 1 << (max(ranks) - 1).bit_length())
        tf32 = self.device.type == "cuda" and torch.backends.cuda.matmul.allow_tf32
        self.numerics = {"compute": _NAMES[compute], "sums": _NAMES[sums], "precision": "tf32" if tf32 else "ieee"}
        self.sizes = {"most": self.most, "tile": self.where.size, "columns": COLUMNS}

    def _table(self, factors: Sequence[Tensor]) -> Tensor:
        return _on_device(tuple(t.data_ptr() for t in factors), torch.int64, self.device)

    def shrink(self, x: Tensor, factors: Sequence[Tensor], along_rank: bool) -> Tensor:
        where, width = self.where, x.shape[-1]
        u = torch.empty(len(where.tokens), self.most, dtype=self.sums, device=self.device)
        if len(where.owner):
            kernel: Any = _shrink[(len(where.owner),)]
            kernel(
                x, where.tokens, where.owner, where.first, where.bounds, self._table(factors), self.ranks, u, width,
                along_rank=along_rank, dtype=_NAMES[self.dtype], **self.numerics, **self.sizes,
            )  # fmt: skip
        return u

    def expand(self, y: Tensor, u: Tensor, factors: Sequence[Tensor], along_rank: bool) -> None:
        where, width = self.where, y.shape[-1]
        if len(where.owner):
            kernel: Any = _expand[(len(where.owner), triton.cdiv(width, COLUMNS))]
            kernel(
                u, where.tokens, where.owner, where.first, where.bounds, self._table(factors), self.ranks, self.scales, y, width,
                along_rank=along_rank, dtype=_NAMES[self.dtype], **self.numerics, **self.sizes,
            )  # fmt: skip

    def outer(self, u: Tensor, v: Tensor, along_rank: bool) -> list[Tensor]:
        where, width = self.where, v.shape[-1]
        out = torch.empty(sum(self.count) * width, dtype=self.dtype, device=self.device)
        kernel: Any = _outer[(len(self.count), triton.cdiv(width, COLUMNS))]
        kernel(
            u, v, where.tokens, where.bounds, self.offsets, self.ranks, self.scales, out, width,
            along_rank=along_rank, **self.numerics, **self.sizes,
        )  # fmt: skip
        shapes = [(width, rank) if along_rank else (rank, width) for rank in self.count]
        return [part.view(shape) for part, shape in zip(out.split([rank * width for rank in self.count]), shapes, strict=True)]


def _groups(x: Tensor, rows: Rows, times: int, scales: Sequence[float], flat: Sequence[Tensor]) -> list[tuple[list[int], _Group]]:
    found = []
    for members in disjoint(rows):
        own = [t for i in members for t in flat[2 * i : 2 * i + 2]]
        found.append((members, _Group(x, tuple(rows[i] for i in members), times, [scales[i] for i in members], own)))
    return found


# ---- the update and its gradients ---------------------------------------------------------------------------------------------------
def add(y: Tensor, x: Tensor, rows: Rows, times: int, scales: Sequence[float], flat: Sequence[Tensor]) -> Tensor:
    """``y[rows] += s x[rows] A' B'`` for each adapter, in place.

    Args:
        y: ``(*, out)``, contiguous. x: ``(tokens, in)``.
        rows: of the batch, for each adapter. times: the tokens of a row, which stand side by side.
        flat: ``a (r, in)`` and ``b (out, r)`` of each adapter, one after another.
    """
    x, into = x.contiguous(), y.view(-1, y.shape[-1])
    for _, group in _groups(x, rows, times, scales, flat):
        group.expand(into, group.shrink(x, group.a, False), group.b, True)
    return y


def gradients(
    g: Tensor,
    x: Tensor,
    rows: Rows,
    times: int,
    scales: Sequence[float],
    flat: Sequence[Tensor],
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, list[Tensor | None]]:
    """What goes to ``x`` and to the factors.

    Args:
        g: ``(tokens, out)``, of the output.
        needs: whether ``x``, an ``a`` and a ``b`` ask for theirs.
    """
    g, x = g.contiguous(), x.contiguous()
    dx = torch.zeros_like(x) if needs[0] else None
    found: list[Tensor | None] = [None] * len(flat)
    for members, group in _groups(x, rows, times, scales, flat):
        gu = group.shrink(g, group.b, True)
        if dx is not None:
            group.expand(dx, gu, group.a, False)
        if needs[1]:
            for i, da in zip(members, group.outer(gu, x, False), strict=True):
                found[2 * i] = da
        if needs[2]:
            for i, db in zip(members, group.outer(group.shrink(x, group.a, False), g, True), strict=True):
                found[2 * i + 1] = db
    return dx, found
