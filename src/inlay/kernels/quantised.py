"""Numbers in 4 and 8 bits: levels, scales, and back. The codes and scales of NF4 and FP4 are bitsandbytes' to the bit.

Four bits: each block of consecutive numbers by its largest magnitude (``absmax``), rounded to the nearest of 16 levels, two codes
a byte, the first in the upper half. Double quantisation (Dettmers et al. 2023, arXiv 2305.14314) keeps the scales themselves in 8
bits: less their mean, in blocks of 256, on the dynamic levels of Dettmers et al. 2021 (2110.02861). Eight bits: a row of whole
numbers by its largest magnitude.

On the CPU both ways go by tables and in pieces that stay in the cache: a byte of two codes is looked up as the pair of its levels,
and the code of a number is looked up by the upper half of its bits.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Numbers that are handled at a time: in single precision half a megabyte, which stays in the cache.
PIECE = 1 << 17
# Scales in one block of the double quantisation.
NESTED = 256
TINY = 1e-38

# The quantiles of a normal distribution with zero among them, as the authors' table has them.
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
# A sign, two bits of exponent and one of fraction, by code.
_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)

LEVELS: dict[str, tuple[float, ...]] = {
    "nf4": _NF4,
    "fp4": (*(v / 12 for v in _FP4), *(-v / 12 for v in _FP4)),
    # Evenly spaced, as many on either side of zero; the last code is not used.
    "int4": (*(v / 7 for v in range(-7, 8)), 1.0),
}
FORMATS = (*LEVELS, "int8")


def check(to: str, block: int) -> None:
    """
    Raises:
        ValueError: there is no such format, or no such block.
    """
    if to not in FORMATS:
        from ..core.config import nearest

        raise ValueError(f"There is no quantisation to {to!r}; use one of {', '.join(map(repr, FORMATS))}.{nearest(to, FORMATS)}")
    if block < 2 or block & (block - 1):
        raise ValueError(f"A block has a power of two of numbers, at least 2, not {block}.")


@cache
def has_triton() -> bool:
    return find_spec("triton") is not None


# ---- tables -----------------------------------------------------------------------------------------------------------------------
@cache
def levels(to: str, device: torch.device) -> Tensor:
    """The level of each code, float32."""
    return torch.tensor(LEVELS[to], dtype=torch.float32, device=device)


@cache
def dynamic_levels(device: torch.device) -> Tensor:
    """The 256 levels of a signed number with a dynamic exponent: the smaller its magnitude, the fewer bits are its fraction's."""
    found = [0.0, 1.0]
    for exponent in range(7):
        bounds = torch.linspace(0.1, 1, 2**exponent + 1, dtype=torch.float32)
        middles = 10 ** (exponent - 6) * ((bounds[:-1] + bounds[1:]) / 2)
        found += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(found), dtype=torch.float32, device=device)


def pairs(to: str, device: torch.device) -> Tensor:
    """The two levels of each byte ``(256, 2)``."""
    by_code = LEVELS[to]
    return torch.tensor([(by_code[byte >> 4], by_code[byte & 15]) for byte in range(256)], dtype=torch.float32, device=device)


kept_pairs = cache(pairs)


def traced(t: Tensor) -> bool:
    """Whether this is a stand-in for a tensor, of which nothing may be kept and to which nothing can be written."""
    return torch.compiler.is_compiling() or type(t) not in (Tensor, nn.Parameter) or t.device.type == "meta"


