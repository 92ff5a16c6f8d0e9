"""A linear layer with a frozen pair between trained gains gives the numbers of its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels import lowrank
from inlay.kernels.dropout import factors
from inlay.kernels.gained import linear_plus_gained

SCALE, RANK = 0.7, 3


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)


def given(shape: tuple[int, ...], bias: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor | None, ...]:
    """x, w, bias, a, b, d, e."""
    torch.manual_seed(0)
    frozen = torch.randn(5, 8), torch.randn(5) if bias else None, torch.randn(RANK, 8), torch.randn(5, RANK)
    x, d, e = torch.randn(*shape, 8), torch.randn(RANK), torch.randn(5)
    return (
        x.to(dtype).requires_grad_(),
        *(None if t is None else t.to(dtype) for t in frozen),
        *(t.to(dtype).requires_grad_() for t in (d, e)),
    )


def formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, d: Tensor, e: Tensor) -> Tensor:
    return F.linear(x, w, bias) + SCALE * F.linear(F.linear(x, a) * d, b) * e


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (50,), (5, 9)])
def test_output_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    tensors = given(shape, bias)
    x, *_, d, e = tensors
    mine, right = linear_plus_gained(*tensors, SCALE, 0.0), formula(*tensors)
    torch.testing.assert_close(mine, right)
    g = torch.randn_like(right)
    for one, other in zip(torch.autograd.grad(mine, (x, d, e), g), torch.autograd.grad(right, (x, d, e), g), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("rows", [3, 40])
def test_first_and_second_derivatives(rows: int, rate: float) -> None:
    x, w, bias, a, b, d, e = given((rows,), True)

    def layer(x: Tensor, d: Tensor, e: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear_plus_gained(x, w, bias, a, b, d, e, SCALE, rate)

    assert torch.autograd.gradcheck(layer, (x, d, e))
    assert torch.autograd.gradgradcheck(layer, (x, d, e), fast_mode=True)


def test_dropout_is_that_of_its_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Tensor] = []
    draw = lowrank.draw_bits

    def remembering(x: Tensor, rate: float) -> Tensor:
        drawn.append(draw(x, rate))
        return drawn[-1]

    monkeypatch.setattr("inlay.kernels.gained.draw_bits", remembering)
    x, w, bias, a, b, d, e = given((40,), True)
    mine = linear_plus_gained(x, w, bias, a, b, d, e, SCALE, 0.4)
    mask = factors(drawn[0], 0.4, x.shape, x.dtype)
    assert 0 < (mask == 0).sum() < mask.numel()
    right = F.linear(x, w, bias) + SCALE * F.linear(F.linear(x * mask, a) * d, b) * e
    torch.testing.assert_close(mine, right)
    g = torch.randn_like(right)
    for one, other in zip(torch.autograd.grad(mine, (x, d, e), g), torch.autograd.grad(right, (x, d, e), g), strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_base() -> None:
    x, w, bias, a, b, d, e = given((40,), True, torch.float32)
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    mine = linear_plus_gained(*half, a, b, d, e, SCALE, 0.0)
    assert mine.dtype == torch.bfloat16
    right = F.linear(*half).float() + SCALE * F.linear(F.linear(half[0].float(), a) * d, b) * e
    torch.testing.assert_close(mine, right.bfloat16())
    grads = torch.autograd.grad(mine.float().sum(), (d, e))
    wanted = torch.autograd.grad(right.sum(), (d, e))
    for one, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=1e-2)


def test_what_is_kept() -> None:
    """The weight, the pair, the gains and u: nothing of the size of the output or the input."""
    x, w, bias, a, b, d, e = given((40,), True)
    kept: dict[int, Tensor] = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        linear_plus_gained(x, w, bias, a, b, d, e, SCALE, 0.0)
    assert sorted(t.numel() for t in kept.values()) == sorted([w.numel(), a.numel(), b.numel(), d.numel(), e.numel(), RANK * 40])


def test_frozen_gains_keep_nothing_of_the_input() -> None:
    x, w, bias, a, b, d, e = given((40,), True)
    frozen = d.detach(), e.detach()
    mine, right = linear_plus_gained(x, w, bias, a, b, *frozen, SCALE, 0.0), formula(x, w, bias, a, b, *frozen)
    torch.testing.assert_close(torch.autograd.grad(mine.sum(), x), torch.autograd.grad(right.sum(), x))
