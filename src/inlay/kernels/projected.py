"""Tensors that may only move within a subspace: the gradient is projected on its way back, the value stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def within(t: Tensor, basis: Tensor, complement: bool) -> Tensor:
    """``t (*batch, n, k)`` itself, which takes only that part of its gradient's columns which lies in a subspace.

    Args:
        basis: ``(*batch, n, m)``, orthonormal columns.
        complement: the subspace is what is orthogonal to them, and not what they span.
    """
    return _Within.apply(t, basis, complement) if t.requires_grad else t


class _Within(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(t: Tensor, basis: Tensor, complement: bool) -> Tensor:
        return t.view_as(t)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        _, basis, ctx.complement = inputs
        ctx.save_for_backward(basis)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        (basis,) = ctx.saved_tensors
        inside = basis @ (basis.mT @ g)
        return g - inside if ctx.complement else inside, None, None
