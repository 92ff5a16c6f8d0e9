"""Linear layers with frozen banks, drawn middles and routed mixtures give the numbers of their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.kernels import lowrank, once
from inlay.kernels.drawn import linear_plus_drawn
from inlay.kernels.gained import linear_plus_gained
from inlay.kernels.routed import linear_plus_routed

SCALE, RANK = 0.7, 3


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)


def numbers(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def same_gradients(mine: Tensor, right: Tensor, *of: Tensor) -> None:
    torch.testing.assert_close(mine, right)
    g = torch.randn_like(right)
    for one, other in zip(torch.autograd.grad(mine, of, g), torch.autograd.grad(right, of, g), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (50,)])
def test_drawn(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, w, a, b = numbers(*shape, 8).requires_grad_(), numbers(5, 8), numbers(2 * RANK, 8), numbers(5, RANK)
    d, e, noise = numbers(2 * RANK).requires_grad_(), numbers(5).requires_grad_(), numbers(*shape, RANK)
    offset = numbers(5) if bias else None
    mine = linear_plus_drawn(x, w, offset, a, b, d, e, lambda like: noise.view(like.shape), SCALE)
    mean, log = (F.linear(x, a) * d).split(RANK, -1)
    right = F.linear(x, w, offset) + SCALE * F.linear(mean + noise * torch.exp(log / 2), b) * e
    same_gradients(mine, right, x, d, e)


@pytest.mark.parametrize("rows", [3, 40])
def test_drawn_derivatives(rows: int) -> None:
    torch.manual_seed(0)
    w, a, b, noise = numbers(5, 8), numbers(2 * RANK, 8), numbers(5, RANK), numbers(rows, RANK)
    leaves = tuple(t.requires_grad_() for t in (numbers(rows, 8), numbers(2 * RANK), numbers(5)))

    def layer(x: Tensor, d: Tensor, e: Tensor) -> Tensor:
        # An input of which others have multiplied the same with A.
        return linear_plus_drawn(x.sin(), w, None, a, b, d, e, lambda like: noise.view(like.shape), SCALE)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(4,), (2, 3), (50,)])
def test_routed(shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, w, offset = numbers(*shape, 8).requires_grad_(), numbers(5, 8), numbers(5) if bias else None
    a, b, router = (t.requires_grad_() for t in (numbers(RANK, 8), numbers(4, RANK, 5), numbers(4, RANK)))

    def formula() -> Tensor:
        u = F.linear(x, a)
        shares = F.linear(u, router).reshape(-1, 4).softmax(-1).mean(0)
        return F.linear(x, w, offset) + SCALE * u @ torch.tensordot(shares, b, 1)

    same_gradients(linear_plus_routed(x, w, offset, a, b, router, SCALE), formula(), x, a, b, router)


def test_routed_derivatives() -> None:
    torch.manual_seed(0)
    w = numbers(5, 8)
    leaves = tuple(t.requires_grad_() for t in (numbers(4, 8), numbers(RANK, 8), numbers(2, RANK, 5), numbers(2, RANK)))

    def layer(x: Tensor, a: Tensor, b: Tensor, router: Tensor) -> Tensor:
        return linear_plus_routed(x, w, None, a, b, router, SCALE)

    assert torch.autograd.gradcheck(layer, leaves)
    assert torch.autograd.gradgradcheck(layer, leaves)


def test_layers_with_one_input_multiply_it_with_the_bank_once() -> None:
    torch.manual_seed(0)
    x, a, b, other = numbers(4, 8).requires_grad_() * 2, numbers(RANK, 8), numbers(5, RANK), numbers(RANK, 8)
    first = once.product_with(x, a, torch.float64)
    assert once.product_with(x, a, torch.float64) is first
    torch.testing.assert_close(once.product_with(x, other, torch.float64), other @ x.detach().t())
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        for _ in range(2):
            linear_plus_gained(x, numbers(5, 8), None, a, b, numbers(RANK).requires_grad_(), numbers(5), SCALE, 0.0)
    assert once.product_with(x, a, torch.float64).data_ptr() in saved
    assert saved.count(once.product_with(x, a, torch.float64).data_ptr()) == 2


def test_a_changed_input_or_bank_is_multiplied_anew() -> None:
    torch.manual_seed(0)
    x, a = numbers(4, 8).requires_grad_() * 2, numbers(RANK, 8)
    for changed in (x, a):
        once.product_with(x, a, torch.float64)
        changed.mul_(2)
        torch.testing.assert_close(once.product_with(x, a, torch.float64), a @ x.t())


@pytest.mark.parametrize("out", [5, 40])
@pytest.mark.parametrize(
    "config",
    [
        inlay.PveraConfig(r=RANK, target_modules=["0"], generator_seed=3, init_weights=False),
        inlay.LilyConfig(r=RANK, target_modules=["0"], init_weights=False),
        inlay.RandLoraConfig(r=RANK, target_modules=["0"], init_weights=False),
        inlay.FrodConfig(sparse_rate=0.2, target_modules=["0"], init_weights=False),
        inlay.VeraConfig(r=RANK, target_modules=["0"], init_weights=False),
    ],
    ids=lambda config: config.peft_type,
)
def test_training_steps_are_those_of_the_formula(config: inlay.PeftConfig, out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, found = torch.randn(2, 9, 8, generator=torch.Generator().manual_seed(1)).double(), []
    for rows in (-1, 10**6):
        monkeypatch.setattr(lowrank, "FEW_ROWS", rows)
        torch.manual_seed(0)
        model = inlay.get_peft_model(nn.Sequential(nn.Linear(8, out).double()), config).double().train()
        y = model(x)
        y.square().sum().backward()
        found.append([y, *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) == len(found[1]) > 2
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
