"""Prefix tuning: the keys and values of tokens that no text has are learned and put before the input's, at every layer
(arXiv 2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ..core.config import PeftType
from ..core.method import register
from ..core.param import Param, normal, zeros
from .cached import CachedMethod
from .method import PromptMethod
from .networks import chain, linear
from .prompt import Prompt


@register
@dataclass
class PrefixTuningConfig(CachedMethod):
    """Learn keys and values of virtual tokens, themselves or by a network. A file has what the network makes; an adapter that is
    loaded from one and trained on learns keys and values themselves.

    Args:
        init_weights: ``"zero"`` starts from keys and values of zero.
        encoder_hidden_size: the network's width; that of the keys where None.
        prefix_projection: have a network of two layers make keys and values of embeddings.

    Raises:
        ValueError: the start is unknown.
    """

    peft_type: str | None = PeftType.PREFIX_TUNING
    init_weights: Literal["zero"] | None = field(default=None, metadata={"help": "'zero' starts from keys and values of zero."})
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "The width of the network."})
    prefix_projection: bool = field(default=False, metadata={"help": "Have a network make keys and values."})

    paper: ClassVar[str] = "2101.00190"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights not in (None, "zero"):
            raise ValueError(f"init_weights={self.init_weights!r} is unknown; leave it out or set 'zero'.")

    def prepare(self, base: nn.Module) -> None:
        super().prepare(base)
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.token_dim

    @property
    def _shape(self) -> tuple[int, int]:
        return self.num_virtual_tokens or 0, (self.num_layers or 0) * 2 * (self.token_dim or 0)

    def params(self) -> dict[str, Param]:
        zero = self.init_weights == "zero"
        tokens, width = self._shape
        if not self.prefix_projection:
            return {"embedding.weight": Param((tokens, width), zeros if zero else normal(), key="prompt_embeddings")}
        dim, hidden = self.token_dim or 0, self.encoder_hidden_size or 0
        network = linear("transform.0", dim, hidden) | linear("transform.2", hidden, width, zero)
        return {"embedding.weight": Param((tokens, dim), normal())} | network

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        x = p.get_parameter("embedding.weight")
        return chain(p, ("transform.0", "transform.2"), torch.tanh, x) if self.prefix_projection else x

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.vectors(p, {})}

    def settled(self) -> PromptMethod:
        return self.become(_Made) if self.prefix_projection else self


class _Made(PrefixTuningConfig):
    """Keys and values themselves, whatever made them."""

    def params(self) -> dict[str, Param]:
        return {"embedding.weight": Param(self._shape, normal(), key="prompt_embeddings")}

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        return p.get_parameter("embedding.weight")

    def settled(self) -> PromptMethod:
        return self
