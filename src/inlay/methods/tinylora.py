"""TinyLoRA: ``W + B R A`` with A and B from the weight and R a trained sum of random matrices (Morris et al. 2026, arXiv 2602.04118).

A and B hold the weight's first singular directions, ``R = sum_i v_i P_i``, and layers may have the vector v in common: a whole model
can be trained by a dozen numbers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, generator_for, zeros
from ..core.site import Embedding, Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter


class Vectors(nn.Module):
    """The trained vectors by the names of their groups, the group of each layer, and its number among the layers."""

    def __init__(self, vectors: dict[str, Tensor], group: dict[str, str], number: dict[str, int]) -> None:
        super().__init__()
        self.tinylora_v = nn.ParameterDict({name: nn.Parameter(v) for name, v in vectors.items()})
        self.group, self.number = group, number


@register
@dataclass
class TinyLoraConfig(LowRank):
    """A few numbers between a weight's singular directions.

    Args:
        r: how many singular directions.
        u: length of the trained vectors.
        weight_tying: 0 gives each layer a vector of its own, 1 one vector to all; in between, neighbours share.
        projection_seed: seed of the random matrices; a layer's is this plus its number.
        save_projection: write the random matrices to the file; else they are drawn again from their seed when it is loaded.
        init_v_bound: bound of the vector's first values, for ``init_weights="uniform"``.
        tinylora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: True starts from the base, ``"uniform"`` from random numbers. False stands for ``"uniform"``: HF peft leaves
            the memory then as it finds it.

    Raises:
        ValueError: a count is no positive integer, the tying no number in [0, 1], or the dropout no share.
    """

    peft_type: str | None = PeftType.TINYLORA
    r: int = field(default=2, metadata={"help": "Number of singular directions.", "positive": True})
    u: int = field(default=64, metadata={"help": "Length of the trained vectors.", "positive": True})
    weight_tying: float = field(default=0.0, metadata={"help": "0: each layer has its vector; 1: all have one in common."})
    projection_seed: int = field(default=42, metadata={"help": "Seed of the random matrices."})
    save_projection: bool = field(default=True, metadata={"help": "Write the random matrices to the file."})
    init_v_bound: float = field(default=0.02, metadata={"help": "Bound of the vector's first values."})
    tinylora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool | str = field(default=True, metadata={"help": "uniform: start from noise.", "known": (True, False, "uniform")})

    prefix: ClassVar[str] = "tinylora_"
    dropout_option: ClassVar[str] = "tinylora_dropout"
    paper: ClassVar[str] = "2602.04118"
    count_formula: ClassVar[str] = "a share of a vector of u numbers"
    equation: ClassVar[str] = "W + B (sum_i v_i P_i) A, with A, B from the SVD of W, P_i random and v shared"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"u": 5},
        "tied": {"r": 3, "u": 2, "weight_tying": 1.0, "init_weights": "uniform"},
        "dropout": {"u": 3, "tinylora_dropout": 0.3, "save_projection": False},
    }
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.weight_tying <= 1:
            raise ValueError(f"`weight_tying` should be a number from 0 (none) to 1 (all), not {self.weight_tying!r}.")

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights is True else "the vectors start from random numbers"

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        count = len(sites)
        groups = max(1, round(count * (1 - self.weight_tying)))
        size = max(1, count // groups)
        number = {path: i for i, path in enumerate(sites)}
        group = {path: str(min(i // size, groups - 1)) for path, i in number.items()}
        vectors = {name: torch.zeros(self.u) for name in group.values()}
        if self.init_weights is not True:
            for name, v in vectors.items():
                v.uniform_(-self.init_v_bound, self.init_v_bound, generator=generator_for(self.seed, "tinylora_v", name))
        return Vectors(vectors, group, number)

    def _rank(self, site: Site) -> int:
        return min(self.r, site.size("out"), site.size("in"))

    def params(self, site: Site) -> dict[str, Param]:
        r = self._rank(site)
        sides = ("out", "in") if isinstance(site, Embedding) else ("in", "out")
        return {
            "tinylora_A": Param((r, sides[0]), zeros, trainable=False),
            "tinylora_B": Param((sides[1], r), zeros, trainable=False),
            "tinylora_P": Param((self.u, r, r), zeros, trainable=False, persistent=self.save_projection, optional=True),
        }

    def derive(self, p: Adapter) -> None:
        """The random matrices, which a file need not have."""
        shape, r = p.tinylora_P.shape, self._rank(p.site)
        generator = torch.Generator().manual_seed(self.projection_seed + p.shared.number[p.path])
        p.tinylora_P.copy_(torch.empty(shape).normal_(0, r**-0.5, generator=generator))

    def start(self, p: Adapter) -> None:
        r, (w, _) = self._rank(p.site), p.site.read()
        # Seen from the side from which the host keeps it, which decides about signs.
        w = full(w.detach())
        u, s, v = torch.linalg.svd(w.mT if isinstance(p.site, Embedding) else w, full_matrices=False)
        root = s[..., :r].sqrt()
        p.tinylora_A.copy_(root.unsqueeze(-1) * v[..., :r, :])
        p.tinylora_B.copy_(u[..., :r] * root.unsqueeze(-2))

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        v = p.shared.tinylora_v[p.shared.group[p.path]]
        middle = torch.tensordot(p.tinylora_P.to(v.dtype), v, dims=([-3], [0]))  # type: ignore[arg-type]
        a, b = p.tinylora_A.to(v.dtype), p.tinylora_B.to(v.dtype)
        return (b.mT, (middle @ a).mT) if isinstance(p.site, Embedding) else (a, b @ middle)
