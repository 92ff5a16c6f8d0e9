"""KaSA: the weight without its smallest singular components, plus ``s B diag(d) A`` (Wang et al. 2024, arXiv 2412.06071).

The weight itself stays. What is left out has the rank of the update, so it is one more product of two factors, frozen and
subtracted: the adapter can be switched, merged and taken out again, which HF peft's truncation in place cannot.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..core.additive import LowRank, add, meet
from ..core.inner import Inner
from ..core.method import full
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..initializers.svd import singular_vectors
from .lora import LoraConfig

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@dataclass
class KasaConfig:
    """The terms that KaSA adds to the loss in training.

    Args:
        beta: in front of ``|d|^2``.
        gamma: in front of ``|B'B - 1| + |AA' - 1|``.

    Raises:
        ValueError: one of them is negative.
    """

    beta: float = field(default=1e-4, metadata={"help": "Weight of the singular values in the loss."})
    gamma: float = field(default=1e-3, metadata={"help": "Weight of the factors' distance from orthonormal ones in the loss."})

    def __post_init__(self) -> None:
        for name in ("beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"`{name}` should not be negative, and is {getattr(self, name)!r}.")


class Kasa(LoraConfig):
    """LoRA with a ``kasa_config``."""

    @property
    def never_identity(self) -> str:
        return "KaSA leaves out the smallest singular components of the weight"

    def refuses(self, site: Site) -> str | None:
        reason = super().refuses(site)
        rank, least = int(LoraConfig.params(self, site)[self.names(site)[0]].axes[0]), min(site.shape[-2:])
        if reason is None and rank >= least:
            return f"a rank of {rank} leaves nothing of its weight, which has rank {least} at most"
        return reason

    def params(self, site: Site) -> dict[str, Param]:
        declared = super().params(site)
        r = declared[self.names(site)[0]].axes[0]
        return declared | {
            "lora_diag": Param((r,), normal()),
            "lora_dropped_A": Param((r, "in"), zeros, trainable=False, persistent=False),
            "lora_dropped_B": Param(("out", r), zeros, trainable=False, persistent=False),
        }

    def derive(self, p: Adapter) -> None:
        super().derive(p)
        r = p.lora_diag.shape[-1]
        u, s, v = singular_vectors(p.site.read()[0].detach(), r, smallest=True)
        p.lora_dropped_A.copy_(v.mT)
        p.lora_dropped_B.copy_(u * s.unsqueeze(-2))

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """A larger rank leaves out more of the weight: the new ranks hold what the smaller one did not leave out."""
        values, (a, b), r = super().padded(p, small), self.names(p.site), small.lora_diag.shape[-1]
        more = p.lora_diag.shape[-1] - r
        values["lora_diag"][..., r:] = 1
        values[a][..., r:, :] = p.lora_dropped_A[..., :more, :]
        values[b][..., r:] = p.lora_dropped_B[..., :more] / self.scaling
        return values

    def trained(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = super().factors(p)
        return a, b * p.lora_diag.unsqueeze(-2)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = self.trained(p)
        return torch.cat((a, p.lora_dropped_A), -2), torch.cat((b, p.lora_dropped_B / -self.scaling), -1)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not (self.dropout and p.training):
            return super().around(p, inner, x)

        def truncated(x: Tensor) -> Tensor:
            site = inner.site
            inputs, a, b = meet(x, p.lora_dropped_A, p.lora_dropped_B)
            return add(inner(x), site.up(site.down(inputs, a), b), -p.strength)

        # Dropout is for the update; what the weight lacks it lacks for all inputs.
        return LowRank.with_factors(self, p, Inner(inner.site, truncated, inner.params), x, *self.trained(p))

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        lacking = -p.strength * (full(p.lora_dropped_B) @ full(p.lora_dropped_A))
        return lacking + super().thinned(p, change - lacking)

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        terms = [_penalty(p) for p in adapters if isinstance(p.method, Kasa)]
        return torch.stack([t.to(terms[0].device) for t in terms]).sum() if terms else None


def _penalty(p: Adapter) -> Tensor:
    method = p.method
    assert isinstance(method, Kasa)
    a, b = map(full, LoraConfig.factors(method, p))
    one = torch.eye(a.shape[-2], device=a.device, dtype=a.dtype)
    apart = (b.mT @ b - one).norm() + (a @ a.mT - one).norm()
    return method.kasa_config.beta * full(p.lora_diag).square().sum() + method.kasa_config.gamma * apart
