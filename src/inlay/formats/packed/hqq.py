"""Half-quadratic quantisation (Badri and Shaji 2023) as ``HQQLinear`` writes it: ``W_q``, ``scale``, ``zero``, and a tensor for each
setting. What a code means is ``(code - zero) * scale``.

The weight, number after number, is a matrix of groups: rows of ``group_size``, or (axis 0) as many columns. Its codes are cut into as
many parts of equal length as there are codes in a word, and a word has one of each part, the first in its highest bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from torch import Tensor

from ...core.method import full
from ..streaming import Checkpoint, Entry, Files
from .weight import Numbers, Packed, Packing, slices

SETTINGS = (
    "nbits", "group_size", "shape", "axis", "packing", "unpack_view_dtype", "view_as_float", "quant_scale", "quant_zero",
    "compute_dtype", "offload_meta", "encoded_state_dict", "stores_quant_config", "channel_wise", "optimize", "round_zero",
)  # fmt: skip
# Bits of a code and of a word, and codes in a word, by what the file calls the packing.
PACKINGS = {"8bit_u8": (8, "U8", 1), "4bit_u8": (4, "U8", 2), "3bit_32": (3, "I32", 10), "2bit_u8": (2, "U8", 4), "1bit_u8": (1, "U8", 8)}
# Of the solver: the norm, its weight against the distance, and the number of steps.
NORM, BETA, STEPS = 0.7, 10.0, 20


@dataclass(frozen=True, eq=False)
class HQQ(Packed):
    """
    Attributes:
        packing_name: a key of `PACKINGS`.
        group: numbers that share a scale; 0 where all do.
        axis_of_groups: 1 where a group is a row of the matrix of groups, 0 where it is a column.
        most: the largest code.
        solve: fit zeros to the weight. round_zero: they are whole numbers at first.
        compute: the dtype in which codes become numbers.
    """

    packing_name: str = "4bit_u8"
    group: int = 64
    axis_of_groups: int = 1
    most: int = 15
    solve: bool = True
    round_zero: bool = False
    compute: torch.dtype = torch.float16

    @property
    def together(self) -> int:
        # The solver looks at the whole weight.
        return self.shape[0]

    # ---- reading --------------------------------------------------------------------------------------------------------
    def numbers(self, files: Files, rows: slice) -> Numbers:
        scales = {name: self.parts[name].read(files).reshape(-1) for name in ("scale", "zero")}
        return {"codes": self._codes(files, rows).view(-1, self.shape[1]), **self.spread(scales, rows)}

    def _codes(self, files: Files, rows: slice) -> Tensor:
        bits, word, parts = PACKINGS[self.packing_name]
        own = self.parts["codes"]
        size = own.nbytes // (1 if word == "U8" else 4)
        words = replace(own, dtype=word, shape=(size,))
        start, stop, found = rows.start * self.shape[1], rows.stop * self.shape[1], []
        for i in range(parts):
            first, last = max(start, i * size), min(stop, (i + 1) * size)
            if first < last:
                piece = words.read(files, slice(first - i * size, last - i * size))
                found.append((piece >> bits * (parts - 1 - i)).bitwise_and_(2**bits - 1).to(torch.uint8))
        return torch.cat(found)

    def spread(self, of_groups: Mapping[str, Tensor], rows: slice) -> Numbers:
        """The scale and the zero of each number of some rows."""
        width = self.shape[1]
        shape = rows.stop - rows.start, width
        if not self.group:
            return {name: t.expand(shape) for name, t in of_groups.items()}
        start, stop = rows.start * width, rows.stop * width
        if self.axis_of_groups and not start % self.group and not stop % self.group:
            whole = slice(start // self.group, stop // self.group)
            return {name: t[whole].unsqueeze(1).expand(-1, self.group).reshape(shape) for name, t in of_groups.items()}
        at = torch.arange(start, stop, dtype=torch.int32)
        at = at // self.group if self.axis_of_groups else at % (prod(self.shape) // self.group)
        return {name: t[at].view(shape) for name, t in of_groups.items()}

    def dense(self, numbers: Numbers) -> Tensor:
        return (numbers["codes"].to(self.compute) - numbers["zero"]) * numbers["scale"]

    # ---- writing --------------------------------------------------------------------------------------------------------
    def packing(self, files: Files) -> HQQPacking:
        return HQQPacking(self.stored, files)

    def in_file(self, numbers: Numbers) -> Numbers:
        bits, word, parts = PACKINGS[self.packing_name]
        codes = numbers["codes"]
        missing = -len(codes) % parts
        if missing:
            codes = torch.cat((codes, codes.new_zeros(missing, *codes.shape[1:])))
        words = 0
        for i, part in enumerate(codes.chunk(parts)):
            words = words | part.to(torch.uint8 if word == "U8" else torch.int32) << bits * (parts - 1 - i)
        assert isinstance(words, Tensor)
        return {**numbers, "codes": words.view(self.parts["codes"].torch_dtype)}


class HQQPacking(Packing):
    """A weight whose scales and zeros are found as HQQ finds them."""

    def add(self, w: Tensor) -> None:
        entry: Any = self.entry
        w = full(w)
        made = solved(w, entry)
        self.pieces.append(entry.in_file(made))
        codes, of_groups = made.pop("codes").view(w.shape), {n: t.to(entry.compute).reshape(-1) for n, t in made.items()}
        for rows in slices((len(w), w.shape[1] * 8)):
            now = entry.dense({"codes": codes[rows], **entry.spread(of_groups, rows)})
            self.weight += w[rows].square().sum(dtype=torch.float64).item()
            self.error += (w[rows] - now).square_().sum(dtype=torch.float64).item()


def solved(w: Tensor, to: HQQ) -> Numbers:
    """Codes (uint8), scale and zero of the groups of ``w``, float32.

    Scales span a group. Zeros minimise the ``NORM`` of what rounding leaves, which is split off and shrunk step by step, for as long
    as the weight comes nearer.
    """
    axis = to.axis_of_groups
    groups = w if not to.group else w.reshape(-1, to.group) if axis else w.reshape(to.group, -1)
    if to.group:
        low, high = groups.amin(axis, keepdim=True), groups.amax(axis, keepdim=True)
    else:
        low, high = groups.min().view(1, 1), groups.max().view(1, 1)
    reach = high - low
    scale = torch.where(reach <= 1e-4, 1.0, to.most / reach).clamp_(max=2e4)
    zero = -low * scale
    if to.round_zero:
        zero.round_()

    best = float("inf")
    for _ in range(STEPS if to.solve and to.group else 0):
        error, now = 0.0, torch.empty_like(zero)
        for at in _pieces(groups, axis):
            piece, s, z = groups[at], scale[at], zero[at]
            codes = (piece * s + z).round_().clamp_(0, to.most)
            rest = piece - (codes - z) / s
            size = rest.abs()
            error += size.sum(dtype=torch.float64).item()
            kept = size.sub_(size.pow(NORM - 1).mul_(1 / BETA)).clamp_min_(0).mul_(rest.sign())
            now[at] = (codes - (piece - kept) * s).mean(axis, keepdim=True)
        zero = now
        if error >= best:
            break
        best = error
    codes = torch.empty(groups.shape, dtype=torch.uint8)
    for at in _pieces(groups, axis) if to.group else [slice(None)]:
        codes[at] = (groups[at] * scale[at] + zero[at]).round_().clamp_(0, to.most).to(torch.uint8)
    return {"codes": codes, "scale": 1 / scale, "zero": zero}


def _pieces(groups: Tensor, axis: int) -> Iterator[tuple[slice, slice]]:
    """Some groups after others; a step of the solver has several tensors of their size."""
    count, size = groups.shape if axis else groups.mT.shape
    for at in slices((count, size * 8)):
        yield (at, slice(None)) if axis else (slice(None), at)


# ---- finding ------------------------------------------------------------------------------------------------------------------
def find(checkpoint: Checkpoint, _: Mapping[str, Any], files: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: the scales are quantised themselves, or the codes lie in another order.
    """
    tensors, found = checkpoint.tensors, []
    for key, codes in tensors.items():
        owner, end = key.rpartition(".")[::2]
        if end == "W_q":
            own = {"codes": codes} | {n: tensors[k] for n in ("scale", "zero", *SETTINGS) if (k := f"{owner}.{n}") in tensors}
            found.append(_one(f"{owner}.weight", own, files, dtype))
    return found


