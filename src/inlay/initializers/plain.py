"""Initial values that need neither the base nor data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.param import Init, kaiming_uniform, normal, zeros


def uniform(start_from_base: bool) -> tuple[Init, Init]:
    """LoRA's own: A Kaiming-uniform and B zero; both random where the adapter is not to start from the base (for tests)."""
    return kaiming_uniform, zeros if start_from_base else kaiming_uniform


def gaussian(r: int) -> tuple[Init, Init]:
    """A normal with standard deviation ``1 / r``, B zero."""
    return normal(1 / r), zeros


def orthogonal(scaling: float) -> tuple[Init, Init]:
    """A from the odd and B from the even columns of one orthogonal r x r basis, so that ``B A = 0`` while neither is zero."""
    return _half(scaling, 1), _half(scaling, 0)


def _half(scaling: float, half: int) -> Init:
    def start(tensor: Tensor, generator: torch.Generator) -> None:
        # Both factors must see one basis, so its generator is made anew from what they share: the rank.
        r = tensor.shape[-2] if half else tensor.shape[-1]
        shared = torch.Generator().manual_seed(r)
        basis, _ = torch.linalg.qr(torch.randn(r, r, generator=shared))
        columns = basis[half::2]
        if half:
            tensor.copy_((torch.randn(*tensor.shape[:-2], tensor.shape[-1], r // 2, generator=generator) @ columns).mT / 10 / scaling**0.5)
        else:
            tensor.copy_(torch.randn(*tensor.shape[:-1], r // 2, generator=generator) @ columns / 10 / scaling**0.5)

    return start


def orthonormal(tensor: Tensor, generator: torch.Generator) -> None:
    """Orthonormal rows, or columns where there are more rows than columns."""
    long, short = max(tensor.shape[-2:]), min(tensor.shape[-2:])
    basis = torch.linalg.qr(torch.randn(*tensor.shape[:-2], long, short, generator=generator)).Q
    tensor.copy_(basis if tensor.shape[-2] == long else basis.mT)
