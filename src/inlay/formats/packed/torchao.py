"""torchao's weights: ``_weight_qdata``, ``_weight_scale``, ``_weight_zero_point``; the header of each file says what they make up."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..streaming import Checkpoint, Entry, Files
from .scaled import Scaled
from .weight import Numbers, Packed

# What the header calls the tensors of one weight; those of inputs stay as they are.
PARTS = {
    "codes": "qdata", "scale": "scale", "zero": "zero_point", "act_pre_scale": "act_pre_scale", "act_quant_scale": "act_quant_scale",
    "act_quant_zero_point": "act_quant_zero_point",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Halves(Scaled):
    """``Int4Tensor``: two codes from -8 to 7 a byte, the first in the lower half; scales and zeros lie as ``(blocks, out)``; what a
    code means is ``code * scale + zero``."""

    def codes(self, files: Files, rows: slice) -> Tensor:
        halves = self.parts["codes"].read(files, rows).view(torch.int8)
        return torch.stack((halves << 4 >> 4, halves >> 4), -1).flatten(-2)

    def by_block(self, t: Tensor) -> Tensor:
        return t.mT

    def dense(self, numbers: Numbers) -> Tensor:
        return numbers["codes"].float().mul_(numbers["scale"].float()).add_(numbers["zero"].float())

    def rounded(self, w: Tensor, before: Numbers) -> Numbers:
        columns = self.block[1]
        blocks = w.unflatten(-1, (-1, columns))
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        scale = (high - low).clamp_(min=1e-6) / 15
        codes = ((blocks - low) / scale).round_().clamp_(0, 15).sub_(8).to(torch.int8).flatten(-2)
        dtype = self.parts["scale"].torch_dtype
        zero = low + scale * 8
        return {"codes": codes} | {n: t.to(dtype).expand(blocks.shape).flatten(-2) for n, t in (("scale", scale), ("zero", zero))}

    def in_file(self, numbers: Numbers) -> Numbers:
        codes = numbers["codes"].unflatten(-1, (-1, 2))
        halves = (codes[..., 0] & 15) | (codes[..., 1] << 4)
        return {"codes": halves, **{n: numbers[n][..., :: self.block[1]].mT for n in ("scale", "zero")}}

    def axis(self, name: str) -> int:
        return 1 if name != "codes" and len(self.shape) == 2 else 0


def find(checkpoint: Checkpoint, _: Mapping[str, Any], __: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: a weight is of a class whose numbers are not known, or lie in an order of their own.
        ValueError: the files lack tensors that they name.
    """
    tensors, found = checkpoint.tensors, []
    # Each file may describe them all.
    said = {key: text for metadata in checkpoint.metadata.values() for key, text in metadata.items()}
    names = {name for metadata in checkpoint.metadata.values() for name in json.loads(metadata.get("tensor_names", "[]"))}
    for key in sorted(names):
        described = json.loads(said[key])
        if described["_type"] == "Tensor":
            continue
        owner, name = key.rpartition(".")[::2]
        parts = {n: tensors.get(f"{owner}._{name}_{end}") for n, end in PARTS.items()}
        if parts["codes"] is None or parts["scale"] is None:
            raise ValueError(f"{checkpoint.folder} lacks the codes of {key!r}; save or download it again.")
        found.append(_one(key, described["_type"], described["_data"], parts, dtype))
    return found


def _one(key: str, kind: str, said: Mapping[str, Any], parts: Mapping[str, Entry | None], dtype: torch.dtype) -> Packed:
    there = {n: e for n, e in parts.items() if e is not None}
    *above, rows, columns = said.get("block_size", ())
    if kind not in ("Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor", "Int4Tensor") or set(above) - {1}:
        raise NotImplementedError(f"torchao, with a {kind} for {key!r}")
    if "act_pre_scale" in there:
        raise NotImplementedError(f"torchao, with inputs that are scaled before they come to {key!r}")
    codes, dtype = there["codes"], _dtype(said.get("dtype"), dtype)
    more: dict[str, Any] = {"kind": f"torchao {kind}", "block": (rows, columns)}
    if kind == "Int4Tensor":
        if _dtype(said.get("activation_dtype"), torch.bfloat16) != torch.bfloat16:
            more["unwritable"] = "its scales fit inputs in eight bits."
        return Halves.of(key, there, tuple(said["shape"]), there["scale"].torch_dtype, **more)
    if kind != "Float8Tensor":
        bits = 8 if kind == "Int8Tensor" else int(str(said["target_dtype"]["_data"]).removeprefix("int"))
        half = 2 ** (bits - 1) // (2 if said.get("reduce_range") else 1)
        more["levels"] = -half, half - 1
        if "zero" in there and there["zero"].torch_dtype.is_floating_point:
            more["unwritable"] = "its zeros lie between its codes."
    return Scaled.of(key, there, codes.shape, dtype, **more)


def _dtype(said: Any, otherwise: torch.dtype) -> torch.dtype:
    return getattr(torch, said["_data"]) if isinstance(said, dict) else otherwise
