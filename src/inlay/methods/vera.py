"""VeRA: ``W + diag(b) B diag(d) A`` with one frozen random pair A, B for all layers (Kopiczko et al. 2023, arXiv 2310.11454)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import LowRank, add, meet
from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, constant, normal, ones, zeros
from ..core.site import Site
from ..kernels.gained import linear_plus_gained
from .banks import corner, uniform_of_fan, widest

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class VeraConfig(LowRank):
    """Vectors on a shared random projection.

    Args:
        r: rank of the update; more than LoRA's, since only vectors are trained.
        projection_prng_key: seed of the projection.
        save_projection: write the projection to the file; else it is drawn again from its seed when the file is loaded.
        vera_dropout: share of inputs that the update leaves out in training, in [0, 1).
        d_initial: what ``d`` starts from.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start ``b`` from zero; False starts from ones, for tests.

    Raises:
        ValueError: the rank is no positive integer, or the dropout no share.
    """

    peft_type: str | None = PeftType.VERA
    r: int = field(default=256, metadata={"help": "Rank of the update.", "positive": True})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random projection."})
    save_projection: bool = field(default=True, metadata={"help": "Write the random projection to the file."})
    vera_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    d_initial: float = field(default=0.1, metadata={"help": "Initial value of the inner vector."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "vera_lambda_"
    dropout_option: ClassVar[str] = "vera_dropout"
    paper: ClassVar[str] = "2310.11454"
    equation: ClassVar[str] = "W + diag(b) B diag(d) A, with B and A frozen and shared"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4}, "dropout": {"r": 3, "vera_dropout": 0.3, "projection_prng_key": 7, "save_projection": False}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"phi": ["q_proj", "v_proj"]}

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        """A and B for the widest of the layers; the others use a corner of them."""
        generator, bank = torch.Generator().manual_seed(self.projection_prng_key), nn.Module()
        out, inp = widest(sites.values())
        for name, shape in {"vera_A": (self.r, inp), "vera_B": (out, self.r)}.items():
            bank.register_buffer(name, uniform_of_fan(shape, generator), persistent=self.save_projection)
        return bank

    def params(self, site: Site) -> dict[str, Param]:
        start_b, start_d = (zeros, constant(self.d_initial)) if self.init_weights else (ones, normal())
        return {"vera_lambda_b": Param(("out",), start_b), "vera_lambda_d": Param((self.r,), start_d)}

    def _corners(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """What this layer uses of A and B, one copy for each matrix of a batch."""
        site, like = p.site, p.vera_lambda_d
        a = corner(p.shared.vera_A, site, self.r, site.size("in"), like)
        return a, corner(p.shared.vera_B, site, site.size("out"), self.r, like)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = self._corners(p)
        return p.vera_lambda_d.unsqueeze(-1) * a, p.vera_lambda_b.unsqueeze(-1) * b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if site.size("channel") != site.size("out"):
            return super().around(p, inner, x)
        if inner.dense is not None:
            rate = self.dropout if p.training else 0.0
            return linear_plus_gained(x, *inner.dense, *self._corners(p), p.vera_lambda_d, p.vera_lambda_b, p.strength, rate)
        # Gains on what passes through the frozen pair need no gradient of the pair's size, and no input kept for it.
        y = inner(x)
        if self.dropout and p.training and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        x, a, b, gain_d, gain_b = meet(x, *self._corners(p), p.vera_lambda_d, p.vera_lambda_b)
        h = site.up(site.down(x, a) * site.rows(gain_d), b) * site.rows(gain_b)
        return add(y, h, p.strength)
