"""Batches whose rows have several adapters, and what is expected of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Ranks, and the rows of each adapter: equal and unequal, scattered, none at all, one adapter, rows with two.
CASES = [
    ((4, 4), ((0, 2), (1, 3))),
    ((4, 4, 4), ((0, 1, 2, 5), (3,), (4,))),
    ((2, 5, 17), ((3,), (0, 1, 4), (2,))),
    ((3,), ((0, 2),)),
    ((3, 2, 4), ((0, 1), (), (2,))),
    ((3, 2, 4), ((0, 1), (1, 2), (0, 3))),
]
TOLERANCE: dict[torch.dtype, Any] = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-5, "atol": 1e-5},
    # Cut off, once for each adapter that a row has.
    torch.bfloat16: {"rtol": 2**-6, "atol": 2**-4},
}

Factors = list[tuple[Tensor, Tensor, float]]


def factors_for(ranks: tuple[int, ...], dtype: torch.dtype, inp: int = 7, out: int = 70) -> Factors:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return [(drawn(r, inp), drawn(out, r), 0.5 + i) for i, r in enumerate(ranks)]


def expected(y: Tensor, x: Tensor, rows: Any, times: int, factors: Factors) -> Tensor:
    """A product for each adapter, in double precision."""
    total = y.double()
    for mine, (a, b, scale) in zip(rows, factors, strict=True):
        chosen = torch.zeros(len(x) // times, dtype=torch.float64)
        chosen[list(mine)] = scale
        total = total + chosen.repeat_interleave(times).unsqueeze(1) * (x.double() @ a.double().T @ b.double().T)
    return total.to(y.dtype)
