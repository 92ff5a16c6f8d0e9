"""Trainable tokens: some rows of an embedding, or of the head that scores its tokens, are retrained; all others stay.

An embedding as a matrix is ``(dim, tokens)``, where these are columns; a head is ``(tokens, dim)``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import PeftType
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, register
from ..core.param import Param, zeros
from ..core.site import Embedding, Site
from ..core.targets import end_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class TrainableTokensConfig(Method):
    """Retrain single tokens.

    Args:
        target_modules: embeddings or output heads; where None, the base's input embedding.
        token_indices: the rows to retrain.
        init_weights: start from the base's rows; False starts from random ones.
        as_part: the rows stand beside another method (`trainable_token_indices`).
    """

    peft_type: str | None = PeftType.TRAINABLE_TOKENS
    token_indices: list[int] = field(default_factory=list, metadata={"help": "The tokens to retrain."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base's rows."})
    as_part: bool = field(default=False, repr=False, metadata={"help": "Internal: the rows stand beside another method.", "in_file": False})

    prefix: ClassVar[str] = "trainable_tokens_"
    equation: ClassVar[str] = "W with the columns of some tokens retrained"
    count_formula: ClassVar[str] = "len(token_indices)·dim"
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"token_indices": [0, 4, 7]}}
    ours: ClassVar[frozenset[str]] = Method.ours | {
        "as_part", "layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save",
    }  # fmt: skip

    @property
    def follows_ties(self) -> bool:
        # A token that is read and scored by one weight would otherwise become two.
        return True

    def prepare(self, base: nn.Module) -> None:
        if not self.token_indices and not self.as_part:
            raise ValueError("token_indices is empty: name the tokens to retrain, such as token_indices=[5, 6].")
        if self.target_modules is None:
            embedding = end_of(base, "get_input_embeddings")
            self.target_modules = {next((path for path, m in base.named_modules() if m is embedding), "embed_tokens")}

    def refuses(self, site: Site) -> str | None:
        if not acts_on_last_axis(site) and not isinstance(site, Embedding):
            return "tokens are rows of an embedding or of an output head"
        rows = site.size(_axes(site)[0])
        wrong = [i for i in self.token_indices if not 0 <= i < rows]
        return f"token {wrong[0]} is not among its {rows} rows" if wrong else None

    def params(self, site: Site) -> dict[str, Param]:
        return {"trainable_tokens_delta": Param((len(self.token_indices), _axes(site)[1]), zeros, batched=False)}

    def start(self, p: Adapter) -> None:
        reason = self.refuses(p.site)
        if reason:
            raise ValueError(f"trainable tokens of {p.path!r}: {reason}.")
        if self.init_weights:
            p.trainable_tokens_delta.data.copy_(_rows(p)[self.token_indices])
        else:
            p.trainable_tokens_delta.data.normal_(generator=torch.Generator().manual_seed(self.seed or 0))

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """By token; those that only the larger one has are as in the base."""
        mine, its = self.token_indices, small.method.token_indices  # type: ignore[attr-defined]
        missing = sorted({*its} - {*mine})
        if missing:
            raise ValueError(f"it retrains token {missing[0]}, which is not among those of the adapter that is there")
        rows = full(_rows(p))[mine].to(small.trainable_tokens_delta.dtype)
        rows[[mine.index(token) for token in its]] = small.trainable_tokens_delta.detach()
        return {"trainable_tokens_delta": rows}

    def _index(self, like: Tensor) -> Tensor:
        return torch.tensor(self.token_indices, device=like.device)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new = p.trainable_tokens_delta.to(w.dtype)
        if isinstance(p.site, Embedding):
            # In the layout of the host, which then has it without a copy.
            return w.mT.index_copy(0, self._index(w), new).mT, b
        return w.index_copy(0, self._index(w), new), b

    def apart(self, site: Site) -> tuple[str, ...]:
        # The tokens are counted along the other axis.
        return (_axes(site)[1],)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if not isinstance(site, Embedding):
            return self.around_transposed(p, inner, x)
        new = p.trainable_tokens_delta
        match = x.unsqueeze(-1) == self._index(x)
        y = inner(x)
        # As an embedding, whose gradient sums over the places of a token far faster than that of an index does.
        rows = site.scaled(F.embedding(match.to(torch.uint8).argmax(-1), new).to(y.dtype))
        return torch.where(match.any(-1, keepdim=True), rows, y)

    def around_transposed(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        """An output head, one that shares the embedding or one of its own: the scores of the retrained tokens are replaced."""
        y = inner(x)
        new = p.trainable_tokens_delta.to(x.dtype)
        scores = F.linear(x, new)
        index, bias = self._index(x), inner.bias()
        if bias is not None:
            scores = scores + bias[index].to(scores.dtype)
        return y.index_copy(-1, index, scores.to(y.dtype))


def _axes(site: Site) -> tuple[str, str]:
    """The axis that counts tokens, and the other one."""
    return ("in", "out") if isinstance(site, Embedding) else ("out", "in")


def _rows(p: Adapter) -> Tensor:
    """What the base has of each token, ``(tokens, dim)``."""
    w, _ = p.site.read()
    return w.detach().mT if isinstance(p.site, Embedding) else w.detach()