@cache
def _sorted(to: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The middles between neighbouring levels, rising, and the codes of the levels in that order."""
    by_code = levels(to, device)
    order = by_code.argsort(stable=True)
    return (by_code[order[1:]] + by_code[order[:-1]]) / 2, order


@cache
def _by_upper_half(to: str) -> tuple[Tensor, Tensor, Tensor]:
    """By the upper 16 bits of a number, taken as a signed number: the middle that lies among the numbers with those bits, the code
    below and the code above it. The lower bits of the number decide between them, so the look-up is exact."""
    upper = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32) << 16
    ends = torch.stack((upper, upper | 0xFFFF)).view(torch.float32).nan_to_num().sort(0).values
    middles, order = _sorted(to, torch.device("cpu"))
    place = torch.bucketize(ends, middles)
    middle = torch.cat((middles, torch.tensor([torch.inf])))[place[0]]
    below, above = order[place].to(torch.uint8)
    return middle, below, above


# ---- to codes ---------------------------------------------------------------------------------------------------------------------
def quantize_blocks(w: Tensor, to: str, block: int) -> tuple[Tensor, Tensor]:
    """Codes ``(ceil(n / 2), 1)``, two a byte, and the blocks' largest magnitudes, of the numbers in the order of memory.

    Args:
        w: any shape and floating dtype; the last block may be shorter.
    """
    flat = w.detach().reshape(-1)
    n, device = len(flat), w.device
    codes = torch.empty(-(-n // 2), 1, dtype=torch.uint8, device=device)
    scales = torch.empty(-(-n // block), dtype=torch.float32, device=device)
    step = max(PIECE, block) if device.type == "cpu" else max(n, 2)
    for start in range(0, n, step):
        piece = flat[start : start + step].float()
        whole = len(piece) // block * block
        largest = scales[start // block : -(-(start + len(piece)) // block)]
        grid = piece[:whole].view(-1, block)
        torch.amax(grid.abs(), -1, out=largest[: len(grid)])
        parts = [(grid * (1.0 / largest[: len(grid)].clamp_min(TINY)).unsqueeze(-1)).view(-1)]
        if whole < len(piece):
            # bitsandbytes divides here.
            largest[-1] = piece[whole:].abs().max().clamp_min(TINY)
            parts.append(piece[whole:] / largest[-1])
        nibbles = _codes(torch.cat(parts) if len(parts) > 1 else parts[0], to)
        if len(nibbles) % 2:
            # The half of the last byte that is left over holds a zero.
            nibbles = torch.cat((nibbles, _codes(nibbles.new_zeros(1, dtype=torch.float32), to)))
        # Two codes as one number of 16 bits, of which a byte is left: the first is its lower half.
        both = nibbles.view(torch.int16)
        codes[start // 2 : start // 2 + len(both), 0] = (both << 4).bitwise_or_(both >> 8).to(torch.uint8)
    return codes, scales


def _codes(scaled: Tensor, to: str) -> Tensor:
    if scaled.device.type != "cpu":
        middles, order = _sorted(to, scaled.device)
        return order[torch.bucketize(scaled, middles, out_int32=True)].to(torch.uint8)
    index = (scaled.view(torch.int32) >> 16).add_(1 << 15)
    middle, below, above = (t.index_select(0, index) for t in _by_upper_half(to))
    return torch.where(scaled > middle, above, below)


def quantize_scales(scales: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantisation: codes of the scales (uint8), their blocks' largest magnitudes, and the mean that was taken off."""
    offset = scales.mean()
    rest = scales - offset
    blocks = F.pad(rest, (0, -len(rest) % NESTED)).view(-1, NESTED)
    largest, by_code = blocks.abs().amax(-1), dynamic_levels(scales.device)
    # bitsandbytes rounds to one of 65536 even steps, for its look-up, and that to the nearest level.
    even = ((blocks * (1 / largest).unsqueeze(-1) + 1) * 32767.5 + 0.5).floor() / 32767.5 - 1
    codes = torch.bucketize(even, (by_code[1:] + by_code[:-1]) / 2)
    # A scaled zero of a block of zeros is no number.
    codes = codes.masked_fill_(largest.unsqueeze(-1) == 0, 0).to(torch.uint8)
    return codes.view(-1)[: len(scales)].clone(), largest, offset


def dequantize_scales(codes: Tensor, largest: Tensor, offset: Tensor, by_code: Tensor) -> Tensor:
    """The scales that `quantize_scales` kept, float32.

    Args:
        by_code: the level of each code, `dynamic_levels` or those of a file.
    """
    found = by_code[codes.int()]
    blocks = F.pad(found, (0, -len(found) % NESTED)).view(-1, NESTED) * largest.unsqueeze(-1)
    return blocks.view(-1)[: len(codes)] + offset


def quantize_rows(w: Tensor) -> tuple[Tensor, Tensor]:
    """Whole numbers (int8, the shape of ``w``) and the largest magnitude of each row ``(rows,)``."""
    rows = w.detach().reshape(-1, w.shape[-1])
    codes = torch.empty(rows.shape, dtype=torch.int8, device=w.device)
    largest = torch.empty(len(rows), dtype=torch.float32, device=w.device)
    step = max(PIECE // rows.shape[-1], 1) if w.device.type == "cpu" else max(len(rows), 1)
    for start in range(0, len(rows), step):
        piece = rows[start : start + step].float()
        torch.amax(piece.abs(), -1, out=largest[start : start + step])
        codes[start : start + step] = (piece * (127 / largest[start : start + step].clamp_min(TINY)).unsqueeze(-1)).round_()
    return codes.view(w.shape), largest


# ---- and back ---------------------------------------------------------------------------------------------------------------------
def dequantize_blocks(codes: Tensor, scales: Tensor, to: str, block: int, n: int, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """The ``n`` numbers ``(n,)`` that codes and scales stand for.

    Args:
        codes: two a byte, any shape; uint8. scales: ``(blocks,)``, float32.
        out: a contiguous ``(n,)`` to write to.
    """
    flat = codes.reshape(-1)
    if traced(flat):
        return _formula(flat, scales, to, block, n).to(dtype)
    if out is None:
        out = torch.empty(n, dtype=dtype, device=flat.device)
    if flat.device.type == "cuda":
        if has_triton():
            from .quantised_triton import dequantize_on_gpu

            return dequantize_on_gpu(flat, scales, levels(to, flat.device), block, out)
        return out.copy_(_formula(flat, scales, to, block, n))
    if flat.device.type != "cpu":
        return out.copy_(_formula(flat, scales, to, block, n))
    # A pair of single-precision numbers is copied as one of eight bytes.
    table = kept_pairs(to, flat.device).view(torch.int64).view(-1)
    whole, step = n // block * block, max(PIECE, block)
    exact = out.dtype == torch.float32
    buffer = out if exact else torch.empty(min(step, whole), dtype=torch.float32)
    for start in range(0, whole, step):
        stop = min(start + step, whole)
        numbers = buffer[start:stop] if exact else buffer[: stop - start]
        torch.index_select(table, 0, flat[start // 2 : stop // 2].int(), out=numbers.view(torch.int64))
        numbers.view(-1, block).mul_(scales[start // block : stop // block].unsqueeze(-1))
        if not exact:
            out[start:stop] = numbers
    if whole < n:
        out[whole:] = _formula(flat[whole // 2 :], scales[whole // block :], to, block, n - whole)
    return out


def _formula(codes: Tensor, scales: Tensor, to: str, block: int, n: int) -> Tensor:
    numbers = F.embedding(codes.int(), (pairs if traced(codes) else kept_pairs)(to, codes.device)).reshape(-1)[:n]
    return (F.pad(numbers, (0, -n % block)).view(-1, block) * scales.unsqueeze(-1)).reshape(-1)[:n]


def dequantize_rows(codes: Tensor, largest: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """What `quantize_rows` kept: ``(rows, width)``.

    Args:
        codes: ``(rows, width)``, int8. largest: ``(rows,)``, float32.
        out: ``(rows, width)`` to write to.
    """
    if codes.device.type == "cuda" and has_triton() and not traced(codes):
        from .quantised_triton import dequantize_on_gpu

        out = torch.empty(codes.shape, dtype=dtype, device=codes.device) if out is None else out
        return dequantize_on_gpu(codes.contiguous(), largest, largest, codes.shape[-1], out)
    numbers = out.copy_(codes) if out is not None and out.dtype == torch.float32 else codes.float()
    numbers = numbers * largest.unsqueeze(-1) * (1 / 127) if out is None else numbers.mul_(largest.unsqueeze(-1)).mul_(1 / 127)
    return numbers.to(dtype) if out is None else (out if numbers is out else out.copy_(numbers))


def rounded(w: Tensor, to: str, block: int = 64, double: bool = False, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is left of a tensor that is stored in a format, in its shape."""
    if to == "int8":
        codes, largest = quantize_rows(w)
        return dequantize_rows(codes.view(-1, w.shape[-1]), largest, dtype).view(w.shape)
    codes, scales = quantize_blocks(w, to, block)
    if double:
        scales = dequantize_scales(*quantize_scales(scales), dynamic_levels(w.device))
    return dequantize_blocks(codes, scales, to, block, w.numel(), dtype).view(w.shape)
