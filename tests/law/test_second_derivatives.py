"""Gradients of gradients: those of the fused layers, which keep less than autograd does, are those of the formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inlay.kernels import lowrank

from .layouts import Layout
from .support import acting, adapted, close, over


def second_derivatives(model: nn.Module, example: tuple[Tensor, ...]) -> list[Tensor]:
    """The gradients of the sum of squares of a loss's gradients."""
    # What comes from an operation is what layers with one input look for.
    leaves = [*(q for q in model.parameters() if q.requires_grad), *(t.requires_grad_() for t in example if t.is_floating_point())]
    loss = model(*(t.tanh() if t.is_floating_point() else t for t in example)).sin().sum()
    first = torch.autograd.grad(loss, leaves, create_graph=True)
    squares = torch.stack([t.square().sum() for t in first]).sum()
    found = torch.autograd.grad(squares, leaves, allow_unused=True)
    return [torch.zeros_like(t) if d is None else d for t, d in zip(leaves, found, strict=True)]


@over(acting("linear", "linear-no-bias"))
def test_second_derivatives(case: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    model, example = adapted(case, layout), layout.example()
    found = []
    for few in (10**6, -1):
        monkeypatch.setattr(lowrank, "FEW_ROWS", few)
        found.append(second_derivatives(model, example))
    assert any(t.any() for t in found[0])
    for one, other in zip(*found, strict=True):
        close(one, other, 1e-8)
