"""A few eigenvectors of ``W W'``, the first or the last of many, at a part of the cost of all.

They are exact: what is found is taken where its residual says that no more than `TOLERANCE` of it lies outside of the space that is
looked for. Where that is not reached, all eigenvectors are computed in double precision.

A large matrix stays in the precision that it has. Of it no more is in double precision than a piece, and beside it there is little.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import log, prod

import torch
from torch import Tensor

Step = Callable[[Tensor], Tensor]

# What starts an adapter follows from the base and must come out the same whenever the adapter is loaded: no seed of a session.
SEED = 1009
TOLERANCE = 1e-9
# Of so many eigenvectors in all, some are found faster than all.
MANY = 384
# Of so many, all of them would take long and much memory even in single precision, and some are worth many steps.
LARGE = 4096
STEPS = 400
# Directions carried along beyond those that are looked for.
SPARE = 8
# A matrix of so many numbers is taken to double precision as a whole, a larger one in pieces.
AT_ONCE = 2**24
PIECE = 2**22
# How far an eigenvalue has to be from the next, beside the largest, for their vectors to be told apart.
NEAR = 1e-5


def precise(t: Tensor) -> Tensor:
    """In double precision, where the device has it."""
    return t.float() if t.device.type == "mps" else t.double()


def precise_if_small(w: Tensor) -> Tensor:
    """A matrix in the precision in which it is computed with, unless that is done in pieces."""
    return w if w.numel() > AT_ONCE and has_numbers(w) else precise(w)


def has_numbers(w: Tensor) -> bool:
    """Whether there is something to look at; what has none (`inlay.plan`) goes the way that asks for none."""
    return type(w) in (Tensor, torch.nn.Parameter) and not w.is_meta


def eigenvectors(w: Tensor, k: int, *, smallest: bool = False) -> Tensor:
    """Orthonormal eigenvectors of ``W W'`` with the ``k`` largest eigenvalues, or the smallest: ``(*batch, m, k)``, the largest last
    (the smallest first).

    Args:
        w: ``(*batch, m, n)``, ``m <= n``.
    """
    if w.ndim > 2 and w.numel() > AT_ONCE and has_numbers(w):
        # One by one, as what is beside a matrix is there for each of a stack.
        found = [eigenvectors(one, k, smallest=smallest) for one in w.flatten(0, -3)]
        return torch.stack(found).unflatten(0, w.shape[:-2])
    w = precise_if_small(w)
    m, found = w.shape[-2], None
    if has_numbers(w) and w.device.type != "mps" and m >= max(MANY, 4 * (k + SPARE)):
        found = _smallest(w, k) if smallest else _largest(w, k)
    if found is None:
        _, vectors = _all(gram(w))
        found = vectors[..., :k] if smallest else vectors[..., m - k :]
    return found


def eigenvectors_roughly(w: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues of ``W W'`` (of the weight over its norm) and their vectors in single precision, the largest last. Beside the
    weight this takes three times the memory of what it gives."""
    dtype = precise(w[..., :0]).dtype
    size = torch.linalg.vector_norm(w, dim=(-2, -1), keepdim=True, dtype=dtype).clamp_min(torch.finfo(dtype).tiny)
    return _all(gram(w, torch.float32, size))


