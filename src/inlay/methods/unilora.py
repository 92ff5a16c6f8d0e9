"""Uni-LoRA: all factors of all layers are entries of one trained vector (Li et al. 2025, arXiv 2506.00799).

Each entry of each factor is one of ``theta``, chosen at random, over the root of how often that one was chosen: an isometric
projection of the space of all factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, generator_for, zeros
from ..core.site import Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter


class Theta(nn.Module):
    """The trained vector, and which of its entries the layers' factors are.

    Attributes:
        chosen: by the layer's name, for A and B.
        scales: by which each entry is multiplied wherever it stands.
    """

    def __init__(self, theta: Tensor, chosen: dict[str, tuple[Tensor, Tensor]], scales: Tensor) -> None:
        super().__init__()
        self.unilora_theta_d = nn.Parameter(theta)
        self.chosen, self.scales = chosen, scales


@register
@dataclass
class UniLoraConfig(LowRank):
    """One trained vector for the factors of all layers.

    Args:
        r: rank of the update.
        proj_seed: seed of the choice of entries.
        theta_d_length: length of the trained vector.
        unilora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_theta_d_bound: the vector starts uniform within this bound.
        init_weights: False starts the vector from normal numbers, for tests.
        save_indices: write the choice to the file; else it is made again from the seed and the layers' order.

    Raises:
        ValueError: rank or length is no positive integer, the bound is not positive, or the dropout is no share.
    """

    peft_type: str | None = PeftType.UNILORA
    r: int = field(default=4, metadata={"help": "Rank of the update.", "positive": True})
    proj_seed: int = field(default=42, metadata={"help": "Seed of the choice of entries."})
    theta_d_length: int = field(default=256, metadata={"help": "Length of the trained vector.", "positive": True})
    unilora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_theta_d_bound: float = field(default=0.02, metadata={"help": "Bound of the vector's first values."})
    init_weights: bool = field(default=True, metadata={"help": "Start uniform within the bound; false: from normal numbers."})
    save_indices: bool = field(default=False, metadata={"help": "Write the choice of entries to the file."})

    prefix: ClassVar[str] = "unilora_"
    dropout_option: ClassVar[str] = "unilora_dropout"
    paper: ClassVar[str] = "2506.00799"
    count_formula: ClassVar[str] = "a share of a vector of theta_d_length numbers"
    equation: ClassVar[str] = "W + B A, with (A, B) of all layers = P theta, P a fixed random projection"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "theta_d_length": 11}, "dropout": {"r": 2, "theta_d_length": 7, "unilora_dropout": 0.3, "save_indices": True}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_theta_d_bound <= 0:
            raise ValueError(f"`init_theta_d_bound` should be positive, not {self.init_theta_d_bound!r}.")

    @property
    def never_identity(self) -> str:
        return "both factors are entries of a random vector"

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        shapes = {path: [q.shape(site) for q in self._choices(self.at(path), site)] for path, site in sites.items()}
        entries = _balanced(sum(prod(s) for pair in shapes.values() for s in pair), self.theta_d_length, self.proj_seed)
        counts = torch.bincount(entries, minlength=self.theta_d_length)
        parts = iter(entries.split([prod(s) for pair in shapes.values() for s in pair]))
        chosen = {path: (next(parts).view(a), next(parts).view(b)) for path, (a, b) in shapes.items()}
        generator = generator_for(self.seed, "unilora_theta_d")
        theta, bound = torch.empty(self.theta_d_length), self.init_theta_d_bound
        theta = theta.uniform_(-bound, bound, generator=generator) if self.init_weights else theta.normal_(generator=generator)
        return Theta(theta, chosen, counts.clamp_min(1).float().rsqrt())

    @staticmethod
    def _choices(method: Method, site: Site) -> tuple[Param, Param]:
        assert isinstance(method, UniLoraConfig)
        fixed = {"trainable": False, "persistent": method.save_indices, "dtype": torch.int64, "optional": True}
        return Param((method.r, "in"), zeros, **fixed), Param(("out", method.r), zeros, **fixed)

    def params(self, site: Site) -> dict[str, Param]:
        a, b = self._choices(self, site)
        scales = (Param(q.axes, zeros, trainable=False, persistent=self.save_indices, optional=True) for q in (a, b))
        return dict(zip(("unilora_indices_A", "unilora_indices_B", "unilora_scales_A", "unilora_scales_B"), (a, b, *scales), strict=True))

    def derive(self, p: Adapter) -> None:
        for side, chosen in zip("AB", p.shared.chosen[p.path], strict=True):
            getattr(p, f"unilora_indices_{side}").copy_(chosen)
            getattr(p, f"unilora_scales_{side}").copy_(p.shared.scales[chosen])

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = (
            p.shared.unilora_theta_d.index_select(0, chosen.flatten()).view(chosen.shape) * scales
            for chosen, scales in ((p.unilora_indices_A, p.unilora_scales_A), (p.unilora_indices_B, p.unilora_scales_B))
        )
        return a, b


def _balanced(count: int, length: int, seed: int) -> Tensor:
    """Each of ``length`` entries as often as any other, but for a remainder, in random order; the order that HF peft draws."""
    import numpy as np

    generator = np.random.default_rng(seed)
    entries = np.repeat(np.arange(length), count // length)
    if count % length:
        entries = np.concatenate((entries, generator.choice(length, size=count % length, replace=False)))
    generator.shuffle(entries)
    return torch.as_tensor(entries, dtype=torch.int64)
