"""The fused layers of LoHa, LoKr and full differences beside their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels import lowrank
from inlay.kernels.hadamard import hadamard, khatri_rao, linear_plus_hadamard
from inlay.kernels.kronecker import kronecker, linear_plus_kronecker, times_kronecker
from inlay.kernels.sums import linear_plus_matrix

OUT, IN, SCALE = 24, 30, 0.7
KEPT = torch.tensor([0.0, 1.5, 0.0, *[1.5] * (OUT - 3)], dtype=torch.float64)

# By name: the shapes of what is trained, the fused layer, and what it adds to the weight.
Layer = tuple[list[tuple[int, ...]], Callable[..., Tensor], Callable[..., Tensor]]
LAYERS: dict[str, Layer] = {
    # Of low rank r^2 = 4, and of no lower rank than the weight.
    "loha": (
        [(OUT, 2), (2, IN), (OUT, 2), (2, IN)],
        lambda x, w, bias, a1, b1, a2, b2: linear_plus_hadamard(x, w, bias, a1, b1, a2, b2, SCALE, 0.0),
        hadamard,
    ),
    "loha-wide": (
        [(OUT, 5), (5, IN), (OUT, 5), (5, IN)],
        lambda x, w, bias, a1, b1, a2, b2: linear_plus_hadamard(x, w, bias, a1, b1, a2, b2, SCALE, 0.0),
        hadamard,
    ),
    "lokr": (
        [(3, 5), (8, 2), (2, 6)],
        lambda x, w, bias, w1, a, b: linear_plus_kronecker(x, w, bias, w1, a, b, None, SCALE, 0.0),
        lambda w1, a, b: torch.kron(w1, a @ b),
    ),
    "lokr-whole": (
        [(3, 5), (8, 6)],
        lambda x, w, bias, w1, w2: linear_plus_kronecker(x, w, bias, w1, w2, None, None, SCALE, 0.0),
        torch.kron,
    ),
    "lokr-dropped": (
        [(3, 5), (8, 2), (2, 6)],
        lambda x, w, bias, w1, a, b: linear_plus_kronecker(x, w, bias, w1, a, b, KEPT.to(x.dtype), SCALE, 0.0),
        lambda w1, a, b: KEPT.to(a.dtype).unsqueeze(1) * torch.kron(w1, a @ b),
    ),
    "full": ([(OUT, IN)], lambda x, w, bias, d: linear_plus_matrix(x, w, bias, d, None, SCALE), lambda d: d),
}


@pytest.fixture(params=LAYERS)
def layer(request: pytest.FixtureRequest) -> Layer:
    return LAYERS[request.param]


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)


def given(layer: Layer, *shape: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    torch.manual_seed(0)
    x, w, bias = torch.randn(*shape, IN, dtype=dtype), torch.randn(OUT, IN, dtype=dtype), torch.randn(OUT, dtype=dtype)
    return x.requires_grad_(), w, bias, [torch.randn(s, dtype=dtype).requires_grad_() for s in layer[0]]


def formula(layer: Layer, x: Tensor, w: Tensor, bias: Tensor | None, *trained: Tensor) -> Tensor:
    return F.linear(x, w + SCALE * layer[2](*trained), bias)


# Where there are more rows than the weight has, the update passes through a copy of the weight.
@pytest.mark.parametrize("shape", [(3,), (40,), (2, 3, 9), (), (0,), (0, 4)], ids=str)
@pytest.mark.parametrize("with_bias", [True, False])
def test_output_and_gradients(layer: Layer, shape: tuple[int, ...], with_bias: bool) -> None:
    x, w, bias, trained = given(layer, *shape)
    mine = layer[1](x, w, bias if with_bias else None, *trained)
    right = formula(layer, x, w, bias if with_bias else None, *trained)
    torch.testing.assert_close(mine, right)
    g = torch.randn_like(right)
    for one, other in zip(*(torch.autograd.grad(y, [x, *trained], g) for y in (mine, right)), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("rows", [3, 40])
def test_first_and_second_derivatives(layer: Layer, rows: int) -> None:
    x, w, bias, trained = given(layer, rows)
    assert torch.autograd.gradcheck(lambda x, *q: layer[1](x, w, bias, *q), (x, *trained), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x, *q: layer[1](x, w, bias, *q), (x, *trained), fast_mode=True)


def test_a_layer_whose_output_is_written_to(layer: Layer) -> None:
    x, w, bias, trained = given(layer, 40)
    mine = torch.autograd.grad(layer[1](x, w, bias, *trained).relu_().sum(), trained)
    right = torch.autograd.grad(formula(layer, x, w, bias, *trained).relu().sum(), trained)
    for one, other in zip(mine, right, strict=True):
        torch.testing.assert_close(one, other)


def test_a_trained_base_takes_the_formula(layer: Layer) -> None:
    x, w, bias, trained = given(layer, 40)
    w.requires_grad_()
    mine, right = (run(x, w, bias, *trained).square().sum() for run in (layer[1], lambda *a: formula(layer, *a)))
    torch.testing.assert_close(*(torch.autograd.grad(y, w)[0] for y in (mine, right)))


@pytest.mark.parametrize("rows", [3, 40])
def test_half_precision_is_rounded_once(layer: Layer, rows: int) -> None:
    x, w, bias, trained = given(layer, rows, dtype=torch.float32)
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    y = layer[1](*half, *trained)
    assert y.dtype == torch.bfloat16
    exact = formula(layer, *(t.double() for t in (*half, *trained)))
    assert ((y.double() - exact).norm() / exact.norm()).item() < 0.01


def test_nothing_but_the_input_is_kept(layer: Layer) -> None:
    x, w, bias, trained = given(layer, 40)
    known = {t.data_ptr() for t in (x, w, bias, *trained)}
    kept: list[Tensor] = []

    def keep(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        layer[1](x, w, bias, *trained)
    # The mask of rows is small.
    assert all(t.data_ptr() in known or t.numel() <= OUT for t in kept)


def test_products() -> None:
    a1, a2, b1, b2 = torch.randn(2, 6, 3), torch.randn(2, 6, 3), torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    right, left = khatri_rao(a1, b1, a2, b2)
    assert right.shape == (2, 9, 5)
    torch.testing.assert_close(left @ right, hadamard(a1, b1, a2, b2))
    w1, w2, x = torch.randn(2, 3), torch.randn(4, 5), torch.randn(7, 15)
    torch.testing.assert_close(kronecker(w1, w2), torch.kron(w1, w2))
    torch.testing.assert_close(times_kronecker(x, w1, w2, None), x @ torch.kron(w1, w2).t())
