"""DyLoRA: ``W + (alpha / b) B[:, :b] A[:b]`` with another rank ``b`` in each training step (Valipour et al. 2022, arXiv 2210.07558).

The first ranks learn to do without the last ones, so that what was trained once can be cut to any smaller rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.method import Param, generator_for, kaiming_uniform, register, zeros
from ..core.site import Site
from .lycoris import Drawn, rank

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
        init_weights: start as the base; False starts from noise, for tests.
        rank_pattern, alpha_pattern: other ranks and alphas by pattern of module names.

    Raises:
        ValueError: a rank is no positive integer, or the block does not divide it.
    """

    peft_type: str | None = "DYLORA"
    r: int = field(default=8, metadata={"help": "The largest rank."})
    alpha: float = field(default=8, metadata={"help": "The update of rank b is scaled by alpha / b."})
    unit: int = field(default=1, metadata={"help": "Size of the blocks in which ranks are added and left out."})
    last_only: bool = field(default=False, metadata={"help": "Train only the last block of those that take part."})
    eval_rank: int | None = field(default=None, metadata={"help": "The rank outside of training; all of them where it is not set."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})
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
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        rank("r", self.r)
        rank("unit", self.unit)
        if self.r % self.unit:
            raise ValueError(f"`unit`={self.unit} does not divide r={self.r}; choose a divisor.")
        if self.eval_rank is not None:
            rank("eval_rank", self.eval_rank)
            if self.eval_rank > self.r and not self.rank_pattern:
                raise ValueError(f"`eval_rank`={self.eval_rank} is above r={self.r}.")

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "it starts from noise"

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        """A number in [0, 1) that says to all layers alike how many of their blocks take part in the step."""
        bank = nn.Module()
        bank.register_buffer("share", torch.rand((), generator=generator_for(self.seed, *sites)), persistent=False)
        return bank

    def stepped(self, adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
        adapters[0].shared.share.uniform_()

    def params(self, site: Site) -> dict[str, Param]:
        start = zeros if self.init_weights else kaiming_uniform
        return {"dylora_A": Param((self.r, "in"), kaiming_uniform), "dylora_B": Param(("out", self.r), start)}

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        b = min(self.eval_rank or self.r, self.r)
        return p.dylora_A[..., :b, :] * (self.r / b), p.dylora_B[..., :b]

    def drawn(self, p: Adapter) -> tuple[Tensor, Tensor]:
        # Rows of zeros instead of a slice: the compiler then has one shape for all ranks.
        a, b, count = p.dylora_A, p.dylora_B, self.r // self.unit
        block = torch.arange(self.r, device=a.device) // self.unit
        last = (p.shared.share * count).floor().clamp(max=count - 1)
        if self.last_only:
            a = torch.where((block == last).unsqueeze(-1), a, a.detach())
            b = torch.where(block == last, b, b.detach())
        scale = (block <= last) * (count / (last + 1).to(a.dtype))
        return a * scale.unsqueeze(-1), b
