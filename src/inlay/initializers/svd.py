"""Singular value decompositions of stacks of weights: exact ones of which only some vectors are wanted, and randomised ones."""

from __future__ import annotations

import torch
from torch import Tensor

from .eigenvectors import SEED, eigenvectors, precise, precise_if_small, transposed_times

__all__ = [
    "SEED",
    "approximate_singular_vectors",
    "orthonormal",
    "orthonormal_rows",
    "precise",
    "singular_vectors",
    "singular_vectors_of_product",
]


def singular_vectors(w: Tensor, k: int, *, smallest: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` largest singular values and their vectors, or the smallest; exact, by the eigenvectors of the smaller Gram matrix.

    Squares cost half the digits, so they are formed in double precision: that is more exact than a decomposition in single
    precision unless the condition is beyond 1e9, and takes less time.

    Args:
        w: ``(*batch, m, n)``.
        k: at most ``min(m, n)``.

    Returns:
        U ``(*batch, m, k)``, S ``(*batch, k)`` falling, V ``(*batch, n, k)``. A vector whose value vanishes is zero on the
        longer side.
    """
    wide = w.shape[-2] <= w.shape[-1]
    w = precise_if_small(w if wide else w.mT)
    near = eigenvectors(w, k, smallest=smallest).flip(-1)
    far = transposed_times(w, near)
    values = far.norm(dim=-2)
    far = far / values.clamp_min(torch.finfo(far.dtype).tiny).unsqueeze(-2)
    return (near, values, far) if wide else (far, values, near)


def approximate_singular_vectors(w: Tensor, k: int, iterations: int, oversampling: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """About the ``k`` largest singular values and their vectors, by subspace iteration (Halko, Martinsson and Tropp 2011).

    The expected error of the approximation, ``|W - U S V'|``, is within ``(1 + 4 sqrt(2 min(m, n) / (k - 1))) ** (1 / (2 q + 1))``
    of the best one's, where q is the number of iterations.

    Args:
        w: ``(*batch, m, n)``.
        k: at most ``min(m, n)``.
        iterations: products with ``W W'`` beyond the first.
        oversampling: vectors carried along beyond ``k``.

    Returns:
        As `singular_vectors`, in single precision.
    """
    w = w.float()
    width = min(k + oversampling, *w.shape[-2:])
    # Narrow products run faster with the long axis last.
    drawn = torch.randn(width, w.shape[-1], generator=torch.Generator().manual_seed(SEED)).to(w.device)
    rows = orthonormal_rows(drawn @ w.mT)
    for _ in range(iterations):
        rows = orthonormal_rows(orthonormal_rows(rows @ w) @ w.mT)
    u, s, v = singular_vectors(rows @ w, k)
    return rows.mT @ u.float(), s.float(), v.float()


def orthonormal(columns: Tensor) -> Tensor:
    """A basis of what the columns span."""
    return torch.linalg.qr(columns).Q


def orthonormal_rows(rows: Tensor) -> Tensor:
    return orthonormal(rows.mT).mT


def singular_vectors_of_product(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The singular values of ``B A`` and their vectors, exact, without forming the product: by QR of either factor and the
    decomposition of the small core between them.

    Args:
        b: ``(*batch, m, r)``.
        a: ``(*batch, r, n)``.

    Returns:
        As `singular_vectors`, ``min(m, r, n)`` of them, in double precision.
    """
    left, upper = torch.linalg.qr(precise(b))
    right, lower = torch.linalg.qr(precise(a).mT)
    u, s, vt = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    return left @ u, s, right @ vt.mT
