"""PSOFT: ``W + s B (diag(b) R diag(a) - I) A``, a rotation within the principal subspace of the weight (Wu et al. 2025, arXiv 2505.11235).

``s B A`` is the best approximation of rank r of ``W``, so the weight's largest directions are turned and the rest stays as it is.
Neither A nor B is in the file: both come from the base.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.families import cayley, cayley_series, in_full_precision, skew
from ..core.method import Method, full, padded, register
from ..core.param import Init, Param, normal, ones, zeros
from ..core.site import Site
from ..kernels.core import linear_plus_core

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class PsoftConfig(LowRank):
    """Rotations in the principal subspace.

    Args:
        r: dimension of the subspace.
        psoft_alpha: the update is scaled by ``psoft_alpha / r``, and its factors by the inverse.
        psoft_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        ab_svd_init: ``"psoft_init"`` (the singular values all in B, so that turning is orthogonal) or ``"pissa_init"`` (their
            square roots in either).
        psoft_svd: ``"full"`` or ``"lowrank"`` (randomised).
        psoft_svd_lowrank_niter: power iterations of the randomised decomposition.
        random_seed: seed of the randomised decomposition.
        psoft_orth: keep R orthogonal (Cayley); else it is any matrix.
        psoft_mag_b, psoft_mag_a: train a scale for each coordinate behind and before R.
        use_cayley_neumann: a series instead of the inverse in R, orthogonal only up to the terms left out.
        num_cayley_neumann_terms: where to cut the series.
        cayley_neumann_eps: the largest norm of the skew-symmetric matrix in the series, in (0, 1); None sets no bound.
        init_weights: start from the identity; False starts from random matrices, for tests.

    Raises:
        ValueError: an option is unknown or out of its range.
    """

    peft_type: str | None = PeftType.PSOFT
    r: int = field(default=32, metadata={"help": "Dimension of the subspace.", "positive": True})
    psoft_alpha: int = field(default=32, metadata={"help": "The update is scaled by psoft_alpha / r."})
    psoft_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    ab_svd_init: str = field(default="psoft_init", metadata={"help": "psoft_init or pissa_init.", "known": ("psoft_init", "pissa_init")})
    psoft_svd: str = field(default="full", metadata={"help": "full or lowrank.", "known": ("full", "lowrank")})
    psoft_svd_lowrank_niter: int = field(default=10, metadata={"help": "Power iterations of the randomised decomposition."})
    random_seed: int = field(default=0, metadata={"help": "Seed of the randomised decomposition."})
    psoft_orth: bool = field(default=True, metadata={"help": "Keep R orthogonal."})
    psoft_mag_b: bool = field(default=True, metadata={"help": "Train a scale behind R."})
    psoft_mag_a: bool = field(default=True, metadata={"help": "Train a scale before R."})
    use_cayley_neumann: bool = field(default=False, metadata={"help": "A series instead of an inverse."})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "Where to cut the series.", "positive": True})
    cayley_neumann_eps: float | None = field(default=None, metadata={"help": "Largest norm within the series."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "psoft_"
    dropout_option: ClassVar[str] = "psoft_dropout"
    paper: ClassVar[str] = "2505.11235"
    count_formula: ClassVar[str] = "r·(r - 1) / 2 + 2·r"
    equation: ClassVar[str] = "W + s B (diag(b) R diag(a) - I) A, R orthogonal, s B A the best of rank r for W"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "psoft_alpha": 2},
        "pissa": {"r": 2, "ab_svd_init": "pissa_init", "psoft_mag_a": False},
        "free": {"r": 2, "psoft_orth": False, "psoft_mag_b": False},
        "series": {"r": 3, "use_cayley_neumann": True, "cayley_neumann_eps": 0.2},
        "dropout": {"r": 2, "psoft_dropout": 0.3, "psoft_svd": "lowrank"},
    }
    ours: ClassVar[frozenset[str]] = Method.ours

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cayley_neumann_eps is not None and not 0 < self.cayley_neumann_eps < 1:
            raise ValueError(f"`cayley_neumann_eps` should be between 0 and 1, not {self.cayley_neumann_eps!r}.")
        if self.cayley_neumann_eps is not None and not self.use_cayley_neumann:
            warnings.warn("`cayley_neumann_eps` has no effect without `use_cayley_neumann=True`.")

    @property
    def scaling(self) -> float:
        return self.psoft_alpha / self.r

    @property
    def heavy(self) -> str:
        whole = (
            "with psoft_svd='full' its file is bound to the signs that a decomposition of the whole weight gives its singular vectors, "
            "which takes six times the weight beside it (of a float32 weight of 4096 x 4096, which has 67 MB, 493 MB); 'lowrank' is not"
        )
        return whole if self.psoft_svd == "full" else ""

    def refuses(self, site: Site) -> str | None:
        most = min(site.size("out"), site.size("in"))
        if self.r > most:
            return f"its matrix has no more than {most} principal directions, and r={self.r}"
        if self.r == 1 and self.psoft_orth and not (self.psoft_mag_a or self.psoft_mag_b):
            return "there is nothing to turn in one dimension"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        r = self.r
        if self.psoft_orth:
            matrix = Param((r * (r - 1) // 2,), zeros if self.init_weights else normal(0.1), "psoft_R.weight")
        else:
            matrix = Param((r, r), _identity(0.0 if self.init_weights else 0.1), "psoft_R.weight", file_shape=(*site.batch, r, r))
        declared = {"psoft_R": matrix}
        if self.psoft_mag_b:
            declared["psoft_vector_b"] = Param((r,), ones, "psoft_R.vector_b")
        if self.psoft_mag_a:
            declared["psoft_vector_a"] = Param((r,), ones, "psoft_R.vector_a")
        return declared | {
            "psoft_A": Param((r, "in"), trainable=False, persistent=False),
            "psoft_B": Param(("out", r), trainable=False, persistent=False),
        }

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """What is turned in fewer of the same directions; in the others nothing is."""
        r, values = small.method.r, {}  # type: ignore[attr-defined]
        for name in p.declared.keys() & {"psoft_vector_a", "psoft_vector_b"}:
            values[name] = torch.ones_like(getattr(p, name))
            if name in small.declared:
                values[name][..., :r] = getattr(small, name).detach()
        if self.psoft_orth:
            whole = padded(skew(small.psoft_R.detach(), r), (*p.psoft_R.shape[:-1], self.r, self.r))
            upper, lower = torch.triu_indices(self.r, self.r, 1)
            return values | {"psoft_R": whole[..., upper, lower]}
        whole = padded(small.psoft_R, p.psoft_R.shape)
        whole.diagonal(dim1=-2, dim2=-1)[..., r:] = 1
        return values | {"psoft_R": whole}

    def derive(self, p: Adapter) -> None:
        w, _ = p.site.read()
        # In single precision whatever the base has: signs of singular vectors may differ between precisions, and files rely on them.
        u, s, vh = self._decomposed(w.detach().float())
        s = s / self.scaling
        left, right = (s, torch.ones_like(s)) if self.ab_svd_init == "psoft_init" else (s.sqrt(), s.sqrt())
        p.psoft_A.copy_(right.unsqueeze(-1) * vh)
        p.psoft_B.copy_(u * left.unsqueeze(-2))

    def _decomposed(self, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``U (*batch, out, r)``, the singular values and ``V' (*batch, r, in)``."""
        if self.psoft_svd == "full":
            u, s, vh = torch.linalg.svd(w, full_matrices=False)
            return u[..., : self.r], s[..., : self.r], vh[..., : self.r, :]
        # torch draws from its global generator here, which is put back to where it was.
        devices = [] if w.device.type == "cpu" else [w.device]
        with torch.random.fork_rng(devices=devices, device_type="cuda" if not devices else w.device.type):
            torch.manual_seed(self.random_seed)
            u, s, v = torch.svd_lowrank(w, q=self.r, niter=self.psoft_svd_lowrank_niter)
        return u, s, v.mT

    def matrix(self, p: Adapter) -> Tensor:
        """``diag(b) R diag(a)``, ``(*batch, r, r)``."""
        with in_full_precision(p):
            matrix = full(p.psoft_R)
            if self.psoft_orth:
                q = skew(matrix, self.r)
                matrix = cayley_series(self._bounded(q), self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(-q)
            if self.psoft_mag_b:
                matrix = full(p.psoft_vector_b).unsqueeze(-1) * matrix
            return matrix * full(p.psoft_vector_a).unsqueeze(-2) if self.psoft_mag_a else matrix

    def _bounded(self, q: Tensor) -> Tensor:
        if self.cayley_neumann_eps is None:
            return q
        norm = q.square().sum((-2, -1), keepdim=True).clamp(min=self.cayley_neumann_eps**2).sqrt()
        return q * (self.cayley_neumann_eps / norm)

    def core(self, p: Adapter) -> Tensor:
        """What stands between B and A: ``diag(b) R diag(a) - I``."""
        matrix = self.matrix(p)
        return matrix - torch.eye(self.r, dtype=matrix.dtype, device=matrix.device)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return p.psoft_A, (full(p.psoft_B) @ self.core(p)).to(p.psoft_A.dtype)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None:
            return super().around(p, inner, x)
        dropped = F.dropout(x, self.dropout) if self.dropout and p.training else None
        return linear_plus_core(x, dropped, *inner.dense, p.psoft_A, self.core(p), p.psoft_B, self.scaling * p.strength)


def _identity(noise: float) -> Init:
    def start(tensor: Tensor, generator: torch.Generator) -> None:
        tensor.normal_(0, noise, generator=generator) if noise else tensor.zero_()
        tensor.diagonal(dim1=-2, dim2=-1).add_(1)

    return start
