"""PVeRA: VeRA whose inner state is drawn from a learned normal distribution in training (2025, arXiv 2512.07703).

The first half of A and of d gives its mean, the second the logarithm of its variance. What stays after training is the mean, and
that is VeRA: ``W + diag(b) B diag(d) A`` with the first halves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import LowRank, add, meet
from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, constant, normal, ones, zeros
from ..core.site import Site
from ..kernels.drawn import linear_plus_drawn
from ..kernels.gained import linear_plus_gained
from ..kernels.lowrank import takes_the_formula
from .banks import corner, uniform_of_fan, widest

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

# The generators of adapters that have one of their own; they are on the CPU and no part of the model.
_generators: WeakKeyDictionary[nn.Module, torch.Generator] = WeakKeyDictionary()


@register
@dataclass
class PveraConfig(LowRank):
    """Vectors on a shared random projection, with a learned variance in training.

    Args:
        r: rank of the update.
        projection_prng_key: seed of the projection.
        save_projection: write the projection to the file; else it is drawn again from its seed when the file is loaded.
        pvera_dropout: share of inputs that the update leaves out in training, in [0, 1).
        d_initial: what ``d`` starts from.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start ``b`` from zero; False starts from ones, for tests.
        sample_at_inference: draw in evaluation as well. A merge is of the mean all the same.
        generator_seed: seed of what is drawn, for each layer anew; None draws from the global generator.

    Raises:
        ValueError: the rank is no positive integer, or the dropout no share.
    """

    peft_type: str | None = PeftType.PVERA
    r: int = field(default=256, metadata={"help": "Rank of the update.", "positive": True})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random projection."})
    save_projection: bool = field(default=True, metadata={"help": "Write the random projection to the file."})
    pvera_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    d_initial: float = field(default=0.1, metadata={"help": "Initial value of the inner vector."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})
    sample_at_inference: bool = field(default=False, metadata={"help": "Draw from the distribution in evaluation, too."})
    generator_seed: int | None = field(default=None, metadata={"help": "Seed of what is drawn from the distribution."})

    prefix: ClassVar[str] = "pvera_lambda_"
    dropout_option: ClassVar[str] = "pvera_dropout"
    paper: ClassVar[str] = "2512.07703"
    equation: ClassVar[str] = "W + diag(b) B diag(d) A, with B and A frozen and shared; noise on the middle in training"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4}, "dropout": {"r": 3, "pvera_dropout": 0.3, "projection_prng_key": 7, "save_projection": False}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"phi": ["q_proj", "v_proj"], "dinov2": ["query", "value"]}

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        """A and B for the widest of the layers; the others use a corner of them."""
        generator, bank = torch.Generator().manual_seed(self.projection_prng_key), nn.Module()
        out, inp = widest(sites.values())
        for name, shape in {"pvera_A": (2 * self.r, inp), "pvera_B": (out, self.r)}.items():
            bank.register_buffer(name, uniform_of_fan(shape, generator), persistent=self.save_projection)
        return bank

    def params(self, site: Site) -> dict[str, Param]:
        start_b, start_d = (zeros, constant(self.d_initial)) if self.init_weights else (ones, normal())
        return {"pvera_lambda_b": Param(("out",), start_b), "pvera_lambda_d": Param((2 * self.r,), start_d)}

    def _corners(self, p: Adapter, rank: int) -> tuple[Tensor, Tensor]:
        site, like = p.site, p.pvera_lambda_d
        a = corner(p.shared.pvera_A, site, rank, site.size("in"), like)
        return a, corner(p.shared.pvera_B, site, site.size("out"), self.r, like)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = self._corners(p, self.r)
        return p.pvera_lambda_d[..., : self.r].unsqueeze(-1) * a, p.pvera_lambda_b.unsqueeze(-1) * b

    def _noise(self, p: Adapter, like: Tensor) -> Tensor:
        # In full precision, so that the same numbers are drawn in half precision.
        dtype = torch.promote_types(like.dtype, torch.float32)
        if self.generator_seed is None:
            return torch.randn_like(like, dtype=dtype).to(like.dtype)
        if p not in _generators:
            _generators[p] = torch.Generator().manual_seed(self.generator_seed)
        return torch.randn(like.shape, dtype=dtype, generator=_generators[p]).to(like)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        drawn = p.training or self.sample_at_inference
        if not drawn and inner.dense is not None:
            mean = p.pvera_lambda_d[: self.r]
            return linear_plus_gained(x, *inner.dense, *self._corners(p, self.r), mean, p.pvera_lambda_b, p.strength, 0.0)
        if not drawn or site.size("channel") != site.size("out"):
            return super().around(p, inner, x)
        drops = self.dropout and p.training
        if inner.dense is not None and not drops and torch.is_grad_enabled() and not takes_the_formula(x, *inner.dense):
            gains = p.pvera_lambda_d, p.pvera_lambda_b
            return linear_plus_drawn(x, *inner.dense, *self._corners(p, 2 * self.r), *gains, partial(self._noise, p), p.strength)
        y = inner(x)
        if drops and x.is_floating_point():
            x = F.dropout(x, self.dropout)
        x, a, b, gain_d, gain_b = meet(x, *self._corners(p, 2 * self.r), p.pvera_lambda_d, p.pvera_lambda_b)
        mean, noisy = a.split(self.r, -2), gain_d.split(self.r, -1)
        h, deviation = (site.down(x, part) * site.rows(gain) for part, gain in zip(mean, noisy, strict=True))
        h = h + self._noise(p, h) * torch.exp(deviation / 2)
        return add(y, site.up(h, b) * site.rows(gain_b), p.strength)
