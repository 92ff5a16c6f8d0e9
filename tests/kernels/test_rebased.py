"""The layer that changes in a basis: its first and second derivatives."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from inlay.kernels.rebased import linear_plus_rebased

PLACES = torch.tensor([[0, 2, 3], [1, 2, 0]])


def layer(x: Tensor, lengths: Tensor, entries: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    u, v, start = (torch.randn(*size, generator=generator, dtype=torch.float64) for size in ((6, 4), (4, 4), (4,)))

    def spread(lengths: Tensor, entries: Tensor) -> Tensor:
        return u @ (torch.diag(lengths - start) + torch.zeros(4, 4).double().index_put((PLACES[0], PLACES[1]), entries)) @ v.t()

    return linear_plus_rebased(x, u @ torch.diag(start) @ v.t(), None, u, v, start, PLACES, 1.5, spread, lengths, entries)


def test_derivatives_of_both_orders() -> None:
    generator = torch.Generator().manual_seed(1)
    given = tuple(torch.randn(*size, generator=generator, dtype=torch.float64).requires_grad_() for size in ((2, 3, 4), (4,), (3,)))
    assert gradcheck(layer, given)
    assert gradgradcheck(layer, given)
