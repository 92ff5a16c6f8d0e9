"""VeLoRA: LoRA whose backward pass knows its inputs by one component a group (Miles et al. 2024, arXiv 2405.17991)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..kernels.compressed import in_groups, linear_compressed
from .lora import LoraConfig, is_linear

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

STARTS = ("batch_average", "batch_average_once", "random")


@dataclass
class VeloraConfig:
    """How inputs are kept for the backward pass.

    Args:
        num_groups: how many numbers are kept of an input.
        scale: the factor in front of the gradient of A.
        init_type: the direction of a group: the mean of each batch's groups, that of the first batch, or a random one.

    Raises:
        ValueError: a number is not positive, or there is no such start.
    """

    num_groups: int = field(default=64, metadata={"help": "How many numbers are kept of an input."})
    scale: float = field(default=1.0, metadata={"help": "The factor in front of the gradient of A."})
    init_type: str = field(default="batch_average", metadata={"help": "batch_average, batch_average_once or random."})

    def __post_init__(self) -> None:
        for name in ("num_groups", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, not {getattr(self, name)!r}.")
        if self.init_type not in STARTS:
            raise ValueError(f"init_type={self.init_type!r} is not one of {', '.join(STARTS)}.")


class Velora(LoraConfig):
    """LoRA with a ``velora_config``. Only linear layers keep compressed inputs; others are as in LoRA."""

    def params(self, site: Site) -> dict[str, Param]:
        size = -(-site.size("in") // self.velora_config.num_groups)
        start = normal() if self.velora_config.init_type == "random" else zeros
        return super().params(site) | {"lora_velora_embed": Param((size,), start, trainable=False, batched=False)}

    def start(self, p: Adapter) -> None:
        super().start(p)
        if self.velora_config.init_type == "random":
            p.lora_velora_embed.copy_(F.normalize(p.lora_velora_embed, dim=0))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not (p.training and torch.is_grad_enabled() and is_linear(inner.site)):
            return super().around(p, inner, x)
        y, extra, options = inner(x), self.delta_bias(p), self.velora_config
        x, a, b = meet(F.dropout(x, self.dropout), *self.factors(p))
        u = linear_compressed(x, a, self._direction(p, x), options.num_groups, options.scale)
        return add(y, F.linear(u, b, None if extra is None else extra.to(b.dtype) / self.scaling), self.scaling * p.strength)

    @torch.no_grad()
    def _direction(self, p: Adapter, x: Tensor) -> Tensor:
        """The direction of a group for this batch; kept in the adapter."""
        kept, options = p.lora_velora_embed, self.velora_config
        if options.init_type != "random":
            mean = in_groups(x.flatten(0, -2).mean(0), options.num_groups).mean(0).to(kept.dtype)
            fresh = F.normalize(torch.where(mean.any(), mean, torch.ones_like(mean)), dim=0)
            kept.copy_(fresh if options.init_type == "batch_average" else torch.where(kept.any(), kept, fresh))
        # The next batch writes into it before this one's backward pass, where gradients are accumulated over several.
        return kept.clone()
