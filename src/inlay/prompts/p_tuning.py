"""P-tuning: a small network makes the embeddings of the virtual tokens (arXiv 2103.10385)."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import PeftType, nearest
from ..core.method import register
from ..core.param import Param, normal
from .method import PromptMethod
from .networks import chain, linear, lstm, run_lstm
from .prompt import Prompt


class PromptEncoderReparameterizationType(enum.StrEnum):
    """The network: three linear layers, or an LSTM over the tokens in both directions and two linear layers."""

    MLP = "MLP"
    LSTM = "LSTM"


@register
@dataclass
class PromptEncoderConfig(PromptMethod):
    """Learn a network that makes the embeddings of virtual tokens. A file has what the network makes; an adapter that is loaded
    from one and trained on learns the embeddings themselves.

    Args:
        encoder_reparameterization_type: one of `PromptEncoderReparameterizationType`.
        encoder_hidden_size: the network's width; the base's where None.
        encoder_num_layers: of the LSTM.
        encoder_dropout: between the layers of the LSTM, in training.

    Raises:
        ValueError: the network is unknown.
    """

    peft_type: str | None = PeftType.P_TUNING
    encoder_reparameterization_type: PromptEncoderReparameterizationType | str = field(
        default=PromptEncoderReparameterizationType.MLP, metadata={"help": "MLP or LSTM."}
    )
    encoder_hidden_size: int | None = field(default=None, metadata={"help": "The width of the network."})
    encoder_num_layers: int = field(default=2, metadata={"help": "The layers of the LSTM."})
    encoder_dropout: float = field(default=0.0, metadata={"help": "Dropout between the layers of the LSTM."})

    paper: ClassVar[str] = "2103.10385"

    def __post_init__(self) -> None:
        super().__post_init__()
        known, given = [t.value for t in PromptEncoderReparameterizationType], self.encoder_reparameterization_type
        if given not in known:
            raise ValueError(
                f"encoder_reparameterization_type={given!r} is unknown.{nearest(str(given), known)} Known: {', '.join(known)}."
            )
        self.encoder_reparameterization_type = PromptEncoderReparameterizationType(given)
        if not self._recurrent and self.encoder_num_layers != 2:
            warnings.warn("`encoder_num_layers` is of the LSTM; the MLP has three linear layers.")

    @property
    def _recurrent(self) -> bool:
        return self.encoder_reparameterization_type == PromptEncoderReparameterizationType.LSTM

    def prepare(self, base: nn.Module) -> None:
        super().prepare(base)
        if self.encoder_hidden_size is None:
            self.encoder_hidden_size = self.token_dim

    def params(self) -> dict[str, Param]:
        dim, hidden = self.token_dim or 0, self.encoder_hidden_size or 0
        tokens = (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)
        embedding = {"embedding.weight": Param((tokens, dim), normal())}
        if self._recurrent:
            head = linear("mlp_head.0", 2 * hidden, 2 * hidden) | linear("mlp_head.2", 2 * hidden, dim)
            return embedding | lstm("lstm_head", dim, hidden, self.encoder_num_layers) | head
        return embedding | linear("mlp_head.0", dim, hidden) | linear("mlp_head.2", hidden, hidden) | linear("mlp_head.4", hidden, dim)

    def made(self, p: Prompt, dropping: bool) -> Tensor:
        """What the network makes: ``(tokens, dim)``."""
        x = p.get_parameter("embedding.weight")
        if not self._recurrent:
            return chain(p, ("mlp_head.0", "mlp_head.2", "mlp_head.4"), F.relu, x)
        x = run_lstm(p, "lstm_head", x, self.encoder_num_layers, self.encoder_dropout if dropping else 0.0)
        return chain(p, ("mlp_head.0", "mlp_head.2"), F.relu, x)

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        return self.made(p, p.training)[: self.num_virtual_tokens]

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.made(p, dropping=False)}

    def settled(self) -> PromptMethod:
        return self.become(_Made)


class _Made(PromptEncoderConfig):
    """The embeddings themselves."""

    def params(self) -> dict[str, Param]:
        return {"embedding.weight": Param(super().params()["embedding.weight"].axes, normal(), key="prompt_embeddings")}

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        return p.get_parameter("embedding.weight")[: self.num_virtual_tokens]

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        return PromptMethod.in_file(self, p)

    def settled(self) -> PromptMethod:
        return self
