"""Dropout masks that cost little to draw and an eighth of a byte an element to keep.

torch draws one number an element, which on a CPU costs more than a small layer's matrix product. Here a random byte decides:
an element is left out where it is not below ``256 * keep``. That is no whole number in general, so it is rounded up or down at
random, anew for every few hundred elements: the chance of each element is exactly ``keep``. Eight bytes of a 64-bit word are
compared at once, and their eight decisions packed into one byte, from which a small table makes factors again.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import Tensor

_ONES = 0x0101010101010101
_LOW = 0x7F7F7F7F7F7F7F7F  # all bits of a byte but the highest
_HIGH = -0x7F7F7F7F7F7F7F80  # 0x8080808080808080 as a signed number: the highest alone
_GATHER = 0x0002040810204081  # a product with it brings the highest bits of all eight bytes into the last
_ROWS = 1024


def draw_bits(x: Tensor, rate: float) -> Tensor:
    """One bit for each element of ``x``, set where it is left out.

    They come from the global generator of the device, so gradient checkpointing draws the same ones again.

    Args:
        rate: the chance of an element to be left out, in [0, 1).

    Returns:
        uint8, eight elements a byte.
    """
    keep = 1 - rate
    words = -(-x.numel() // 8)
    rows = min(_ROWS, words) or 1
    # The full range of 64 bits: bytes are then uniform.
    noise = torch.empty(rows, -(-words // rows), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    threshold = torch.rand(rows, 1, device=x.device).add_(256 * keep).floor_().long()
    # The highest bit of byte v is set in v & ((v & 127) + 256 - t) if and only if v >= t, where t >= 128; below that, in
    # v | ((v & 127) + 128 - t). No sum exceeds its byte.
    if keep >= 0.5:
        out = (noise & _LOW).add_((256 - threshold).mul_(_ONES)).bitwise_and_(noise)
    else:
        out = (noise & _LOW).add_((128 - threshold).mul_(_ONES)).bitwise_or_(noise)
    packed = out.bitwise_and_(_HIGH).mul_(_GATHER).bitwise_right_shift_(56)
    return packed.to(torch.uint8).view(-1)[:words]


def factors(bits: Tensor, rate: float, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What dropout multiplies each element with: zero, or ``1 / keep``."""
    # What has no numbers (`inlay.plan`) is not to be remembered.
    table = (_table if type(bits) is Tensor else _table.__wrapped__)(rate, dtype, bits.device)
    return table.index_select(0, bits.int()).view(-1)[: prod(shape)].view(shape)


@cache
def _table(rate: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight factors that each byte stands for."""
    left_out = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1
    return ((1 - left_out) / (1 - rate)).to(device, dtype)
