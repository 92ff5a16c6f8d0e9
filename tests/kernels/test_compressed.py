"""A product that keeps its input compressed: exact where nothing is lost, and one direction a group elsewhere."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.compressed import in_groups, linear_compressed


def reals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_exact_where_a_group_is_one_feature() -> None:
    x, a = reals(2, 3, 5), reals(4, 5)
    assert torch.autograd.gradcheck(lambda x, a: linear_compressed(x, a, torch.ones(1, dtype=torch.float64), 5, 1.0), (x, a))


def test_the_gradient_of_the_input_is_exact() -> None:
    x, a = reals(2, 3, 7), reals(4, 7).detach()
    v = torch.nn.functional.normalize(torch.randn(3, dtype=torch.float64), dim=0)
    assert torch.autograd.gradcheck(lambda x: linear_compressed(x, a, v, 3, 0.5), (x,))


@pytest.mark.parametrize(("width", "groups"), [(6, 3), (7, 3), (5, 4)])
def test_the_gradient_of_the_factor_sees_one_direction_a_group(width: int, groups: int) -> None:
    x, a = reals(6, width), reals(4, width)
    v = torch.nn.functional.normalize(torch.randn(-(-width // groups), dtype=torch.float64), dim=0)
    linear_compressed(x, a, v, groups, 0.7).square().sum().backward()
    seen = ((in_groups(x.detach(), groups) @ v).unsqueeze(-1) * v).flatten(1)[:, :width]
    torch.testing.assert_close(a.grad, 0.7 * (2 * x.detach() @ a.detach().T).T @ seen)


def test_half_precision_keeps_its_dtypes() -> None:
    x, a = torch.randn(3, 8, dtype=torch.bfloat16, requires_grad=True), torch.randn(2, 8, dtype=torch.bfloat16, requires_grad=True)
    linear_compressed(x, a, torch.ones(4) / 2, 2, 1.0).sum().backward()
    assert x.grad is not None
    assert a.grad is not None
    assert x.grad.dtype == a.grad.dtype == torch.bfloat16
