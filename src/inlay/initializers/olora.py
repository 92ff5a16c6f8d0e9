"""OLoRA: start from the orthonormal columns of the weight's QR decomposition (Büyükakyüz 2024, arXiv 2406.01775)."""

from __future__ import annotations

from torch import Tensor

from .svd import orthonormal, precise, transposed_times


def olora(w: Tensor, r: int, scaling: float) -> tuple[Tensor, Tensor]:
    """B is the first r columns of Q, A the first r rows of R. The first columns of W are enough to know both: ``A = B' W``.

    As in the paper, the scaling is not divided out.

    Args:
        w: ``(*batch, out, in)``.

    Returns:
        A ``(*batch, r, in)`` and B ``(*batch, out, r)``, of the rank that the weight can have at most.
    """
    b = orthonormal(precise(w[..., : min(r, *w.shape[-2:])]))
    return transposed_times(w, b).mT, b