def _one(key: str, parts: Mapping[str, Entry], files: Files, dtype: torch.dtype) -> HQQ:
    said = {name: parts[name].read(files) for name in SETTINGS if name in parts}
    if "scale" not in parts or "zero" not in parts or any(said[n].item() for n in ("quant_scale", "quant_zero") if n in said):
        raise NotImplementedError(f"hqq, with quantised scales or zeros for {key!r}")
    layout = _text(said.get("packing"))
    if layout not in PACKINGS:
        raise NotImplementedError(f"hqq, with codes in the order of {layout!r} for {key!r}")
    bits, shape = said["nbits"].item(), tuple(said["shape"].tolist())
    whole = parts["scale"].shape in ((), (1,), (1, 1)) and not said.get("channel_wise", torch.tensor(1)).item()
    return HQQ.of(
        key, parts, shape, dtype,
        kind=f"hqq {bits:g} bits",
        packing_name=layout,
        group=0 if whole else int(said["group_size"].item()),
        axis_of_groups=int(said["axis"].item()),
        most=round(2**bits - 1),
        solve=bool(said.get("optimize", torch.tensor(1)).item()),
        round_zero=bool(said.get("round_zero", torch.tensor(0)).item()),
        compute=getattr(torch, _text(said.get("compute_dtype")).removeprefix("torch.") or "float16", torch.float16),
    )  # fmt: skip


def _text(codes: Tensor | None) -> str:
    return "" if codes is None else bytes(codes.tolist()).decode()
