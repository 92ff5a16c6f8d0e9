"""DyLoRA: ``W + (alpha / b) B[:, :b] A[:b]`` with another rank ``b`` in each training step (Valipour et al. 2022, arXiv 2210.07558).

The first ranks learn to do without the last ones, so that what was trained once can be cut to any smaller rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import register
from ..core.param import Param, generator_for
from ..core.site import Site
from ..initializers.plain import gaussian, uniform
from .lycoris import Drawn

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@register
@dataclass
class DyLoraConfig(Drawn):
    """LoRA for many ranks at once.

    Args:
        r: the largest rank.
        alpha: the update of rank ``b`` is scaled by ``alpha / b``.
        unit: ranks are added and left out in blocks of this size, which divides ``r``.
        last_only: train only the last block of those that take part in a step, so that smaller ranks keep what they have learned.
        eval_rank: the rank outside of training, and of a merge; None stands for ``r``. It may be changed at any time.
        init_weights: True (start as the base), False (from noise, for tests), or a start from the weight or from data, as in
            `LoraConfig`; at each rank the function starts as the base.
        rank_pattern, alpha_pattern: other ranks and alphas by pattern of module names.

    Raises:
        ValueError: a rank is no positive integer, or the block does not divide it.
    """

    peft_type: str | None = "DYLORA"
    r: int = field(default=8, metadata={"help": "The largest rank.", "positive": True})
    alpha: float = field(default=8, metadata={"help": "The update of rank b is scaled by alpha / b."})
    unit: int = field(default=1, metadata={"help": "Size of the blocks in which ranks are added and left out.", "positive": True})
    last_only: bool = field(default=False, metadata={"help": "Train only the last block of those that take part."})
    eval_rank: int | None = field(default=None, metadata={"help": "The rank outside of training; r where None.", "positive": True})
    init_weights: bool | str = field(default=True, metadata={"help": "How the factors start: true, false, pissa, olora, eva, ..."})
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other ranks by module pattern."})
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata={"help": "Other alphas by module pattern."})

    prefix: ClassVar[str] = "dylora_"
    paper: ClassVar[str] = "2210.07558"
    equation: ClassVar[str] = "W + (alpha / b) B[:, :b] A[:b]"
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "alpha": 6},
        "blocks": {"r": 6, "unit": 2, "last_only": True, "init_weights": False},
        "cut": {"r": 4, "use_dora": True},
        "dropout": {"r": 4, "input_dropout": 0.3},
        "pissa": {"r": 4, "alpha": 6, "init_weights": "pissa", "last_only": True},
        "pissa-cut": {"r": 4, "init_weights": "pissa", "eval_rank": 3, "use_dora": True},
        "mica": {"r": 4, "init_weights": "mica"},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r % self.unit:
            raise ValueError(f"`unit`={self.unit} does not divide r={self.r}; choose a divisor.")
        if self.eval_rank is not None and self.eval_rank > self.r and not self.rank_pattern:
            raise ValueError(f"`eval_rank`={self.eval_rank} is above r={self.r}.")
        self.check_init()

    def unfit(self, start: str) -> str:
        if start == "orthogonal":
            return "the product of its factors is zero with all ranks only, and ranks are left out"
        if start == "loftq":
            return "what is left of the ranks is scaled by r / b, so factors that make up for a loss with all ranks overdo it with fewer"
        return super().unfit(start)

    @property
    def ranks_may_move(self) -> bool:
        return self.unit == 1

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        """A number in [0, 1) that says to all layers alike how many of their blocks take part in the step."""
        bank = super().shared(sites) or nn.Module()
        bank.register_buffer("share", torch.rand((), generator=generator_for(self.seed, *sites)), persistent=False)
        return bank

    def stepped(self, adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
        adapters[0].shared.share.uniform_()

    def names(self, site: Site) -> tuple[str, str]:
        return "dylora_A", "dylora_B"

    def params(self, site: Site) -> dict[str, Param]:
        a, b = gaussian(self.r) if self.init_weights == "gaussian" else uniform(bool(self.init_weights))
        return {"dylora_A": Param((self.r, "in"), a), "dylora_B": Param(("out", self.r), b)}

    def cut(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        left = min(self.eval_rank or self.r, self.r)
        if left == self.r:
            return a, b
        a, b = (t.unflatten(axis, (-1, self.r)) for t, axis in ((a, -2), (b, -1)))
        return a[..., :left, :].flatten(-3, -2) * (self.r / left), b[..., :left].flatten(-2)

    def tensors(self, p: Adapter) -> tuple[Tensor, ...]:
        a, b = p.dylora_A, p.dylora_B
        if not (self.last_only and p.training):
            return a, b
        block, last = self._blocks(p)
        return torch.where((block == last).unsqueeze(-1), a, a.detach()), torch.where(block == last, b, b.detach())

    def shares(self, p: Adapter) -> Tensor:
        # Zeros instead of a slice: the compiler then has one shape for all ranks.
        block, last = self._blocks(p)
        return (block <= last) * (self.r // self.unit / (last + 1).to(p.dylora_A.dtype))

    def _blocks(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """The block of each rank, and the last one that takes part."""
        count = self.r // self.unit
        return torch.arange(self.r, device=p.dylora_A.device) // self.unit, (p.shared.share * count).floor().clamp(max=count - 1)
