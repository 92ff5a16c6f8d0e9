"""Numbers in 4 and 8 bits on a GPU: back to floating point, and products that read nothing but the codes.

A product with few rows takes as long as its weight takes to be read, which is a quarter of the bytes here, and no dequantised copy is
written. With more rows the arithmetic counts, and the vendor's product on a passing copy is the faster way.

Loaded only where triton is there. With ``TRITON_INTERPRET=1`` the kernels run on the CPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

# Up to so many rows a product reads the codes itself.
FEW_ROWS = 64


@triton.jit
def _number(codes, scales, levels, at, inside, block: tl.constexpr, bits: tl.constexpr):
    scale = tl.load(scales + at // block, mask=inside, other=0.0)
    if bits == 8:
        return tl.load(codes + at, mask=inside, other=0).to(tl.float32) * scale * (1 / 127)
    byte = tl.load(codes + at // 2, mask=inside, other=0).to(tl.int32)
    return tl.load(levels + tl.where(at % 2 == 0, byte >> 4, byte & 15)) * scale


@triton.jit
def _dequantize(codes, scales, levels, out, n, block: tl.constexpr, bits: tl.constexpr, size: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * size + tl.arange(0, size)
    inside = at < n
    number = _number(codes, scales, levels, at, inside, block, bits)
    tl.store(out + at, number.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _product(
    x,
    codes,
    scales,
    levels,
    y,
    rows,
    outs,
    depth,
    out_stride,
    depth_stride,
    block: tl.constexpr,
    bits: tl.constexpr,
    exact: tl.constexpr,
    row_tile: tl.constexpr,
    out_tile: tl.constexpr,
    depth_tile: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64) * row_tile + tl.arange(0, row_tile)
    out = tl.program_id(0).to(tl.int64) * out_tile + tl.arange(0, out_tile)
    total = tl.zeros((row_tile, out_tile), dtype=tl.float32)
    for start in range(0, depth, depth_tile):
        k = start + tl.arange(0, depth_tile)
        inputs = tl.load(x + row[:, None] * depth + k[None, :], mask=(row[:, None] < rows) & (k[None, :] < depth), other=0.0)
        inside = (k[:, None] < depth) & (out[None, :] < outs)
        w = _number(codes, scales, levels, out[None, :] * out_stride + k[:, None] * depth_stride, inside, block, bits)
        w = w.to(x.dtype.element_ty)
        if exact:
            total += tl.dot(inputs.to(tl.float32), w.to(tl.float32), input_precision="ieee")
        else:
            total += tl.dot(inputs, w)
    tl.store(y + row[:, None] * outs + out[None, :], total.to(y.dtype.element_ty), mask=(row[:, None] < rows) & (out[None, :] < outs))


def dequantize_on_gpu(codes: Tensor, scales: Tensor, levels: Tensor, block: int, out: Tensor) -> Tensor:
    """The numbers, written to ``out (n,)``.

    Args:
        codes: two a byte (uint8), or whole numbers of 8 bits (int8) with a block a row.
    """
    size, n = 1024, out.numel()
    kernel: Any = _dequantize[(triton.cdiv(n, size),)]
    kernel(codes, scales, levels, out, n, block, _bits(codes), size)
    return out


def product_on_gpu(x: Tensor, codes: Tensor, scales: Tensor, levels: Tensor, block: int, shape: tuple[int, ...], turned: bool) -> Tensor:
    """``x W'`` for ``x (rows, in)``, or ``x W`` for ``x (rows, out)``, with the codes of ``W (out, in)``; sums are in single precision.

    Args:
        shape: of ``W``. turned: it is ``x W'``.
    """
    count, width = shape
    outs, depth, strides = (count, width, (width, 1)) if turned else (width, count, (1, width))
    y = torch.empty(len(x), outs, dtype=x.dtype, device=x.device)
    # Few rows leave few programs; narrower tiles make them enough for the whole chip.
    row_tile, out_tile = (16, 16) if len(x) <= 16 else (FEW_ROWS, 64)
    exact = x.device.type == "cpu" or (x.dtype == torch.float32 and not torch.backends.cuda.matmul.allow_tf32)
    kernel: Any = _product[(triton.cdiv(outs, out_tile), triton.cdiv(len(x), row_tile))]
    kernel(x.contiguous(), codes, scales, levels, y, len(x), outs, depth, *strides, block, _bits(codes), exact, row_tile, out_tile, 64)
    return y


def _bits(codes: Tensor) -> int:
    return 8 if codes.dtype == torch.int8 else 4
