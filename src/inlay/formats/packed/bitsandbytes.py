"""Weights in 4 and 8 bits as bitsandbytes writes them: the names and numbers that `inlay.quantize_` shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.method import full
from ...kernels.quantised import dequantize_blocks, dequantize_rows, dequantize_scales, dynamic_levels, quantize_scales
from ...kernels.quantised_tensor import QuantizedTensor
from ...quantize import ENDS
from ..streaming import Checkpoint, Entry, Files
from .weight import Packed, Packing

STATE = "quant_state."
# Spaces behind a description, so that it can name another offset in the room that its header has promised.
ROOM = 32


@dataclass(frozen=True, eq=False)
class Blocks(Packed):
    """
    Attributes:
        parts: by the end of their keys; ``""`` are the codes.
        described: what a file in 4 bits says of the weight; empty for 8 bits.
    """

    described: Mapping[str, Any] = field(default_factory=dict)

    def read(self, files: Files, rows: slice | None = None) -> Tensor:
        """The weight, or some of its rows, in floating point."""
        if rows is not None and self.sliceable and len(self.shape) == 2:
            return self._rows(files, rows)
        found = self.quantised(files).dequantize().contiguous()
        return found if rows is None else found[rows]

    def quantised(self, files: Files) -> QuantizedTensor:
        return QuantizedTensor.from_file({end: e.read(files) for end, e in self.parts.items()}, self.transposed, self.torch_dtype)

    def _rows(self, files: Files, rows: slice) -> Tensor:
        codes, width = self.parts[""], self.shape[1]
        if not self.described:
            return dequantize_rows(codes.read(files, rows), self.parts["SCB"].read(files, rows).float(), self.torch_dtype)
        block = self.described["blocksize"]
        # A piece begins and ends with a block.
        together = block // gcd(block, width)
        start, stop = rows.start // together * together, min(self.shape[0], -(-rows.stop // together) * together)
        scales = QuantizedTensor.from_file(
            {end: e.read(files) if end else torch.empty(-(-prod(self.shape) // 2), dtype=torch.uint8) for end, e in self.parts.items()},
            False,
            self.torch_dtype,
        ).scales
        first, last = start * width // 2, -(-stop * width // 2)
        bytes_of = Entry(codes.key, codes.file, "U8", (last - first,), codes.start + first, last - first)
        scales = scales[start * width // block : -(-stop * width // block)]
        n, to = (stop - start) * width, self.described["quant_type"]
        found = dequantize_blocks(bytes_of.read(files), scales, to, block, n, self.torch_dtype)
        return found.view(-1, width)[rows.start - start : rows.stop - start]

    # ---- writing ------------------------------------------------------------------------------------------------------
    def written(self) -> list[Entry]:
        """The tensors of a file that holds another weight in this way."""
        return [
            replace(e, shape=(e.shape[0] + ROOM,), nbytes=e.nbytes + ROOM) if end.startswith(STATE) else e for end, e in self.parts.items()
        ]

    def packing(self, files: Files) -> BlocksPacking:
        return BlocksPacking(self, files)

    @property
    def together(self) -> int:
        """A multiple of so many stored rows begins and ends with a block."""
        block = self.described.get("blocksize", 1)
        return block // gcd(block, self.stored.shape[-1])

    def as_parts(self, q: QuantizedTensor) -> dict[str, Tensor]:
        """The tensors of the file by their keys."""
        made, found = q.to_file(), {}
        for end, entry in self.parts.items():
            if end.startswith(STATE):
                said = dict(self.described)
                if q.offset is not None:
                    said["nested_offset"] = q.offset.item()
                text = json.dumps(said).encode().ljust(entry.nbytes + ROOM)
                found[entry.key] = torch.tensor(list(text), dtype=torch.uint8)
                continue
            tensor = made[end].contiguous()
            # Codes may be stored as numbers of another width.
            same = tensor.dtype.itemsize == entry.torch_dtype.itemsize and end != ""
            found[entry.key] = tensor.to(entry.torch_dtype).reshape(entry.shape) if same else _as_bytes_of(tensor, entry)
        return found


class BlocksPacking(Packing):
    """The scales of all rows are quantised together in the end."""

    def __init__(self, entry: Blocks, files: Files) -> None:
        super().__init__(entry, files)
        self.entry: Blocks = entry
        self.made: list[QuantizedTensor] = []
        # By blocks: the error that there is without double quantisation, and what follows from other scales.
        self.sums: list[Tensor] = []

    def add(self, w: Tensor) -> None:
        block = self.entry.described.get("blocksize", 64)
        q = QuantizedTensor.of(w, self.entry.kind, block=block, double=False)
        self.made.append(q)
        now = q.dequantize(torch.float32)
        rest = full(w) - now
        self.weight += full(w).square().sum(dtype=torch.float64).item()
        if "nested_absmax" not in self.entry.parts:
            self.error += rest.square().sum(dtype=torch.float64).item()
            return
        now, rest = (F.pad(t.reshape(-1), (0, -t.numel() % block)).view(-1, block) for t in (now, rest))
        self.sums.append(torch.stack([(one * other).sum(-1) for one, other in ((rest, rest), (rest, now), (now, now))]))

    def parts(self) -> dict[str, Tensor]:
        codes, absmax = (torch.cat([getattr(q, name) for q in self.made]) for name in ("codes", "absmax"))
        self.made.clear()
        nested: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if self.sums:
            scales = absmax
            absmax, largest, offset = quantize_scales(scales)
            nested = largest, offset, dynamic_levels(scales.device)
            off = (1 - dequantize_scales(absmax, largest, offset, nested[2]) / scales).masked_fill_(scales == 0, 0)
            rest, across, now = torch.cat(self.sums, -1)
            self.error = (rest + 2 * off * across + off.square() * now).sum(dtype=torch.float64).item()
        entry = self.entry
        q = QuantizedTensor(
            codes, absmax, *nested, entry.kind, entry.described.get("blocksize", 64), entry.stored.shape, False, entry.torch_dtype, None
        )
        return entry.as_parts(q)


def _as_bytes_of(tensor: Tensor, entry: Entry) -> Tensor:
    if tensor.nbytes != entry.nbytes:
        return tensor.to(entry.torch_dtype).reshape(entry.shape)
    return tensor.reshape(-1).view(torch.uint8).view(entry.torch_dtype).reshape(entry.shape)


def find(checkpoint: Checkpoint, _: Mapping[str, Any], files: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        ValueError: a description cannot be read.
    """
    return [_one(checkpoint.tensors[key], parts, files, dtype) for key, parts in _parts(checkpoint).items()]


