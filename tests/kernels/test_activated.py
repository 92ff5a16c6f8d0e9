"""A linear layer whose low-rank update acts on some tokens: values, gradients and what is kept, against the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels.activated import linear_plus_tokens

INDICES = {"none": [], "few": [1, 5], "most": [0, 1, 2, 4, 5], "all": [0, 1, 2, 3, 4, 5]}


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5), (4, 5), (4,), (2, 5), (4, 2))
    x, w, bias, a, b = (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes)
    return x.requires_grad_(), w, bias, a.requires_grad_(), b.requires_grad_()


def formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scale: float, index: Tensor) -> Tensor:
    acts = torch.zeros(6, dtype=x.dtype).index_fill(0, index, 1).view(2, 3, 1)
    return F.linear(x, w, bias) + scale * acts * F.linear(F.linear(x, a), b)


@pytest.mark.parametrize("name", INDICES)
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients_are_those_of_the_formula(name: str, biased: bool) -> None:
    index = torch.tensor(INDICES[name], dtype=torch.long)
    x, w, bias, a, b = tensors()
    args = x, w, bias if biased else None, a, b, 1.5, index
    ours, theirs = linear_plus_tokens(*args), formula(*args)
    torch.testing.assert_close(ours, theirs)
    for mine, wanted in zip(
        torch.autograd.grad(ours.sin().sum(), (x, a, b)), torch.autograd.grad(theirs.sin().sum(), (x, a, b)), strict=True
    ):
        torch.testing.assert_close(mine, wanted)


@pytest.mark.parametrize("name", ["few", "all"])
def test_first_and_second_derivatives(name: str) -> None:
    index = torch.tensor(INDICES[name])
    x, w, bias, a, b = tensors()

    def layer(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear_plus_tokens(x, w, bias, a, b, 0.7, index)

    assert torch.autograd.gradcheck(layer, (x, a, b))
    assert torch.autograd.gradgradcheck(layer, (x, a, b))


def test_only_the_tokens_that_act_are_kept() -> None:
    x, w, bias, a, b = tensors()
    for name, shape in (("few", (2, 5)), ("all", (2, 3, 5))):
        y = linear_plus_tokens(x, w, bias, a, b, 1.0, torch.tensor(INDICES[name]))
        assert y.grad_fn.saved_tensors[0].shape == shape  # type: ignore[union-attr]


def test_a_base_in_half_precision_is_rounded_once() -> None:
    index = torch.tensor(INDICES["few"])
    x, w, bias, a, b = tensors(torch.bfloat16)
    a, b = (t.detach().float().requires_grad_() for t in (a, b))
    y = linear_plus_tokens(x, w, bias, a, b, 1.0, index)
    chosen = x.view(6, 5)[index].float()
    wanted = (F.linear(x, w, bias).view(6, 4)[index].float() + chosen @ a.t() @ b.t()).bfloat16()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y.view(6, 4)[index], wanted)
    dx, da, db = torch.autograd.grad(y.sum(), (x, a, b))
    assert (dx.dtype, da.dtype, db.dtype) == (torch.bfloat16, torch.float32, torch.float32)


def test_the_output_may_be_written_to() -> None:
    x, w, bias, a, b = tensors()
    args = x, w, bias, a, b, 1.0, torch.tensor([0, 3])
    found = torch.autograd.grad(linear_plus_tokens(*args).relu_().sum(), (x, a, b))
    wanted = torch.autograd.grad(formula(*args).relu().sum(), (x, a, b))
    for mine, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, theirs)
