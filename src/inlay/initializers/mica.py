"""MiCA: only A is trained, behind the weight's minor directions (arXiv 2604.01694)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.mixins import mixed_in
from ..core.param import Param, zeros
from ..core.site import Site
from .started import Started
from .svd import precise, singular_vectors
from .together import Computed, weights

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


class Mica(Computed):
    """Mixed in front of a method: B is frozen, and A starts from zero, unless what stands between the two does."""

    def refuses(self, site: Site) -> str | None:
        r, most = self.rank_at(site), min(site.shape[-2:])
        if r > most:
            return f"it has {most} minor directions, which is less than the rank of {r} that {self.init_option}='mica' asks for"
        if self.params(site)[self.names(site)[-1]].shape(site)[-2] != site.size("out"):
            return "its kernel is decomposed behind the core tensor, so what would have to be the minor directions is no free matrix"
        return super().refuses(site)

    def params(self, site: Site) -> dict[str, Param]:
        declared = super().params(site)
        a, *between, b = self.names(site)
        if not any(declared[name].init is zeros for name in between):
            declared[a] = replace(declared[a], init=zeros)
        declared[b] = replace(declared[b], init=zeros, trainable=False)
        return declared

    def compute(self, sites: Sequence[Site], paths: Sequence[str], known: bool) -> tuple[Tensor]:
        return (minor_directions(weights(sites), self.rank_at(sites[0])),)

    def start(self, p: Adapter) -> None:
        (b,) = self.computed(p)
        self.tensors(p)[-1].copy_(b)
        super().start(p)


def mica(method: type[Started]) -> type[Started]:
    """The class of a low-rank method that trains behind the weight's minor directions."""
    return mixed_in(Mica, method)
