"""DEFT: ``(I - Q P') W + s Q R``: a subspace of what the layer gives is taken out and filled anew; PaRa only takes it out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.families import in_full_precision
from ..core.method import Method, full, register
from ..core.param import Param, generator_for, normal
from ..core.site import Site
from .conditioned import Conditioned, plus_low_rank

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class DeftConfig(Conditioned):
    """Decompositional fine-tuning.

    Args:
        r: rank of what is taken out; at most the layer's number of outputs.
        decomposition_method: ``"relu"`` takes out ``P relu(P)' W``, ``"qr"`` the projection on the columns of P.
        init_scale: what R starts from is scaled by it, where ``init_weights`` is False.
        alpha: what is put in is scaled by ``alpha / r``; None leaves it as it is.
        para: take out only; there is no R.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        deft_dropout: share of inputs that what is put in leaves out in training, in [0, 1).
        init_weights: put in what was taken out, so that the start is the base; False starts R from random numbers.

    Raises:
        ValueError: the rank is no positive integer, the dropout no share, or the decomposition unknown.
    """

    peft_type: str | None = PeftType.DEFT
    r: int = field(default=8, metadata={"help": "Rank of what is taken out.", "positive": True})
    decomposition_method: str = field(default="relu", metadata={"help": "relu or qr.", "known": ("relu", "qr")})
    init_scale: float = field(default=1.0, metadata={"help": "Scale of R's random start."})
    alpha: int | None = field(default=None, metadata={"help": "What is put in is scaled by alpha / r."})
    para: bool = field(default=False, metadata={"help": "Take out only."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    deft_dropout: float = field(default=0.0, metadata={"help": "Share of inputs what is put in leaves out in training.", "share": True})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "deft_"
    paper: ClassVar[str] = "2509.22793"
    equation: ClassVar[str] = "(I - Q P') W + s Q R"
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "alpha": 2},
        "qr": {"r": 2, "decomposition_method": "qr"},
        "para": {"r": 2, "para": True},
        "random": {"r": 2, "init_weights": False, "init_scale": 9.0},
        "dropout": {"r": 2, "deft_dropout": 0.3},
    }

    @property
    def never_identity(self) -> str:
        if self.para:
            return "what is taken out is not put in again (para)"
        return "" if self.init_weights else "what is put in starts from random numbers (init_weights=False)"

    def _rank(self, site: Site) -> int:
        return min(self.r, site.size("out"))

    def _scaling(self, p: Adapter) -> float:
        return self.alpha / self._rank(p.site) if self.alpha else 1.0

    def params(self, site: Site) -> dict[str, Param]:
        r = self._rank(site)
        declared = {"deft_P": Param(("out", r), normal(0.02))}
        if not self.para:
            declared["deft_R"] = Param((r, "in"), normal(0.02 * self.init_scale))
        return declared

    def start(self, p: Adapter) -> None:
        if not self.para and self.init_weights:
            taken, _ = self._taken(p, full(p.site.read()[0]))
            p.deft_R.data.copy_(taken / self._scaling(p))

    def _taken(self, p: Adapter, w: Tensor) -> tuple[Tensor, Tensor]:
        """``P' W`` and ``Q``: what is taken out is their product."""
        with in_full_precision(p):
            q = full(p.deft_P)
            if self.decomposition_method == "qr":
                q, _ = torch.linalg.qr(q)
                return q.mT @ w.to(q.dtype), q
            return q.relu().mT @ w.to(q.dtype), q

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Zeros take nothing out; of orthonormal columns there is none that does not, and what it takes out is put in again."""
        r, qr = small.deft_P.shape[-1], self.decomposition_method == "qr"
        grows = r < p.deft_P.shape[-1]
        if qr and self.para and grows:
            raise ValueError("one more direction of decomposition_method='qr' takes something out, and with `para` nothing is put in")
        values = super().padded(p, small)
        if not self.para:
            values["deft_R"] = values["deft_R"] * (small.method._scaling(small) / self._scaling(p))  # type: ignore[attr-defined]
        if qr and grows:
            # In the space of what the columns so far leave over.
            q, _ = torch.linalg.qr(full(small.deft_P.detach()))
            drawn = torch.empty_like(values["deft_P"][..., r:], device="cpu").normal_(generator=generator_for(self.seed, p.path, "padded"))
            drawn = drawn.to(q)
            rest, _ = torch.linalg.qr(drawn - q @ (q.mT @ drawn))
            values["deft_P"][..., r:] = rest
            q, _ = torch.linalg.qr(full(values["deft_P"]))
            w, _ = p.site.read()
            values["deft_R"][..., r:, :] = q[..., r:].mT @ full(w.detach()).to(q) / self._scaling(p)
        return values

    def factors(self, p: Adapter, w: Tensor) -> tuple[Tensor, Tensor]:
        taken, q = self._taken(p, w)
        return (-taken if self.para else self._scaling(p) * full(p.deft_R) - taken), q

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if self.para or not (self.deft_dropout and p.training and x.is_floating_point()):
            return super().around(p, inner, x)
        # Dropout is for what is put in alone.
        taken, q = self._taken(p, full(inner.params()[0]))
        y = plus_low_rank(inner, x, -taken, q)
        dropped, r, q = meet(F.dropout(x, self.deft_dropout), p.deft_R, q)
        return add(y, inner.site.up(inner.site.down(dropped, r), q), self._scaling(p))
