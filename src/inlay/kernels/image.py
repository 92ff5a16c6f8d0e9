"""What layers keep in place of their input: its product with a frozen matrix, ``u = A x'``.

Such a layer's function takes u as one more input, of which autograd knows how it comes from x. The layer gives u no gradient, as that
of x has it in it already. But gradients that are to be differentiated themselves are functions of u, and so of x, of which not one
number is needed, as u is linear in it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .dropout import factors
from .once import product_with
from .rows import rows_of


def image(x: Tensor, a: Tensor, dtype: torch.dtype, rate: float = 0.0, bits: Tensor | None = None, *, common: bool = False) -> Tensor:
    """``A drop(x)'``, of shape ``(r, rows)``. Kept for its gradient is A.

    Args:
        x: ``(*, in)``. a: ``(r, in)``, frozen.
        rate, bits: of dropout, see `draw_bits`.
        common: other layers have both the same input and the same A.
    """
    return _Image.apply(x, a, dtype, rate, bits, common)


class _Image(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, a: Tensor, dtype: torch.dtype, rate: float, bits: Tensor | None, common: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(a, bits)
        ctx.shape, ctx.dtype, ctx.rate = x.shape, x.dtype, rate
        if common and bits is None:
            return product_with(x, a, dtype).detach()
        rows = rows_of(x, dtype)
        return a.to(dtype) @ (rows if bits is None else factors(bits, rate, rows.shape, dtype).mul_(rows)).t()

    @staticmethod
    def backward(ctx: Any, du: Tensor | None) -> tuple[Tensor | None, ...]:
        if du is None:
            return (None,) * 6
        a, bits = ctx.saved_tensors
        dx = du.t() @ a.to(du.dtype)
        if bits is not None:
            dx = dx * factors(bits, ctx.rate, tuple(dx.shape), dx.dtype)
        return dx.to(ctx.dtype).view(ctx.shape), *(None,) * 5
