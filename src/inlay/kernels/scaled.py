"""Numbers in eight bits each with a scale, and perhaps a zero, for each block of rows and columns: ``(code - zero) * scale``."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

Block = tuple[int, int]
# Numbers that are rounded at once.
AT_ONCE = 1 << 21
# Exponents without sign and fraction, one byte each.
EXPONENTS = (torch.uint8, torch.float8_e8m0fnu)


def spread(t: Tensor, block: Block, shape: torch.Size) -> Tensor:
    """What blocks have in common ``(*, blocks, blocks)``, for each number of ``shape (*, rows, columns)``."""
    for axis, size in zip((-2, -1), block, strict=True):
        if t.shape[axis] == 1:
            t = t.expand(*t.shape[:axis], shape[axis], *t.shape[t.ndim + axis + 1 :])
        elif size > 1:
            t = t.repeat_interleave(size, axis).narrow(axis, 0, shape[axis])
    return t


def factors(scale: Tensor) -> Tensor:
    """Scales as numbers, where they may be bare exponents."""
    return (scale.float() - 127).exp2() if scale.dtype == torch.uint8 else scale.float()


def extremes(w: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each block ``(*, blocks, blocks)``; edges may have less of it."""
    rows, columns = block
    if w.shape[-2] % rows or w.shape[-1] % columns:
        # Zeros lie between the two, or the scale does not matter.
        w = F.pad(w, (0, -w.shape[-1] % columns, 0, -w.shape[-2] % rows))
    w = w.unflatten(-1, (-1, columns)).unflatten(-3, (-1, rows))
    return w.amin((-3, -1)), w.amax((-3, -1))


def to_float8(w: Tensor, block: Block, dtype: torch.dtype, scales: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Codes in a floating-point ``dtype`` of eight bits, and a scale a block, such that the largest code is the dtype's largest.

    Args:
        w: float32.
        scales: the dtype of the scales; exponents are rounded up.
    """
    most = torch.finfo(dtype).max
    low, high = extremes(w, block)
    scale = torch.maximum(high, -low).clamp_(min=1e-12) / most
    if scales in EXPONENTS:
        exponent = scale.log2().ceil_()
        scale = (exponent + 127).to(scales) if scales == torch.uint8 else exponent.exp2().to(scales)
    else:
        scale = scale.to(scales)
    divisors, codes = spread(factors(scale), block, w.shape), torch.empty(w.shape, dtype=dtype, device=w.device)
    for some in _rows(w):
        codes[..., some, :] = (w[..., some, :] / divisors[..., some, :]).clamp_(-most, most).to(dtype)
    return codes, scale


def to_whole(
    w: Tensor, block: Block, levels: tuple[int, int], symmetric: bool, scales: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole codes (int8), and a scale and a zero (int8) a block.

    Args:
        w: float32.
        levels: the least and the largest code.
        symmetric: all zeros are 0.
        scales: the dtype of the scales.
    """
    first, last = levels
    low, high = extremes(w, block)
    reach = torch.maximum(high, -low) * 2 if symmetric else high.clamp(min=0) - low.clamp(max=0)
    scale = (reach / (last - first)).clamp_(min=torch.finfo(scales).tiny).to(scales)
    zero = torch.zeros_like(low) if symmetric else (first - (low.clamp(max=0) / scale).round_()).clamp_(first, last)
    by, zeros = spread(1.0 / scale.float(), block, w.shape), spread(zero, block, w.shape)
    codes = torch.empty(w.shape, dtype=torch.int8, device=w.device)
    for some in _rows(w):
        found = (w[..., some, :] * by[..., some, :]).round_().add_(zeros[..., some, :])
        codes[..., some, :] = found.clamp_(first, last).to(torch.int8)
    return codes, scale, zero.to(torch.int8)


def _rows(w: Tensor) -> Iterator[slice]:
    """Some rows after others, so that no second tensor in full precision is as large as ``w``."""
    count = w.shape[-2]
    step = max(1, AT_ONCE * count // max(1, w.numel()))
    for start in range(0, count, step):
        yield slice(start, start + step)
