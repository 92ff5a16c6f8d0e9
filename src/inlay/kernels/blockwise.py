"""Blockwise quantisation: each block of consecutive numbers by its largest, rounded to the nearest of a few levels."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCK = 64


@cache
def normal_float_levels() -> Tensor:
    """The 16 levels of NF4: quantiles of a normal distribution, with zero among them, scaled to [-1, 1].

    Dettmers et al. 2023 (arXiv 2305.14314): 8 quantiles on the negative side and 9 on the positive one share the zero, and the
    outermost probability is the mean of those that 15 and 16 quantiles have.
    """
    outermost = 1 - (1 / 30 + 1 / 32) / 2

    def half(count: int) -> Tensor:
        return torch.special.ndtri(torch.linspace(outermost, 0.5, count, dtype=torch.float64))

    levels = torch.cat((-half(8), half(9)[:-1].flip(0)))
    return (levels / levels.abs().max()).float()


@cache
def uniform_levels(bits: int) -> Tensor:
    """``2 ** bits - 1`` evenly spaced levels on [-1, 1]; the same number on either side of zero."""
    most = 2 ** (bits - 1) - 1
    return torch.arange(-most, most + 1) / most


def quantize(w: Tensor, levels: Tensor, block: int = BLOCK) -> tuple[Tensor, Tensor]:
    """Codes (uint8, the shape of ``w``) and the blocks' scales (float32), in the order in which the numbers lie in memory.

    Args:
        w: any shape; the last block may be shorter.
        levels: rising, at most 256.
    """
    flat = w.detach().float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    scales = blocks.abs().amax(-1)
    levels = levels.to(w.device)
    middles = (levels[1:] + levels[:-1]) / 2
    codes = torch.bucketize(blocks / scales.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1), middles)
    return codes.to(torch.uint8).flatten()[: len(flat)].view(w.shape), scales


def dequantize(codes: Tensor, scales: Tensor, levels: Tensor, block: int = BLOCK) -> Tensor:
    """The numbers that codes and scales stand for, float32."""
    flat = levels.to(codes.device)[codes.flatten().int()]
    blocks = torch.nn.functional.pad(flat, (0, -len(flat) % block)).view(-1, block)
    return (blocks * scales.unsqueeze(-1)).flatten()[: len(flat)].view(codes.shape)


def rounded(w: Tensor, bits: int) -> Tensor:
    """What is left of a tensor that is stored in 4 bits (NF4, blocks of 64) or in 8 (evenly spaced, a scale a row), float32.

    Args:
        w: as its host keeps it.
    """
    if bits == 4:
        return dequantize(*quantize(w, normal_float_levels()), normal_float_levels())
    if bits == 8:
        scales = w.float().abs().amax(-1, keepdim=True) / 127
        return (w.float() / scales.clamp_min(torch.finfo(torch.float32).tiny)).round() * scales
    raise ValueError(f"There is no quantisation to {bits} bits here; use 4 (NF4) or 8.")
