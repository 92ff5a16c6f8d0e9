"""Trainable tokens: some rows of an embedding are retrained, all others stay.

As a matrix ``(dim, tokens)`` these are columns: ``W' = W`` with the columns ``token_indices`` replaced.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..core.config import PeftType
from ..core.method import Method, Param, register, zeros
from ..core.site import Embedding, Site

if TYPE_CHECKING:
    from ..core.inlaid import Adapter, Inner


@register
@dataclass
class TrainableTokensConfig(Method):
    """Retrain single tokens.

    Args:
        token_indices: the rows to retrain.
        init_weights: start from the base's rows; False starts from random ones.
        as_part: the rows stand beside another method (`trainable_token_indices`).
    """

    peft_type: str | None = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list, metadata={"help": "The tokens to retrain."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base's rows."})
    as_part: bool = field(default=False, repr=False, metadata={"help": "Internal: the rows stand beside another method."})

    prefix: ClassVar[str] = "trainable_tokens_"
    ours: ClassVar[frozenset[str]] = Method.ours | {"as_part", "layers_to_transform", "layers_pattern"}

    def refuses(self, site: Site) -> str | None:
        if not isinstance(site, Embedding):
            return "tokens are rows of an embedding"
        rows = site.size("in")
        wrong = [i for i in self.token_indices if not 0 <= i < rows]
        return f"token {wrong[0]} is not among the {rows} of the embedding" if wrong else None

    def params(self, site: Site) -> dict[str, Param]:
        shape = (len(self.token_indices), site.size("out"))
        return {"trainable_tokens_delta": Param(shape, zeros, batched=False)}

    def start(self, p: Adapter) -> None:
        reason = self.refuses(p.site)
        if reason:
            raise ValueError(f"trainable tokens of {p.path!r}: {reason}.")
        w, _ = p.site.read()
        if self.init_weights:
            p.trainable_tokens_delta.data.copy_(w.detach()[:, self.token_indices].mT)
        else:
            p.trainable_tokens_delta.data.normal_(generator=torch.Generator().manual_seed(self.seed or 0))

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.token_indices, device=like.device)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new = p.trainable_tokens_delta.to(w.dtype)
        return w.index_copy(1, self._index(w), new.mT), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        new = p.trainable_tokens_delta
        match = x.unsqueeze(-1) == self._index(x)
        y = inner(x)
        rows = inner.site._scaled(new[match.to(torch.uint8).argmax(-1)].to(y.dtype))
        return torch.where(match.any(-1, keepdim=True), rows, y)

    def around_transposed(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        """The output head that shares the embedding: the scores of the retrained tokens are replaced."""
        y = inner(x)
        new = p.trainable_tokens_delta.to(x.dtype)
        scores = torch.nn.functional.linear(x, new)
        _, bias = inner.params()
        index = self._index(x)
        if bias is not None:
            scores = scores + bias[index].to(scores.dtype)
        return y.index_copy(-1, index, scores.to(y.dtype))