def _parts(checkpoint: Checkpoint) -> dict[str, dict[str, Entry]]:
    """What belongs to each quantised weight, by its key."""
    tensors, found = checkpoint.tensors, {}
    for key in tensors:
        owner, state, _ = key.partition(f".{STATE}")
        if state and owner in tensors:
            found[owner] = {"": tensors[owner]}
        elif key.endswith(".SCB"):
            # Beside the weight of a module; below any other parameter.
            owner = next((o for o in (f"{key[:-4]}.weight", key[:-4]) if o in tensors), "")
            ends = {"": owner, "SCB": key, "weight_format": key[:-3] + "weight_format"}
            if owner:
                found[owner] = {end: tensors[k] for end, k in ends.items() if k in tensors}
    for key, entry in tensors.items():
        for end in ENDS:
            owner = key.removesuffix(f".{end}")
            if owner != key and owner in found:
                found[owner].setdefault(end, entry)
    return found


def _one(codes: Entry, parts: Mapping[str, Entry], files: Files, dtype: torch.dtype) -> Blocks:
    state = next((e for end, e in parts.items() if end.startswith(STATE)), None)
    said: dict[str, Any] = {}
    shape = codes.shape
    if state is not None:
        try:
            said = json.loads(bytes(state.read(files).tolist()))
            shape, dtype = tuple(said["shape"]), getattr(torch, said["dtype"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{codes.file}: what it says of {codes.key!r} cannot be read; quantise the base again.") from error
    return Blocks.of(codes.key, parts, shape, dtype, kind=said.get("quant_type", "int8"), described=said)
