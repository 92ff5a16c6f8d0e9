"""Super-tuning: ``W + S`` with S sparse, at the largest (or smallest) entries of W; Supra adds LoRA's ``s B A`` (arXiv 2607.09287)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, normal, zeros
from ..core.site import Site
from ..kernels.spread import sampled
from .spread import Spread, entries, plus_entries

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class SupertuningConfig(Spread):
    """The entries of the weight that matter most, and a low rank beside them.

    Args:
        sparsity: share of entries that stay as they are, in [0, 1).
        select_top: train the largest entries; False trains the smallest.
        r: rank of an update beside the entries; None for none.
        lora_alpha: that update is scaled by ``lora_alpha / r``; ``2 * r`` where None.
        lora_dropout: share of inputs that it leaves out in training, in [0, 1).
        init_weights: start from the base; False starts from random numbers, for tests.
        save_precomputed_indices: write the entries' places to the file; else they are found again in the base when it is loaded,
            which has to be the same to the bit.

    Raises:
        ValueError: a share is out of its range, the rank no positive integer, or ``lora_alpha`` stands without a rank.
    """

    peft_type: str | None = PeftType.SUPERTUNING
    sparsity: float = field(default=0.99, metadata={"help": "Share of entries that stay as they are.", "share": True})
    select_top: bool = field(default=True, metadata={"help": "Train the largest entries, or the smallest."})
    r: int | None = field(default=None, metadata={"help": "Rank of an update beside the entries.", "positive": True})
    lora_alpha: float | None = field(default=None, metadata={"help": "That update is scaled by lora_alpha / r."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that that update leaves out in training.", "share": True})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})
    save_precomputed_indices: bool = field(default=True, metadata={"help": "Write the entries' places to the file."})

    prefix: ClassVar[str] = "supertuning_"
    paper: ClassVar[str] = "2607.09287"
    equation: ClassVar[str] = "W + S + s B A, S sparse where |W| is largest"
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_pattern", "layers_to_transform"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"sparsity": 0.8},
        "supra": {"sparsity": 0.7, "r": 2, "select_top": False, "save_precomputed_indices": False},
        "dropout": {"sparsity": 0.8, "r": 2, "lora_dropout": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.r is not None and self.lora_alpha is None:
            self.lora_alpha = 2 * self.r
        if self.r is None and self.lora_alpha is not None:
            raise ValueError("`lora_alpha` scales the update of rank `r`; set `r` too.")

    def _count(self, site: Site) -> int:
        return int(site.size("out") * site.size("in") * (1 - self.sparsity))

    def refuses(self, site: Site) -> str | None:
        if self._count(site) < 1:
            return f"sparsity={self.sparsity} leaves nothing of its {site.size('out') * site.size('in')} entries to train"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        count, kept = self._count(site), self.save_precomputed_indices
        declared = {
            "supertuning_values": Param((count,), zeros if self.init_weights else normal()),
            "supertuning_indices": Param((count,), zeros, trainable=False, persistent=kept, dtype=torch.int32),
        }
        if self.r is not None:
            start_b = zeros if self.init_weights else kaiming_uniform
            declared["supertuning_lora_A"] = Param((self.r, "in"), kaiming_uniform, "supertuning_lora_A.weight")
            declared["supertuning_lora_B"] = Param(("out", self.r), start_b, "supertuning_lora_B.weight")
        return declared

    def derive(self, p: Adapter) -> None:
        if not self.save_precomputed_indices:
            self._choose(p)

    def start(self, p: Adapter) -> None:
        if self.save_precomputed_indices:
            self._choose(p)

    def _choose(self, p: Adapter) -> None:
        size = p.site.read()[0].detach().abs().flatten(-2)
        p.supertuning_indices.copy_(size.topk(p.supertuning_indices.shape[-1], largest=self.select_top).indices)

    def values(self, p: Adapter) -> tuple[Tensor]:
        return (p.supertuning_values,)

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        return entries(p, values[0], p.supertuning_indices, p.site.size("in"))

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        w = plus_entries(p, w, p.supertuning_values, p.supertuning_indices)
        return w if self.r is None else w.add_(self._low_rank(p), alpha=p.strength)

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        return (sampled(g, x, p.supertuning_indices),)

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.r if self.r and self.lora_alpha else 0.0

    def delta(self, p: Adapter) -> Tensor:
        found = super().delta(p)
        return found if self.r is None else found + self._low_rank(p)

    def _low_rank(self, p: Adapter) -> Tensor:
        return self.scaling * (full(p.supertuning_lora_B) @ full(p.supertuning_lora_A))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        y = super().around(p, inner, x)
        if self.r is None:
            return y
        rate = self.lora_dropout if p.training and x.is_floating_point() else 0.0
        x, a, b = meet(F.dropout(x, rate) if rate else x, p.supertuning_lora_A, p.supertuning_lora_B)
        return add(y, inner.site.up(inner.site.down(x, a), b), self.scaling * p.strength)
