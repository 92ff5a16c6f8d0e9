"""Codes of a few bits in words of 32, on a grid that calibration has fitted: scales and zeros stay, and codes are chosen anew on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..streaming import Files
from .weight import Numbers, Packed


def unpack(words: Tensor, bits: int) -> Tensor:
    """Codes ``(n, *)``, uint8, of words ``(n * bits / 32, *)``, int32: a stream of bits along the first axis, the lowest first."""
    most = 2**bits - 1
    if 32 % bits == 0:
        found = [(words >> shift).bitwise_and_(most).to(torch.uint8) for shift in range(0, 32, bits)]
        return torch.stack(found, 1).flatten(0, 1)
    at = torch.arange(0, len(words) * 32, bits, device=words.device)
    first, shift = at // 32, (at % 32).view(-1, *[1] * (words.ndim - 1))
    wide = words.long().bitwise_and_(0xFFFFFFFF)
    wide = wide | torch.cat((wide[1:], torch.zeros_like(wide[:1]))) << 32
    return (wide[first] >> shift).bitwise_and_(most).to(torch.uint8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unpack`."""
    words = torch.zeros(len(codes) * bits // 32 + 1, *codes.shape[1:], dtype=torch.int64, device=codes.device)
    for place in range(32):
        # Codes that lie alike in their words; of a stream whose codes do not fill words, 32 codes fill `bits` of them.
        own, at = codes[place::32].long(), place * bits
        shifted = own << at % 32
        for further in range(2):
            there = words[at // 32 + further :: bits][: len(own)]
            there |= (shifted >> 32 * further)[: len(there)] & 0xFFFFFFFF
    return words[:-1].to(torch.int32)


@dataclass(frozen=True, eq=False)
class Words(Packed):
    """
    Attributes:
        parts: ``qweight``, with codes ``(in, out)`` in words; ``qzeros`` and ``scales``, a row for each group of inputs.
        bits: of a code.
    """

    bits: int = 4

    def words(self, files: Files, name: str) -> Tensor:
        return self.parts[name].read(files)

    def codes(self, files: Files, rows: slice) -> Tensor:
        """``(in, rows)``"""
        raise NotImplementedError

    def zeros(self, files: Files, rows: slice) -> Tensor:
        """``(groups, rows)``"""
        raise NotImplementedError

    def groups(self, files: Files) -> Tensor:
        """The group of each input."""
        inputs, groups = self.shape[1], self.parts["scales"].shape[0]
        return torch.arange(inputs) // -(-inputs // groups)

    def numbers(self, files: Files, rows: slice) -> Numbers:
        scales, groups = self.parts["scales"].read(files)[:, rows].float(), self.groups(files)
        found = {"codes": self.codes(files, rows), "zeros": self.zeros(files, rows)[groups], "scales": scales[groups]}
        return {name: t.mT for name, t in found.items()}

    def dense(self, numbers: Numbers) -> Tensor:
        return numbers["codes"].float().sub_(numbers["zeros"]).mul_(numbers["scales"])

    def rounded(self, w: Tensor, before: Numbers) -> Numbers:
        steps = (w / before["scales"]).nan_to_num_(0, 0, 0)
        return {"codes": steps.add_(before["zeros"]).round_().clamp_(0, 2**self.bits - 1).to(torch.uint8)}

    def axis(self, name: str) -> int:
        return 1
