"""A linear layer with a low-rank update whose B is mixed from several by a router, as one autograd function.

The router sees what A makes of the input, and the mixture is its mean over all rows. Kept are the input, that product of rank r
and the router's shares.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import accumulate, compute_dtype, linear, rows_of, takes_the_formula


def linear_plus_routed(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, router: Tensor, scale: float) -> Tensor:
    """``x W' + bias + scale * (x A') (sum_e p_e B_e)``, with p the mean over all rows of ``softmax(x A' R')``.

    Args:
        x: ``(*, in)``. w: ``(out, in)``. bias: ``(out,)`` or None. a: ``(r, in)``. b: ``(experts, r, out)``. router: ``(experts, r)``.
        scale: the factor in front of the update.
    """
    if takes_the_formula(x, w, bias) or not torch.is_grad_enabled():
        return _formula(x, w, bias, a, b, router, scale)
    return _LinearPlusRouted.apply(x, w, bias, a, b, router, scale)


def _formula(x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, router: Tensor, scale: float) -> Tensor:
    y = F.linear(x, w, bias)
    u = F.linear(x.to(compute_dtype(x, a)), a)
    shares = F.linear(u, router).flatten(0, -2).softmax(-1).mean(0)
    return torch.add(y, u @ torch.einsum("e,ero->ro", shares.to(b.dtype), b).to(u.dtype), alpha=scale).to(y.dtype)


class _LinearPlusRouted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, router: Tensor, scale: float) -> Tensor:
        dtype = compute_dtype(x, a)
        # With the long axis last: see `kernels.lowrank`.
        u = a.to(dtype) @ rows_of(x, dtype).t()
        shares = (router.to(dtype) @ u).softmax(0)
        y = linear(x, w, bias)
        accumulate(y.view(-1, y.shape[-1]), u.t(), _mixed(shares, b, dtype), scale)
        ctx.save_for_backward(x, w, bias, a, b, router, u, shares)
        ctx.scale, ctx.dtype = scale, dtype
        return y

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w, bias, a, b, router, u, shares = ctx.saved_tensors
        needed = ctx.needs_input_grad
        if torch.is_grad_enabled():
            own = [t for t, need in zip((x, w, bias, a, b, router), needed, strict=False) if need]
            y = _formula(x, w, bias, a, b, router, ctx.scale)
            found = iter(torch.autograd.grad(y, own, g, create_graph=True))
            return tuple(next(found) if need else None for need in needed)
        dtype, rows, low = ctx.dtype, rows_of(g, g.dtype), rows_of(g, ctx.dtype)
        mixed = _mixed(shares, b, dtype)
        dmixed = (u @ low).mul_(ctx.scale)
        # The mean passes the same gradient to each row's shares.
        dshares = torch.einsum("ro,ero->e", dmixed, b.to(dtype)).unsqueeze(1).to(shares.dtype) / shares.shape[1]
        scores = (shares * (dshares - (shares * dshares).sum(0))).to(dtype)
        du = torch.addmm(router.to(dtype).t() @ scores, mixed, low.t(), beta=1, alpha=ctx.scale)
        dx = da = db = drouter = None
        if needed[3]:
            da = (du @ rows_of(x, dtype)).to(a.dtype)
        if needed[4]:
            db = (shares.mean(1).to(dtype).view(-1, 1, 1) * dmixed).to(b.dtype)
        if needed[5]:
            drouter = (scores @ u.t()).to(router.dtype)
        if needed[0]:
            dx = accumulate(rows @ w.to(rows.dtype), du.t(), a.to(dtype)).view(x.shape)
        return dx, None, None, da, db, drouter, None


def _mixed(shares: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``sum_e p_e B_e``, ``(r, out)``."""
    return torch.einsum("e,ero->ro", shares.mean(1).to(dtype), b.to(dtype))
