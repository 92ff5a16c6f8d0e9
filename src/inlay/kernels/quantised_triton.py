"""Codes of 4 bits on a GPU: back to numbers, and the product with few rows, which reads nothing but the codes.

Loaded only where triton is there. With ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor


@triton.jit
def _number(codes, scales, levels, at, inside, block: tl.constexpr):
    byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    code = tl.where(at % 2 == 0, byte >> 4, byte & 15)
    return tl.load(levels + code) * tl.load(scales + at // block, mask=inside, other=0.0)


@triton.jit
def _dequantize(codes, scales, levels, out, n, block: tl.constexpr, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < n
    tl.store(out + at, _number(codes, scales, levels, at, inside, block), mask=inside)


@triton.jit
def _few_rows(
    x,
    codes,
    scales,
    levels,
    y,
    count,
    width,
    block: tl.constexpr,
    outs: tl.constexpr,
    size: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    out = tl.program_id(0).to(tl.int64) * outs + tl.arange(0, outs)
    total = tl.zeros((outs,), dtype=tl.float32)
    for start in range(0, width, size):
        column = start + tl.arange(0, size)
        inside = (out[:, None] < count) & (column[None, :] < width)
        w = _number(codes, scales, levels, out[:, None] * width + column[None, :], inside, block)
        inputs = tl.load(x + row * width + column, mask=column < width, other=0.0).to(tl.float32)
        total += tl.sum(w * inputs[None, :], axis=1)
    tl.store(y + row * count + out, total, mask=out < count)


def dequantize_on_gpu(codes: Tensor, scales: Tensor, levels: Tensor, block: int, n: int, out: Tensor) -> Tensor:
    """The ``n`` numbers, written to ``out (n,)``."""
    size = 1024
    _dequantize[(triton.cdiv(n, size),)](codes, scales, levels, out, n, block, size)  # pyright: ignore[reportIndexIssue]
    return out


def few_rows_on_gpu(x: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, block: int, shape: tuple[int, ...]) -> Tensor:
    """``x W'`` for a few rows ``x (rows, in)`` and the codes of ``W (out, in)``; sums are in single precision."""
    count, width = shape
    y = torch.empty(len(x), count, dtype=x.dtype, device=x.device)
    outs = 16
    _few_rows[(triton.cdiv(count, outs), len(x))](x.contiguous(), codes, scales, levels, y, count, width, block, outs, 128)  # pyright: ignore[reportIndexIssue]
    return y
