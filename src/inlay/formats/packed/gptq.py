"""GPTQ: codes in words along the inputs, zeros in words along the outputs, and for each input its group.

The first version of the format keeps zeros less one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..streaming import Checkpoint, Entry, Files
from .weight import Numbers, Packed
from .words import Words, pack, unpack

VERSIONS = {"gptq": 1, "gptq_v2": 0}


@dataclass(frozen=True, eq=False)
class GPTQ(Words):
    """
    Attributes:
        less: what has been taken off the zeros.
    """

    less: int = 1

    def codes(self, files: Files, rows: slice) -> Tensor:
        return unpack(self.words(files, "qweight")[:, rows], self.bits)

    def zeros(self, files: Files, rows: slice) -> Tensor:
        found = unpack(self.words(files, "qzeros").mT, self.bits).mT[:, rows]
        # A zero of 0 less one has gone round to the largest code.
        return found if not self.less else (found + self.less).bitwise_and_(2**self.bits - 1)

    def groups(self, files: Files) -> Tensor:
        own = self.parts.get("g_idx")
        return super().groups(files) if own is None else own.read(files).long()

    def in_file(self, numbers: Numbers) -> Numbers:
        return {"qweight": pack(numbers["codes"].mT, self.bits)}


def find(checkpoint: Checkpoint, config: Mapping[str, Any], _: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: the codes lie in another order, or have other numbers of bits in different layers.
    """
    layout = str(config.get("checkpoint_format") or config.get("format") or "gptq")
    if layout not in VERSIONS or config.get("is_marlin_format"):
        raise NotImplementedError(f"gptq, in the order of {layout!r}")
    tensors, found = checkpoint.tensors, []
    for key in tensors:
        owner, end = key.rpartition(".")[::2]
        if end == "qweight":
            parts = {n: tensors[k] for n in ("qweight", "qzeros", "scales", "g_idx") if (k := f"{owner}.{n}") in tensors}
            if "scales" not in parts or "qzeros" not in parts:
                raise ValueError(f"{checkpoint.folder} has the codes of {owner!r} and not their scales; download it again.")
            found.append(weight(f"{owner}.weight", parts, dtype, VERSIONS[layout]))
    return found


def weight(key: str, parts: Mapping[str, Entry], dtype: torch.dtype, less: int) -> GPTQ:
    """
    Args:
        parts: by the ends of their keys.

    Raises:
        NotImplementedError: they are not all there, or do not fit each other, or have a number of bits that is not known.
    """
    codes, zeros, scales = (parts.get(name) for name in ("qweight", "qzeros", "scales"))
    shapes = [part.shape for part in (codes, zeros, scales) if part is not None and len(part.shape) == 2 and part.nbytes]
    if codes is None or len(shapes) < 3:
        raise NotImplementedError(f"gptq, and not all of {key!r} is there")
    (words, outs), (groups, zero_words), (scaled, width) = shapes
    bits = zero_words * 32 // width
    if bits not in (2, 3, 4, 8) or codes.torch_dtype != torch.int32:
        raise NotImplementedError(f"gptq, with codes of {bits} bits for {key!r}")
    if outs != width or groups != scaled or words * 32 % bits:
        raise NotImplementedError(f"gptq, with codes, zeros and scales of different sizes for {key!r}")
    parts = {name: part for name, part in parts.items() if part.nbytes}
    return GPTQ.of(key, parts, (outs, words * 32 // bits), dtype, kind=f"gptq {bits} bits", bits=bits, less=less)