# ---- products in double precision -------------------------------------------------------------------------------------------
def _pieces(w: Tensor, dtype: torch.dtype) -> Iterator[slice]:
    """Slices of the last axis: that is the long one, so that what comes of each is small."""
    n = w.shape[-1]
    step = n if w.dtype == dtype else max(1, PIECE // prod(w.shape[:-1]))
    for start in range(0, n, step):
        yield slice(start, min(n, start + step))


def times(w: Tensor, columns: Tensor) -> Tensor:
    """``W X``, in the precision of X."""
    return _sum(w[..., piece].to(columns.dtype) @ columns[..., piece, :] for piece in _pieces(w, columns.dtype))


def transposed_times(w: Tensor, columns: Tensor) -> Tensor:
    """``W' X``, in the precision of X."""
    found = [w[..., piece].to(columns.dtype).mT @ columns for piece in _pieces(w, columns.dtype)]
    return found[0] if len(found) == 1 else torch.cat(found, -2)


def gram(w: Tensor, dtype: torch.dtype | None = None, size: Tensor | None = None) -> Tensor:
    """``W W'``.

    Args:
        dtype: to compute in; None is double precision.
        size: the weight is divided by it before.
    """
    dtype = precise(w[..., :0]).dtype if dtype is None else dtype
    parts = (w[..., piece] if size is None else w[..., piece] / size for piece in _pieces(w, dtype))
    return _sum(part @ part.mT for part in (part.to(dtype) for part in parts))


def _sum(parts: Iterator[Tensor]) -> Tensor:
    found = next(parts)
    for part in parts:
        found += part
    return found


def _all(symmetric: Tensor) -> tuple[Tensor, Tensor]:
    """All eigenvalues and vectors, those of a large matrix in its place."""
    if symmetric.numel() <= PIECE or not has_numbers(symmetric) or symmetric.device.type != "cpu":
        return torch.linalg.eigh(symmetric)
    # Columns are what LAPACK has in rows.
    columns, values = symmetric.mT, torch.empty_like(symmetric[..., 0])
    torch.linalg.eigh(columns, out=(values, columns))
    return values, columns


# ---- the ways -----------------------------------------------------------------------------------------------------------------
def _lie_apart(m: int, k: int) -> bool:
    """Whether there are so many more than are looked for that these are found step by step."""
    return m >= (16 if m >= LARGE else 32) * (k + SPARE)


def _largest(w: Tensor, k: int) -> Tensor | None:
    found = None
    if _lie_apart(w.shape[-2], k):
        found = _in_krylov_space(w, k, lambda columns: transposed_times(w, columns), lambda columns: times(w, columns))
    return _refined(w, k, smallest=False) if found is None else found


def _smallest(w: Tensor, k: int) -> Tensor | None:
    m = w.shape[-2]
    found = _refined(w, k, smallest=True) if m < LARGE or not _lie_apart(m, k) else None
    if found is not None or not _lie_apart(m, k):
        return found
    # Those that are small beside single precision are the largest of the inverse, far from one another.
    root, failed = gram(w).mT, torch.empty(w.shape[:-2], dtype=torch.int32, device=w.device)
    torch.linalg.cholesky_ex(root, out=(root, failed))
    if failed.any():
        return None
    solve = torch.linalg.solve_triangular
    found = _in_krylov_space(w, k, lambda c: solve(root, c, upper=False), lambda c: solve(root.mT, c, upper=True))
    return None if found is None else found.flip(-1)


def _in_krylov_space(w: Tensor, k: int, half: Step, other_half: Step) -> Tensor | None:
    """The last k eigenvectors of an operator, from the space that it spans if applied again and again (Golub and Underwood 1977); None
    where that takes many times, as eigenvalues that lie close do. Of a large space the best half is kept, which goes on as it would
    (Wu and Simon 2000).

    Args:
        half, other_half: multiply ``(*batch, m, columns)`` with the root of the operator, and that with the other root.
    """
    m, width, dtype = w.shape[-2], k + SPARE, precise(w[..., :0]).dtype
    large = m >= LARGE
    drawn = torch.randn(m, width, generator=torch.Generator().manual_seed(SEED), dtype=dtype).to(w.device)
    basis = torch.linalg.qr(drawn).Q.expand(*w.shape[:-2], m, width)
    image, before = half(basis), None
    most, room = (STEPS, min(10 * width, max(4 * width, m // 8))) if large else (2 * m // (3 * width), m)
    for steps in range(1, most + 1):
        # Twice, as the first subtraction leaves what rounding takes.
        fresh, length = torch.linalg.qr(_outside(other_half(image[..., -width:]), basis))
        fresh, again = torch.linalg.qr(_outside(fresh, basis))
        full = basis.shape[-1] + width > room
        if full or (steps > 1 and steps % 2 == 0):
            values, vectors = torch.linalg.eigh(image.mT @ image)
            residual = (again @ length @ vectors[..., -width:, -k:]).norm(dim=-2).amax(-1)
            off = _off(residual, values[..., -k] - values[..., -k - 1], values[..., -1])
            if off <= TOLERANCE:
                return basis @ vectors[..., -k:]
            if before is not None and not large:
                to_go = 2 * log(TOLERANCE / off) / log(off / before) if off < before else m
                if not steps + to_go <= most:
                    return None
            before = off
            if full:
                best = vectors[..., -max(room // 2, 2 * width) :]
                basis, image = basis @ best, image @ best
        basis, image = torch.cat((basis, fresh), -1), torch.cat((image, half(fresh)), -1)
    return None


def _refined(w: Tensor, k: int, smallest: bool) -> Tensor | None:
    """From all eigenvectors in single precision: what the residual in double precision holds of the others is taken out, divided by how
    far their eigenvalues are. None where single precision does not tell the eigenvalues apart."""
    m, width, dtype = w.shape[-2], k + SPARE, precise(w[..., :0]).dtype
    tiny = torch.finfo(dtype).tiny
    values, vectors = eigenvectors_roughly(w)
    values = values * torch.linalg.vector_norm(w, dim=(-2, -1), dtype=dtype).clamp_min(tiny).square().unsqueeze(-1)
    inner, outer = (slice(width), slice(width, m)) if smallest else (slice(m - width, m), slice(m - width))
    wanted = slice(k) if smallest else slice(width - k, width)
    others, far, top = vectors[..., outer], values[..., outer].unsqueeze(-1), values[..., -1]
    found, before = vectors[..., inner].to(dtype), 4.0
    while True:
        found = torch.linalg.qr(found).Q
        image = times(w, transposed_times(w, found))
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
        length, scale = residual.norm(dim=-2, keepdim=True).clamp_min(tiny), top[..., None, None]
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
