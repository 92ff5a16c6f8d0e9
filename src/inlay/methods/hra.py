"""HRA: ``W H_1 H_2 ... H_r`` with Householder reflections ``H_i = I - 2 u_i u_i'`` (Yuan et al. 2024, arXiv 2405.17484).

Their product is ``I - U T U'`` with ``inv(T) = triu(U'U, 1) + I / 2`` (compact WY), so turning costs two thin products.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.config import PeftType
from ..core.families import Rotation, in_full_precision
from ..core.method import Method, full, register
from ..core.param import Param, generator_for, kaiming_uniform
from ..core.site import Site
from ..kernels.turned import linear_reflected

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class HRAConfig(Rotation):
    """Rotations as chains of reflections.

    Args:
        r: how many reflections. In pairs they can start as the identity; an odd number cannot.
        apply_GS: reflect in orthogonal directions (Gram-Schmidt). Such a chain is never the identity, not at the start either.
        init_weights: start from equal pairs; False starts from random directions, for tests.

    Raises:
        ValueError: r is no positive integer.
    """

    peft_type: str | None = PeftType.HRA
    r: int = field(default=8, metadata={"help": "Number of reflections.", "positive": True})
    apply_GS: bool = field(default=False, metadata={"help": "Reflect in orthogonal directions."})  # noqa: N815  HF's name
    init_weights: bool = field(default=True, metadata={"help": "Start from the identity."})

    prefix: ClassVar[str] = "hra_"
    paper: ClassVar[str] = "2405.17484"
    equation: ClassVar[str] = "W H1 H2 ... Hr, Hi = I - 2 ui ui'"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4}, "gram-schmidt": {"r": 2, "apply_GS": True}, "odd": {"r": 3, "bias": "hra_only"}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}

    @property
    def never_identity(self) -> str:
        if self.apply_GS:
            return "orthogonal reflections change the sign of their directions"
        return "an odd number of reflections is no rotation" if self.r % 2 else ""

    def refuses(self, site: Site) -> str | None:
        if self.apply_GS and self.r > site.size("in"):
            return f"there are no r={self.r} orthogonal directions in {site.size('in')} dimensions"
        return super().refuses(site)

    def params(self, site: Site) -> dict[str, Param]:
        # Equal directions have no orthogonal basis, so Gram-Schmidt must not start from pairs.
        paired = self.init_weights and self.r % 2 == 0 and not self.apply_GS
        in_file = (prod(site.batch) * site.size("in"), self.r)
        return {"hra_u": Param(("in", self.r), _pairs if paired else kaiming_uniform, file_shape=in_file)}

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Two reflections in the same direction are none."""
        more = self.r - small.hra_u.shape[-1]
        if more <= 0:
            return super().padded(p, small)
        if self.apply_GS or more % 2:
            why = "orthogonal directions (`apply_GS`)" if self.apply_GS else f"an odd number ({more})"
            raise ValueError(f"reflections cancel in pairs of one direction, and {why} of more do not")
        pairs = torch.empty(*small.hra_u.shape[:-1], more)
        _pairs(pairs, generator_for(self.seed, p.path, "padded"))
        return {"hra_u": torch.cat((small.hra_u.detach(), pairs.to(small.hra_u)), -1)}

    def turn(self, p: Adapter, rows: Tensor, *, inverse: bool = False, training: bool = False) -> Tensor:
        u, v = (t.to(rows.dtype) for t in self._thin(p, inverse))
        return rows - (rows @ u) @ v.mT

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None:
            return super().around(p, inner, x)
        # W (I - U V') on x is W on x (I - V U').
        return linear_reflected(x, *inner.dense, *self._thin(p, inverse=False))

    def _thin(self, p: Adapter, inverse: bool) -> tuple[Tensor, Tensor]:
        """``U`` and ``V`` such that the product of the reflections (or its inverse) is ``I - U V'``."""
        with in_full_precision(p):
            u = full(p.hra_u)
            if self.apply_GS:
                u, _ = torch.linalg.qr(u)
                return u, 2 * u
            u = F.normalize(u, dim=-2)
            eye = torch.eye(self.r, dtype=u.dtype, device=u.device)
            t = torch.linalg.solve_triangular((u.mT @ u).triu(1) + eye / 2, eye, upper=True)
            return u, u @ (t if inverse else t.mT)


def _pairs(tensor: Tensor, generator: torch.Generator) -> None:
    half = torch.empty(*tensor.shape[:-1], tensor.shape[-1] // 2)
    kaiming_uniform(half, generator)
    tensor.copy_(half.repeat_interleave(2, -1))
