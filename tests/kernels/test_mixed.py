"""Low-rank updates of several adapters on one batch against a product for each; and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.kernels import mixed
from inlay.kernels.mixed import add_segments

from .segments import CASES, TOLERANCE, expected, factors_for


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [1, 20])
@pytest.mark.parametrize(("ranks", "rows"), CASES)
def test_as_a_product_for_each(ranks: tuple[int, ...], rows: Any, times: int, dtype: torch.dtype) -> None:
    """With few tokens and equal ranks in two products, else by segments."""
    factors, count = factors_for(ranks, dtype), 1 + max(r for mine in rows for r in mine)
    x, y = torch.randn(count * times, 7, dtype=dtype), torch.randn(count * times, 70, dtype=dtype)
    found = add_segments(y.clone(), x, rows, times, factors)
    torch.testing.assert_close(found, expected(y, x, rows, times, factors), **TOLERANCE[dtype])


def test_gradients() -> None:
    rows, factors = ((0, 2), (1,), (1, 3)), factors_for((2, 1, 3), torch.float64, inp=5, out=4)
    scales = [s for *_, s in factors]

    def update(y: Tensor, x: Tensor, *flat: Tensor) -> Tensor:
        return add_segments(y.clone(), x, rows, 2, list(zip(flat[::2], flat[1::2], scales, strict=True)))

    inputs = [torch.randn(8, 4), torch.randn(8, 5), *(t for a, b, _ in factors for t in (a, b))]
    assert torch.autograd.gradcheck(update, [t.double().requires_grad_() for t in inputs])
    assert torch.autograd.gradgradcheck(update, [t.double().requires_grad_() for t in inputs])


def test_triton_is_for_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixed, "has_triton", lambda: True)
    assert not mixed.by_triton(torch.zeros(2, 2), [torch.zeros(1, 2), torch.zeros(2, 1)])
