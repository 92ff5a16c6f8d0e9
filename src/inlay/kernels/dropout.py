"""Dropout masks that cost little to draw and an eighth of a byte an element to keep.

torch draws one random number an element, which on a CPU costs more than a small layer's matrix product. Here a byte decides:
kept where it is below a threshold. ``256 * (1 - rate)`` is no whole number in general, so the threshold is one of its two
neighbours at random, which makes the chance of each element exactly ``1 - rate``. Eight decisions are packed into one byte,
which is faster to unpack than any mask is to draw again from its seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

_PACK = 0x0102040810204080
_SPREAD = 0x0101010101010101
_PICK = -0x7FBFDFEFF7FBFDFF  # 0x8040201008040201 as a signed number: one bit in each byte


@dataclass(frozen=True)
class Mask:
    """Which elements of a tensor are kept.

    Attributes:
        bits: uint8, eight elements a byte.
        keep: the chance of an element, in (0, 1].
    """

    bits: Tensor | None
    keep: float

    def drop(self, x: Tensor) -> Tensor:
        """``x`` with the left-out elements zero and the others divided by `keep`."""
        assert self.bits is not None
        spread = (self.bits.to(torch.int64) * _SPREAD) & _PICK
        kept = spread.view(torch.uint8)[: x.numel()].view(x.shape) != 0
        return (x * kept).mul_(1 / self.keep) if not (torch.is_grad_enabled() and x.requires_grad) else x * kept / self.keep

    def without_bits(self) -> Mask:
        return replace(self, bits=None)

    def with_bits(self, bits: Tensor) -> Mask:
        return replace(self, bits=bits)


def draw_mask(x: Tensor, rate: float) -> Mask:
    """A mask for ``x`` from the global generator of its device, so that gradient checkpointing draws the same one again.

    Args:
        rate: the chance of an element to be left out, in [0, 1).
    """
    keep = 1 - rate
    words = -(-x.numel() // 8)
    noise = torch.empty(words, dtype=torch.int64, device=x.device)
    # The full range of 64 bits: bytes are then uniform.
    noise.random_(-(2**63), None)
    threshold = torch.rand((), device=x.device).add_(256 * keep).floor_()
    kept = noise.view(torch.uint8) < threshold
    packed = (kept.view(torch.int64) * _PACK) >> 56
    return Mask(packed.to(torch.uint8), keep)
