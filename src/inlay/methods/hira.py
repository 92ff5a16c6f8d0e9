"""HiRA: ``W + W * (B A)``, an update that is high in rank by the Hadamard product (Huang et al. 2025, openreview TwJrTz9cRS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, normal, zeros
from ..core.site import Embedding, Site
from .spread import Spread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class HiraConfig(Spread):
    """Low-rank gains on the entries of the weight.

    Args:
        r: rank of the gains.
        hira_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with standard deviation ``1 / r``), or False
            (both normal, for tests).
        rank_pattern: other ranks by pattern of module names.

    Raises:
        ValueError: the rank is no positive integer, the dropout no share, or the start unknown.
    """

    peft_type: str | None = PeftType.HIRA
    r: int = field(default=32, metadata={"help": "Rank of the gains.", "positive": True})
    hira_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool | str | None = field(default=True, metadata={"help": "true, false or gaussian."})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other ranks by module pattern."})

    prefix: ClassVar[str] = "hira_"
    dropout_option: ClassVar[str] = "hira_dropout"
    paper: ClassVar[str] = "https://openreview.net/forum?id=TwJrTz9cRS"
    equation: ClassVar[str] = "W + W * (B A)"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r"}
    ours: ClassVar[frozenset[str]] = Method.ours
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"r": 3}, "dropout": {"r": 2, "hira_dropout": 0.3, "init_weights": "gaussian"}}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (isinstance(self.init_weights, bool) or self.init_weights in (None, "gaussian")):
            raise ValueError(f"Unknown init_weights={self.init_weights!r}. Known: True, False, gaussian.")

    def params(self, site: Site) -> dict[str, Param]:
        if isinstance(site, Embedding):
            # Of an embedding the other factor starts from zero: what is looked up is then dense.
            start_a = zeros if self.init_weights else normal()
            return {"hira_embedding_A": Param((self.r, "in"), start_a), "hira_embedding_B": Param(("out", self.r), normal())}
        starts = {True: kaiming_uniform, "gaussian": normal(1 / self.r)}
        start_a, start_b = starts.get(self.init_weights, normal()), zeros if self.init_weights else normal()  # type: ignore[arg-type]
        return {"hira_A": Param((self.r, "in"), start_a), "hira_B": Param(("out", self.r), start_b)}

    def values(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return (p.hira_embedding_A, p.hira_embedding_B) if isinstance(p.site, Embedding) else (p.hira_A, p.hira_B)

    def spread(self, p: Adapter, *values: Tensor, w: Tensor | None = None) -> Tensor:
        a, b = values
        w = p.site.read()[0] if w is None else w
        return full(w) * (full(b) @ full(a))

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w + p.strength * self.spread(p, *self.values(p), w=w), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        w, _ = inner.params()
        spread = partial(self.spread, p, w=w)
        if w.requires_grad:
            # Another adapter below is trained as well, through this one.
            return self.with_delta(p, inner, x, spread(*self.values(p)))
        return self.with_spread(p, inner, x, spread, partial(self._gather, w))

    def _gather(self, w: Tensor, g: Tensor, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        dm = (g.t() @ x).mul_(w)
        return b.t() @ dm, dm @ a.t()
