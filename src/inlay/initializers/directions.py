"""Principal directions of data that stream by: what was found so far and the next batch are decomposed together."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from .svd import SEED, orthonormal, precise, singular_vectors


class StreamedDirections:
    """The principal directions of rows that come in batches, about their mean; of several streams of rows at once.

    Args:
        k: how many.

    Attributes:
        directions: ``(*streams, k, n)``, by falling variance; their largest entries are positive.
        values: ``(*streams, k)``, singular values of all rows so far about their mean.
        cosines: ``(*streams, k)``, of each direction with its predecessor. As in HF peft, one whose largest entry moved to a place of the
            other sign counts as turned round, and takes some steps more to be found.
    """

    ITERATIONS: ClassVar[int] = 3

    def __init__(self, k: int) -> None:
        self.k, self.count = k, 0
        self.mean = self.directions = self.values = self.cosines = None
        self.variation = torch.zeros(())
        self.waiting: list[Tensor] = []

    @property
    def shares(self) -> Tensor:
        """The share of all variance that each direction explains."""
        assert self.values is not None
        return precise(self.values).square() / self.variation.clamp_min(torch.finfo(self.variation.dtype).tiny).unsqueeze(-1)

    def add(self, rows: Tensor) -> bool:
        """Take in a batch ``(*streams, rows, n)``. Less rows than directions wait for more; returns whether the directions are new."""
        self.waiting.append(rows.detach().float())
        if sum(part.shape[-2] for part in self.waiting) < self.k:
            return False
        x, self.waiting = torch.cat(self.waiting, -2), []
        n, mean = x.shape[-2], x.mean(-2)
        x = x - mean.unsqueeze(-2)
        self.variation = self.variation + precise(torch.linalg.vector_norm(x, dim=-2)).square().sum(-1)
        before = self.directions
        if before is not None:
            assert self.mean is not None
            assert self.values is not None
            shift = (self.mean - mean) * (self.count * n / (self.count + n)) ** 0.5
            self.variation = self.variation + precise(shift).square().sum(-1)
            x = torch.cat((self.values.unsqueeze(-1) * before, x, shift.unsqueeze(-2)), -2)
            mean = self.mean + (mean - self.mean) * (n / (self.count + n))
        self.mean, self.count = mean, self.count + n
        self.values, directions = self._decompose(x, before)
        self.directions = directions * directions.gather(-1, directions.abs().argmax(-1, keepdim=True)).sign()
        self.cosines = None if before is None else (self.directions * before).sum(-1)
        return True

    def _decompose(self, x: Tensor, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """The k largest singular values of ``x`` and their right vectors, by subspace iteration from those before."""
        width = 2 * self.k
        if 2 * width >= min(x.shape[-2:]):
            _, s, v = singular_vectors(x, min(self.k, *x.shape[-2:]))
            return s.float(), v.mT.float()
        fresh = width if before is None else self.k
        drawn = torch.randn(x.shape[-1], fresh, generator=torch.Generator().manual_seed(SEED)).to(x)
        q = drawn if before is None else torch.cat((before.mT, drawn.expand(*before.shape[:-2], *drawn.shape)), -1)
        for _ in range(self.ITERATIONS + (before is None)):
            q = orthonormal(x.mT @ (x @ q))
        seen = precise(x @ q)
        squares, turn = torch.linalg.eigh(seen.mT @ seen)
        order = slice(width - self.k, None)
        return squares[..., order].flip(-1).clamp_min(0).sqrt().float(), turn[..., order].flip(-1).to(q).mT @ q.mT
