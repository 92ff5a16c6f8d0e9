"""The fused layer with an update made of few numbers, and what it samples from."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels import lowrank, spread
from inlay.kernels.spread import linear_plus_spread, remembered, sampled, scattered, times_sparse
from inlay.kernels.wavelets import LOW_PASS, analysis, padding, synthesis, waves

OUT, INP = 6, 7
PLACES = torch.tensor([3, 40, 0, 17, 5])


def made(values: Tensor) -> Tensor:
    return scattered(values.sin(), PLACES, (OUT, INP))


def found(g: Tensor, x: Tensor, values: Tensor) -> tuple[Tensor]:
    return (sampled(g, x, PLACES) * values.cos(),)


def formula(x: Tensor, w: Tensor | None, bias: Tensor | None, values: Tensor) -> Tensor:
    delta = 0.7 * made(values)
    return F.linear(x, delta if w is None else w + delta, bias)


def given(*shape: int, weight: bool = True) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor]:
    torch.manual_seed(3)
    x = torch.randn(*shape, INP, dtype=torch.float64).requires_grad_()
    values = torch.randn(len(PLACES), dtype=torch.float64).requires_grad_()
    if not weight:
        return x, None, None, values
    return x, torch.randn(OUT, INP, dtype=torch.float64), torch.randn(OUT, dtype=torch.float64), values


@pytest.mark.parametrize("gather", [found, None])
@pytest.mark.parametrize("weight", [True, False])
@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (0,)])
def test_output_and_gradients(gather: Callable[..., tuple[Tensor]] | None, weight: bool, shape: tuple[int, ...]) -> None:
    x, w, bias, values = given(*shape, weight=weight)
    y, wanted = linear_plus_spread(x, w, bias, 0.7, made, gather, values), formula(x, w, bias, values)
    torch.testing.assert_close(y, wanted)
    g = torch.randn_like(y)
    for mine, right in zip(torch.autograd.grad(y, (x, values), g), torch.autograd.grad(wanted, (x, values), g), strict=True):
        torch.testing.assert_close(mine, right)
    with torch.no_grad():
        torch.testing.assert_close(linear_plus_spread(x, w, bias, 0.7, made, gather, values), wanted)


def test_derivatives() -> None:
    x, w, bias, values = given(4)
    run = lambda x, values: linear_plus_spread(x, w, bias, 0.7, made, found, values)  # noqa: E731
    assert torch.autograd.gradcheck(run, (x, values))
    assert torch.autograd.gradgradcheck(run, (x, values))


def test_what_is_frozen_gets_no_gradient_and_keeps_nothing() -> None:
    x, w, bias, values = given(4)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = linear_plus_spread(x, w, bias, 1.0, made, found, values.detach())
    assert all(t is not x for t in kept)
    y.sum().backward()
    assert x.grad is not None


def test_only_the_input_is_kept() -> None:
    x, w, bias, values = given(50)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        linear_plus_spread(x, w, bias, 1.0, made, found, values)
    assert sum(t.numel() for t in kept) == x.numel() + OUT * INP + len(PLACES)


# ---- single entries ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("share", [0, 1000])
@pytest.mark.parametrize("places", [[3], [41, 0, 3, 3, 12], list(range(42)), []])
def test_sampled(share: int, places: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the entries in their order, also those that are asked for twice."""
    monkeypatch.setitem(spread.DENSE_SHARE, "cpu", share)
    g, x, at = torch.randn(OUT, 9), torch.randn(INP, 9), torch.tensor(places, dtype=torch.int32)
    torch.testing.assert_close(sampled(g.t(), x.t(), at), (g @ x.t()).flatten()[at.long()])
    torch.testing.assert_close(sampled(g.t().contiguous(), x.t(), at, lambda t: 2 * t.t()), 4 * (g @ x.t()).flatten()[at.long()])


@pytest.mark.parametrize("few", [-1, 100])
def test_times_sparse(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways give the product and its derivatives, also where two values share a place."""
    monkeypatch.setattr(lowrank, "FEW_ROWS", few)
    values, t, places = torch.randn(4, dtype=torch.float64).requires_grad_(), torch.randn(5, 3).double(), torch.tensor([7, 0, 24, 7])
    found = times_sparse(values, places, t)
    torch.testing.assert_close(found, torch.zeros(25).double().index_add(0, places, values).view(5, 5) @ t)
    assert torch.autograd.gradcheck(times_sparse, (values, places, t))
    assert torch.autograd.gradgradcheck(times_sparse, (values, places, t))


def test_scattered_adds_up_and_takes_a_batch() -> None:
    values = torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])
    one = scattered(values, torch.tensor([1, 5, 1]), (2, 3))
    assert torch.equal(one, torch.tensor([[[0.0, 5, 0], [0, 0, 2]], [[0, 40, 0], [0, 0, 16]]]))
    own = scattered(values, torch.tensor([[0, 1, 2], [3, 4, 5]]), (2, 3))
    assert torch.equal(own, torch.tensor([[[1.0, 2, 4], [0, 0, 0]], [[0, 0, 0], [8, 16, 32]]]))


def test_what_is_remembered_follows_the_tensor() -> None:
    key, calls = torch.tensor([1, 2]), []

    def make(t: Tensor, by: int) -> Tensor:
        calls.append(by)
        return t * by

    assert torch.equal(remembered(key, make, 3), torch.tensor([3, 6]))
    assert remembered(key, make, 3) is remembered(key, make, 3)
    assert torch.equal(remembered(key, make, 4), torch.tensor([4, 8]))
    key.copy_(torch.tensor([5, 6]))
    assert torch.equal(remembered(key, make, 4), torch.tensor([20, 24]))
    assert calls == [3, 4, 4]


# ---- wavelets ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("family", LOW_PASS)
def test_wavelets(family: str) -> None:
    """Analysis is the transpose of synthesis and undone by it; the high pass sees no constant."""
    n, wide = 10, 10 + padding(family)
    eye = torch.eye(wide, dtype=torch.float64)
    matrix = synthesis(eye, family)
    assert matrix.shape == (n, wide)
    torch.testing.assert_close(analysis(torch.eye(n, dtype=torch.float64), family), matrix.mT)
    torch.testing.assert_close(matrix @ matrix.mT, torch.eye(n, dtype=torch.float64), rtol=0, atol=1e-8)
    low = torch.tensor(LOW_PASS[family], dtype=torch.float64)
    moments = [(low * (-1) ** torch.arange(len(low)) * torch.arange(len(low)) ** k).sum().item() for k in range(2)]
    assert abs(moments[0]) < 1e-8
    assert family == "db1" or abs(moments[1]) < 1e-7


@pytest.mark.parametrize("size", [9, 10])
@pytest.mark.parametrize("family", ["db1", "db3", "coif1"])
def test_single_waves(family: str, size: int) -> None:
    """Coefficient by coefficient, the columns of the synthesis."""
    wide = 10 + padding(family)
    places, numbers = waves(torch.arange(wide), size, family)
    found = torch.zeros(wide, size, dtype=torch.float64).scatter_add(1, places, numbers)
    torch.testing.assert_close(found.mT, synthesis(torch.eye(wide, dtype=torch.float64), family)[:size])
