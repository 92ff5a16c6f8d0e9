"""PiSSA: start from the principal singular vectors of the weight (Meng et al. 2024, arXiv 2404.02948)."""

from __future__ import annotations

from torch import Tensor

from .svd import approximate_singular_vectors, singular_vectors


def pissa(w: Tensor, r: int, scaling: float, iterations: int | None = None) -> tuple[Tensor, Tensor]:
    """Factors with ``scaling * B A`` the best approximation of the weight of rank r, its singular values shared by both.

    Args:
        w: ``(*batch, out, in)``.
        iterations: approximate by so many subspace iterations; None is exact.

    Returns:
        A ``(*batch, r, in)`` and B ``(*batch, out, r)``, of the rank that the weight can have at most.
    """
    r = min(r, *w.shape[-2:])
    u, s, v = singular_vectors(w, r) if iterations is None else approximate_singular_vectors(w, r, iterations)
    root = (s / scaling).sqrt()
    return root.unsqueeze(-1) * v.mT, u * root.unsqueeze(-2)
