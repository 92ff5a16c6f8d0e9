"""AWQ: codes and zeros of four bits in words along the outputs, eight to a word, the even ones of them before the odd ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..streaming import Checkpoint, Entry, Files
from .weight import Numbers, Packed
from .words import Words, pack, unpack

# Which of eight outputs the bits of a word belong to, the lowest first; and where to find each output.
ORDER = [0, 2, 4, 6, 1, 3, 5, 7]
PLACE = [ORDER.index(i) for i in range(8)]


def unpack_outputs(words: Tensor) -> Tensor:
    """Codes ``(*, 8 n)`` of words ``(*, n)``."""
    return unpack(words.mT, 4).unflatten(0, (-1, 8))[:, PLACE].flatten(0, 1).mT


@dataclass(frozen=True, eq=False)
class AWQ(Words):
    @property
    def together(self) -> int:
        return 8

    def codes(self, files: Files, rows: slice) -> Tensor:
        return self._outputs(files, "qweight", rows)

    def zeros(self, files: Files, rows: slice) -> Tensor:
        return self._outputs(files, "qzeros", rows)

    def _outputs(self, files: Files, name: str, rows: slice) -> Tensor:
        first, last = rows.start // 8, -(-rows.stop // 8)
        return unpack_outputs(self.words(files, name)[:, first:last])[:, rows.start - first * 8 :][:, : rows.stop - rows.start]

    def in_file(self, numbers: Numbers) -> Numbers:
        return {"qweight": pack(numbers["codes"].unflatten(0, (-1, 8))[:, ORDER].flatten(0, 1), 4).mT}


def find(checkpoint: Checkpoint, config: Mapping[str, Any], _: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: the codes lie in another order, or have another number of bits.
    """
    layout, bits = str(config.get("version") or config.get("format") or "gemm").lower(), config.get("bits", config.get("w_bit", 4))
    if layout != "gemm" or bits != 4:
        raise NotImplementedError(f"awq, {bits} bits in the order of {layout!r}")
    tensors, found = checkpoint.tensors, []
    for key in tensors:
        owner, end = key.rpartition(".")[::2]
        if end == "qweight":
            parts = {n: tensors[k] for n in ("qweight", "qzeros", "scales") if (k := f"{owner}.{n}") in tensors}
            if len(parts) < 3:
                raise ValueError(f"{checkpoint.folder} has the codes of {owner!r} and not their scales and zeros; download it again.")
            found.append(weight(f"{owner}.weight", parts, dtype))
    return found


def weight(key: str, parts: Mapping[str, Entry], dtype: torch.dtype) -> AWQ:
    """
    Args:
        parts: by the ends of their keys.

    Raises:
        NotImplementedError: they are not all there, or do not fit each other.
    """
    parts = {name: parts[name] for name in ("qweight", "qzeros", "scales") if name in parts and len(parts[name].shape) == 2}
    if len(parts) < 3 or parts["qweight"].torch_dtype != torch.int32:
        raise NotImplementedError(f"awq, and not all of {key!r} is there")
    (inputs, words), zeros, scales = (part.shape for part in parts.values())
    if zeros != (scales[0], words) or scales[1] != words * 8 or not scales[0] or inputs % scales[0]:
        raise NotImplementedError(f"awq, with codes, zeros and scales of different sizes for {key!r}")
    return AWQ.of(key, parts, (words * 8, inputs), dtype, kind="awq 4 bits")
