"""An update cut down to a lower rank, and what that loses."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..initializers.svd import approximate_singular_vectors, singular_vectors, singular_vectors_of_product
from .effects import Update

# From this width on, a few vectors of a dense update are found by subspace iteration.
WIDE = 512
EPS = torch.finfo(torch.float32).eps


def check_rank(rank: float | None) -> None:
    """
    Raises:
        ValueError: it is neither a rank, nor a share, nor None.
    """
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(f"A rank that is a float is the share that is to stay, in (0, 1], not {rank}.")
    elif rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
        raise ValueError(f"A rank is a positive integer, or a share in (0, 1], not {rank!r}.")


@torch.no_grad()
def cut(update: Update, rank: float, clamp: float | None = None) -> tuple[Update, float]:
    """The nearest update of a rank, and the error: the norm of what is lost over the norm of all.

    Args:
        rank: an integer, or the share of the squared norm that is to stay: then the least rank that keeps it.
        clamp: limit the factors to this quantile of their numbers.
    """
    shape = update.site.shape
    if update.dense is None:
        a, b = update.factors()
        limit = min(*shape[-2:], a.shape[-2])
        if not limit:
            return replace(update, free=False), 0.0
        u, s, v = singular_vectors_of_product(b, a)
        total = s.square().sum()
    else:
        limit = min(shape[-2:])
        total = update.dense.double().square().sum() if update.dense.device.type != "mps" else update.dense.square().sum()
        if isinstance(rank, int) and limit >= WIDE and 8 * rank <= limit:
            u, s, v = approximate_singular_vectors(update.dense, rank, iterations=6, oversampling=rank)
        else:
            u, s, v = singular_vectors(update.dense, limit)
    k = min(rank, limit) if isinstance(rank, int) else rank_for(s, rank)
    left, right = (u * s.unsqueeze(-2))[..., :k].float(), v[..., :k].mT.float()
    if clamp is not None:
        bound = quantile(torch.cat((left.flatten(), right.flatten())), clamp)
        left, right = left.clamp(-bound, bound), right.clamp(-bound, bound)
    lost = float(((total - s[..., :k].square().sum()) / total).clamp_min(0).sqrt()) if total > 0 else 0.0
    return Update(update.name, update.site, right.contiguous(), left.contiguous(), bias=update.bias), lost


def rank_for(values: Tensor, share: float) -> int:
    """The least rank that keeps this share of the squares, in each matrix of a batch.

    Args:
        values: singular values ``(*batch, k)``, falling. What is below the digits of single precision counts as zero.
    """
    values = values.double() if values.device.type != "mps" else values
    values = values * (values > values[..., :1] * values.shape[-1] * EPS)
    energy = values.square().cumsum(-1)
    short = (energy < share * energy[..., -1:] * (1 - 1e-12)).sum(-1)
    return min(int(short.max()) + 1, values.shape[-1])


def quantile(values: Tensor, q: float) -> float:
    """As ``torch.quantile``, of any number of values."""
    at = q * (values.numel() - 1)
    low, high = (values.kthvalue(int(i) + 1).values for i in (at, min(int(at) + 1, values.numel() - 1)))
    return float(torch.lerp(low, high, at - int(at)))
