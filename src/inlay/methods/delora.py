"""DeLoRA: ``W + lambda / r * B diag(1 / |b_i||a_i|) A diag(|w_j|)``: LoRA with its length kept apart from its direction
(Bini et al. 2025, arXiv 2503.18225)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.method import Method, full, lengths, register
from ..core.param import Param, constant, kaiming_uniform, ones, zeros
from ..core.site import Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter

# Directions are not shorter than this.
SHORTEST = 1e-4


@register
@dataclass
class DeloraConfig(LowRank):
    """Low-rank updates whose length is bounded.

    Args:
        r: rank of the update.
        delora_lambda: what the bound of the update's length, which is trained, starts from.
        module_dropout: share of inputs that the update leaves out in training, in [0, 1).
        init_weights: start from the base; False starts from random factors, for tests.
        rank_pattern, lambda_pattern: other ranks and bounds by pattern of module names.

    Raises:
        ValueError: the rank is no positive integer, or the dropout no share.
    """

    peft_type: str | None = PeftType.DELORA
    r: int = field(default=8, metadata={"help": "Rank of the update.", "positive": True})
    delora_lambda: float = field(default=15, metadata={"help": "Initial bound of the update's length."})
    module_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other ranks by module pattern."})
    lambda_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "Other bounds by module pattern."})

    prefix: ClassVar[str] = "delora_"
    dropout_option: ClassVar[str] = "module_dropout"
    paper: ClassVar[str] = "2503.18225"
    equation: ClassVar[str] = "W + lambda / r B diag(1 / |b_i||a_i|) A diag(|w_j|)"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "lambda_pattern": "delora_lambda"}
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "delora_lambda": 2},
        "dropout": {"r": 2, "module_dropout": 0.3, "bias": "delora_only"},
    }

    def params(self, site: Site) -> dict[str, Param]:
        return {
            "delora_A": Param((self.r, "in"), kaiming_uniform),
            "delora_B": Param(("out", self.r), zeros if self.init_weights else kaiming_uniform),
            "delora_lambda": Param((1,), constant(self.delora_lambda)),
            "delora_w_norm": Param(("in",), ones, trainable=False),
        }

    def start(self, p: Adapter) -> None:
        # The lengths of the columns stay those of the base that the adapter began on; files hold them.
        p.delora_w_norm.copy_(lengths(full(p.site.read()[0].detach()).mT))

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = full(p.delora_A), full(p.delora_B)
        gain = p.delora_lambda / self.r / (lengths(a).clamp_min(SHORTEST) * lengths(b.mT).clamp_min(SHORTEST))
        return gain.unsqueeze(-1) * a * p.delora_w_norm.unsqueeze(-2), b
