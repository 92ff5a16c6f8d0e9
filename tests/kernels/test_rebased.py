"""The layer that changes in a basis: its first and second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inlay.kernels.rebased import linear_plus_rebased
from inlay.kernels.spread import scattered

PLACES = torch.tensor([0, 5, 10, 15, 1, 10, 12])


def layer(x: Tensor, values: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v, start = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((6, 4), (4, 4), (4,)))

    def spread(values: Tensor) -> Tensor:
        return u @ scattered(values, PLACES, (4, 4)) @ v.t()

    return linear_plus_rebased(x, u @ torch.diag(start) @ v.t(), None, u, v, start, PLACES, 1.5, spread, values)


def test_derivatives_of_both_orders() -> None:
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in ((2, 3, 4), (7,)))
    assert gradcheck(layer, given)
    assert gradgradcheck(layer, given)
