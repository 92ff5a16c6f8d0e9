"""MiCA: only A is trained, behind the weight's minor directions (arXiv 2604.01694)."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.method import LowRank, Param, zeros
from ..core.mixins import mixed_in
from ..core.site import Site
from .svd import precise, singular_vectors

if TYPE_CHECKING:
    from ..core.adapter import Adapter


def minor_directions(w: Tensor, r: int) -> Tensor:
    """The left singular vectors ``(*batch, out, r)`` of the r smallest of the ``min(out, in)`` singular values."""
    u, s, _ = singular_vectors(w, r, smallest=True)
    if w.shape[-2] <= w.shape[-1] or (s > 1e-9 * precise(w).norm(dim=(-2, -1)).unsqueeze(-1)).all():
        return u
    # A weight of lower rank than it has columns says nothing of these directions from the side of its columns.
    import torch

    u, _, _ = torch.linalg.svd(precise(w), full_matrices=False)
    return u[..., -r:]


class Mica(LowRank):
    """Mixed in front of `LoraConfig` or a variant of it: B is frozen and A starts from zero."""

    if TYPE_CHECKING:

        def names(self, site: Site) -> tuple[str, str]: ...

    def refuses(self, site: Site) -> str | None:
        declared = super().params(site)
        r = declared[self.names(site)[0]].shape(site)[-2]
        most = min(site.shape[-2:])
        if r > most:
            return f"it has {most} minor directions, which is less than the rank of {r} that init_lora_weights='mica' asks for"
        return super().refuses(site)

    def params(self, site: Site) -> dict[str, Param]:
        declared = super().params(site)
        a, b = self.names(site)
        declared[a] = replace(declared[a], init=zeros)
        declared[b] = replace(declared[b], init=zeros, trainable=False)
        return declared

    def start(self, p: Adapter) -> None:
        _, b = self.names(p.site)
        kept = getattr(p, b)
        kept.copy_(minor_directions(p.site.read()[0].detach(), kept.shape[-1]))
        super().start(p)


def mica(method: type[LowRank]) -> type[LowRank]:
    """The class of a low-rank method that trains behind the weight's minor directions."""
    return mixed_in(Mica, method)

