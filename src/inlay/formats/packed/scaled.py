"""Codes in bytes of their own, with a scale, and perhaps a zero, for each block of rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...kernels.scaled import Block, factors, spread, to_float8, to_whole
from ..streaming import Entry, Files
from .weight import Numbers, Packed


@dataclass(frozen=True, eq=False)
class Scaled(Packed):
    """
    Attributes:
        parts: ``codes``, ``scale`` and, where there is one, ``zero``; others are kept as they are.
        block: the rows and columns that share a scale.
        levels: the least and the largest code, where codes are whole numbers.
    """

    block: Block = (1, 1)
    levels: tuple[int, int] | None = None

    @property
    def together(self) -> int:
        return self.block[0] if len(self.shape) == 2 else 1

    def numbers(self, files: Files, rows: slice) -> Numbers:
        codes, shape = self.codes(files, rows), (rows.stop - rows.start, *self.shape[1:])
        found = {}
        for name in ("scale", "zero"):
            if name in self.parts:
                found[name] = spread(*self._of_rows(self.by_block(self.parts[name].read(files)), rows), torch.Size(shape))
        return {"codes": codes, **found}

    def codes(self, files: Files, rows: slice) -> Tensor:
        return self.parts["codes"].read(files, rows)

    def by_block(self, t: Tensor) -> Tensor:
        """Scales or zeros of a file as ``(*, blocks, blocks)``."""
        return t.reshape(*self.shape[:-2], -(-self.shape[-2] // self.block[0]), -(-self.shape[-1] // self.block[1]))

    def _of_rows(self, t: Tensor, rows: slice) -> tuple[Tensor, Block]:
        if t.ndim > 2:
            return t[rows], self.block
        # Blocks may begin above these rows, or go on below them.
        return (t, self.block) if len(t) == 1 else (t[torch.arange(rows.start, rows.stop) // self.block[0]], (1, self.block[1]))

    def dense(self, numbers: Numbers) -> Tensor:
        codes = numbers["codes"].float()
        if "zero" in numbers:
            codes -= numbers["zero"].float()
        return codes.mul_(factors(numbers["scale"]))

    def rounded(self, w: Tensor, before: Numbers) -> Numbers:
        dtype, found = self.parts["scale"].torch_dtype, {}
        if self.levels is None:
            found["codes"], found["scale"] = to_float8(w, self.block, self.parts["codes"].torch_dtype, dtype)
        else:
            symmetric = "zero" not in before or not before["zero"].any()
            found["codes"], found["scale"], zero = to_whole(w, self.block, self.levels, symmetric, dtype)
            if not symmetric or "zero" in before:
                found["zero"] = zero
        return {n: t if n == "codes" else spread(t, self.block, w.shape) for n, t in found.items()}

    def in_file(self, numbers: Numbers) -> Numbers:
        rows, columns = self.block
        return {n: t if n == "codes" else t[..., ::rows, ::columns] for n, t in numbers.items()}


def block_of(shape: tuple[int, ...], scales: tuple[int, ...], asked: Any = None) -> Block | None:
    """The rows and columns that share a scale; None where it cannot be told.

    Args:
        shape: of the weight. scales: of its scales.
        asked: what the configuration says, where it says it.
    """
    grid = scales[-2:] if len(scales) > 1 else (scales[0] if scales and scales[0] == shape[-2] else 1, 1)
    if len(scales) < 2 and scales and scales[0] not in (1, shape[-2]):
        return None
    if asked and tuple(-(-n // int(b)) for n, b in zip(shape[-2:], asked, strict=True)) == tuple(grid):
        return int(asked[0]), int(asked[1])
    if any(n % g for n, g in zip(shape[-2:], grid, strict=True)):
        return None
    return shape[-2] // grid[0], shape[-1] // grid[1]


def scaled(key: str, parts: Mapping[str, Entry | None], dtype: torch.dtype, kind: str, asked: Any = None, **more: Any) -> Scaled:
    """
    Args:
        parts: None where the file lacks one. asked: see `block_of`.

    Raises:
        NotImplementedError: codes and scales do not fit each other.
    """
    found = {name: entry for name, entry in parts.items() if entry is not None}
    shape = more.pop("shape", found["codes"].shape)
    block = block_of(shape, found["scale"].shape, asked)
    if block is None:
        raise NotImplementedError(f"{key!r} is {shape} and has scales of shape {found['scale'].shape}")
    return Scaled.of(key, found, shape, dtype, kind=kind, block=block, **more)
