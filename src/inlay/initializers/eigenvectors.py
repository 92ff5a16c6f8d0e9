"""A few eigenvectors of ``W W'``, the first or the last of many, at a part of the cost of all.

They are exact: what is found is taken where its residual says that no more than `TOLERANCE` of it lies outside of the space that is
looked for. Where that is not reached, all eigenvectors are computed in double precision.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]

# What starts an adapter follows from the base and must come out the same whenever the adapter is loaded: no seed of a session.
SEED = 1009
TOLERANCE = 1e-9
# Of so many eigenvectors in all, some are found faster than all.
MANY = 384
# Directions carried along beyond those that are looked for.
SPARE = 8
# How far an eigenvalue has to be from the next, beside the largest, for their vectors to be told apart.
NEAR = 1e-5


def eigenvectors(w: Tensor, k: int, *, smallest: bool = False) -> Tensor:
    """Orthonormal eigenvectors of ``W W'`` with the ``k`` largest eigenvalues, or the smallest: ``(*batch, m, k)``, the largest last
    (the smallest first).

    Args:
        w: ``(*batch, m, n)``, ``m <= n``, in the precision to compute in.
    """
    m, found = w.shape[-2], None
    # What has no numbers (`inlay.plan`) goes the way that asks for none.
    has_numbers = type(w) in (Tensor, torch.nn.Parameter) and not w.is_meta
    if has_numbers and w.dtype == torch.float64 and m >= max(MANY, 4 * (k + SPARE)):
        found = _smallest(w, k) if smallest else _largest(w, k)
    if found is None:
        _, vectors = torch.linalg.eigh(w @ w.mT)
        found = vectors[..., :k] if smallest else vectors[..., m - k :]
    return found


def _largest(w: Tensor, k: int) -> Tensor | None:
    found = None
    if w.shape[-2] >= 32 * (k + SPARE):
        found = _in_krylov_space(w, k, lambda columns: w.mT @ columns, lambda columns: w @ columns)
    return _refined(w, k, smallest=False) if found is None else found


def _smallest(w: Tensor, k: int) -> Tensor | None:
    found = _refined(w, k, smallest=True)
    if found is not None or w.shape[-2] < 32 * (k + SPARE):
        return found
    # Those that are small beside single precision are the largest of the inverse, far from one another.
    root, failed = torch.linalg.cholesky_ex(w @ w.mT)
    if failed.any():
        return None
    solve = torch.linalg.solve_triangular
    found = _in_krylov_space(w, k, lambda c: solve(root, c, upper=False), lambda c: solve(root.mT, c, upper=True))
    return None if found is None else found.flip(-1)


def _in_krylov_space(w: Tensor, k: int, half: Step, other_half: Step) -> Tensor | None:
    """The last k eigenvectors of an operator, from the space that it spans if applied again and again (Golub and Underwood 1977); None
    where that takes many times, as eigenvalues that lie close do.

    Args:
        half, other_half: multiply ``(*batch, m, columns)`` with the root of the operator, and that with the other root.
    """
    m, width = w.shape[-2], k + SPARE
    drawn = torch.randn(m, width, generator=torch.Generator().manual_seed(SEED), dtype=w.dtype).to(w.device)
    basis = torch.linalg.qr(drawn).Q.expand(*w.shape[:-2], m, width)
    image, most, before = half(basis), 2 * m // (3 * width), None
    for steps in range(1, most + 1):
        # Twice, as the first subtraction leaves what rounding takes.
        fresh, length = torch.linalg.qr(_outside(other_half(image[..., -width:]), basis))
        fresh, again = torch.linalg.qr(_outside(fresh, basis))
        if steps > 1 and steps % 2 == 0:
            values, vectors = torch.linalg.eigh(image.mT @ image)
            residual = (again @ length @ vectors[..., -width:, -k:]).norm(dim=-2).amax(-1)
            off = _off(residual, values[..., -k] - values[..., -k - 1], values[..., -1])
            if off <= TOLERANCE:
                return basis @ vectors[..., -k:]
            if before is not None:
                to_go = 2 * log(TOLERANCE / off) / log(off / before) if off < before else m
                if not steps + to_go <= most:
                    return None
            before = off
        basis, image = torch.cat((basis, fresh), -1), torch.cat((image, half(fresh)), -1)
    return None


def _refined(w: Tensor, k: int, smallest: bool) -> Tensor | None:
    """From all eigenvectors in single precision: what the residual in double precision holds of the others is taken out, divided by how
    far their eigenvalues are. None where single precision does not tell the eigenvalues apart."""
    m, width = w.shape[-2], k + SPARE
    size = w.norm(dim=(-2, -1), keepdim=True).clamp_min(torch.finfo(w.dtype).tiny)
    low = (w / size).float()
    values, vectors = torch.linalg.eigh(low @ low.mT)
    values = values * size.squeeze(-1).square()
    inner, outer = (slice(width), slice(width, m)) if smallest else (slice(m - width, m), slice(m - width))
    wanted = slice(k) if smallest else slice(width - k, width)
    others, far, top = vectors[..., outer], values[..., outer].unsqueeze(-1), values[..., -1]
    found, before = vectors[..., inner].to(w.dtype), 4.0
    while True:
        found = torch.linalg.qr(found).Q
        image = w @ (w.mT @ found)
        near, turn = torch.linalg.eigh(found.mT @ image)
        found = found @ turn
        residual = image @ turn - found * near.unsqueeze(-2)
        edge = (near[..., k] - near[..., k - 1]) if smallest else (near[..., -k] - near[..., -k - 1])
        off = _off(residual[..., wanted].norm(dim=-2).amax(-1), edge, top)
        if off <= TOLERANCE:
            return found[..., wanted]
        if not off < before / 4:
            return None
        before = off
        # Scaled, as single precision would not hold them.
        length, scale = residual.norm(dim=-2, keepdim=True).clamp_min(torch.finfo(w.dtype).tiny), top[..., None, None]
        apart = (near.unsqueeze(-2) - far) / scale
        apart = torch.where(apart < 0, -1, 1) * apart.abs().clamp_min(1e-7)
        held = others.mT @ (residual / length).float() / apart.float()
        found = found + others @ held * (length / scale)


def _outside(columns: Tensor, basis: Tensor) -> Tensor:
    return columns - basis @ (basis.mT @ columns)


def _off(residual: Tensor, edge: Tensor, top: Tensor) -> float:
    """How far what was found may be from the space that is looked for, at most, of all matrices."""
    tiny = torch.finfo(edge.dtype).tiny
    return float((residual / torch.maximum(edge, NEAR * top).clamp_min(tiny)).amax())
