"""The fused layers beside their formulas, under one signature, and the inputs that both are tried on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels.decomposed import linear_decomposed
from inlay.kernels.lowrank import linear_plus_low_rank

SCALE = 0.7


@dataclass(frozen=True)
class Kernel:
    """A fused layer: ``run`` and ``formula`` take x, w, bias and the trained tensors."""

    run: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    gained: bool = False


def low_rank_formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    return F.linear(x, w, bias) + SCALE * F.linear(F.linear(x, a), b)


def decomposed_formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
    y = gain * low_rank_formula(x, w, None, a, b)
    return y if bias is None else y + bias


def _constant(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Further factors, not trained."""
    return torch.linspace(-0.3, 0.5, 2 * a.shape[1]).to(a).view(2, -1), torch.linspace(0.4, -0.2, 2 * len(b)).to(b).view(-1, 2)


def with_a_constant(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    a0, b0 = _constant(a, b)
    return linear_plus_low_rank(x, w, bias, torch.cat((a, a0)), torch.cat((b, b0), 1), SCALE, 0.0, (a, b))


def with_a_constant_formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    a0, b0 = _constant(a, b)
    return low_rank_formula(x, w, bias, torch.cat((a, a0)), torch.cat((b, b0), 1))


KERNELS = {
    "low rank and a constant": Kernel(with_a_constant, with_a_constant_formula),
    "low rank": Kernel(lambda x, w, bias, a, b: linear_plus_low_rank(x, w, bias, a, b, SCALE, 0.0), low_rank_formula),
    "decomposed": Kernel(lambda x, w, bias, a, b, gain: linear_decomposed(x, w, bias, a, b, gain, SCALE), decomposed_formula, True),
}

# More rows than the weight has go another way than fewer.
SHAPES = {
    "few rows": (3,),
    "many rows": (40,),
    "two axes": (2, 3),
    "four axes": (2, 1, 5, 4),
    "one vector": (),
    "none": (0,),
    "no batch": (0, 4),
}


def tensors(
    kernel: Kernel, shape: tuple[int, ...] = (2, 3), bias: bool = True, r: int = 3, dtype: torch.dtype = torch.float64
) -> list[Tensor | None]:
    """x, w, bias and the trained tensors; all but w and bias require gradients."""
    out, inp = 6, 7
    x = torch.randn(*shape, inp, dtype=dtype).requires_grad_()
    w = torch.randn(out, inp, dtype=dtype)
    trained = [torch.randn(r, inp, dtype=dtype), torch.randn(out, r, dtype=dtype)]
    if kernel.gained:
        trained.append(torch.rand(out, dtype=dtype) + 0.5)
    return [x, w, torch.randn(out, dtype=dtype) if bias else None, *(t.requires_grad_() for t in trained)]


def gradients(run: Callable[..., Tensor], given: list[Tensor | None], g: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    """The output and the gradients of all that require one."""
    y = run(*given)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape) if g is None else g
    return y.detach(), list(torch.autograd.grad(y, [t for t in given if t is not None and t.requires_grad], g))
