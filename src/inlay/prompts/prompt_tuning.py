"""Prompt tuning: embeddings of tokens that no vocabulary has are learned and put before the input (arXiv 2104.08691)."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import PeftType, nearest
from ..core.method import register
from ..core.param import Param, generator_for, normal
from .method import PromptMethod
from .prompt import Prompt


class PromptTuningInit(enum.StrEnum):
    """What virtual tokens start from: the words of a text, words drawn from the vocabulary, or the normal distribution."""

    TEXT = "TEXT"
    SAMPLE_VOCAB = "SAMPLE_VOCAB"
    RANDOM = "RANDOM"


@register
@dataclass
class PromptTuningConfig(PromptMethod):
    """Learn the embeddings of virtual tokens. An encoder-decoder model has them before the encoder's input.

    Args:
        prompt_tuning_init: one of `PromptTuningInit`.
        prompt_tuning_init_text: the text to start from, cut or repeated to the number of virtual tokens.
        tokenizer_name_or_path: its tokenizer.
        tokenizer_kwargs: for ``AutoTokenizer.from_pretrained``. Code of a repository is run only if ``trust_remote_code`` is
            among them; it is never written to a file.

    Raises:
        ValueError: options contradict each other.
    """

    peft_type: str | None = PeftType.PROMPT_TUNING
    prompt_tuning_init: PromptTuningInit | str = field(default=PromptTuningInit.RANDOM, metadata={"help": "TEXT, SAMPLE_VOCAB or RANDOM."})
    prompt_tuning_init_text: str | None = field(default=None, metadata={"help": "The text to start from."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The tokenizer of the text to start from."})
    tokenizer_kwargs: dict[str, Any] | None = field(default=None, metadata={"help": "Arguments for loading the tokenizer."})

    paper: ClassVar[str] = "2104.08691"
    inits: ClassVar[type[enum.StrEnum]] = PromptTuningInit

    def __post_init__(self) -> None:
        super().__post_init__()
        known = [i.value for i in self.inits]
        chosen = self.prompt_tuning_init
        if chosen not in known:
            raise ValueError(f"prompt_tuning_init={chosen!r} is unknown.{nearest(str(chosen), known)} Known: {', '.join(known)}.")
        self.prompt_tuning_init = self.inits(chosen)  # type: ignore[assignment]
        if self.prompt_tuning_init == PromptTuningInit.TEXT:
            for name in ("tokenizer_name_or_path", "prompt_tuning_init_text"):
                if not getattr(self, name):
                    raise ValueError(f"prompt_tuning_init='TEXT' needs `{name}`.")
        elif self.tokenizer_kwargs:
            raise ValueError("`tokenizer_kwargs` are for prompt_tuning_init='TEXT'; no other start has a tokenizer.")

    def to_file(self) -> dict[str, Any]:
        plain = super().to_file()
        # A file must not be able to ask its reader to run code.
        if plain.get("tokenizer_kwargs"):
            plain["tokenizer_kwargs"].pop("trust_remote_code", None)
        return plain

    def params(self) -> dict[str, Param]:
        rows = (self.num_virtual_tokens or 0) * (self.num_transformer_submodules or 1)
        shape = (rows, self.token_dim or 0)
        return {"embedding.weight": Param(shape, normal(), key="prompt_embeddings")}

    def start(self, p: Prompt, words: nn.Module) -> None:
        # The configuration of a saved adapter is somebody else's; it is not followed to a tokenizer.
        if self.prompt_tuning_init == PromptTuningInit.RANDOM or self.inference_mode:
            return
        embedding: Tensor = p.get_parameter("embedding.weight")
        weight: Tensor = words.weight  # type: ignore[assignment]
        size = getattr(words, "num_embeddings", None) or weight.shape[0]
        drawn = self.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB
        tokens = _draw(size, len(embedding), self.seed) if drawn else self._text_tokens(size, len(embedding))
        embedding.copy_(words(tokens.to(weight.device)))

    def _text_tokens(self, vocabulary: int, count: int) -> Tensor:
        from transformers import AutoTokenizer

        options = {"trust_remote_code": False, **(self.tokenizer_kwargs or {})}
        tokenizer = AutoTokenizer.from_pretrained(self.tokenizer_name_or_path, **options)
        tokens: list[int] = tokenizer(self.prompt_tuning_init_text)["input_ids"]
        if not tokens or max(tokens) >= vocabulary:
            reason = f"makes token {max(tokens)} of" if tokens else "makes no token of"
            raise ValueError(
                f"The tokenizer {self.tokenizer_name_or_path!r} {reason} prompt_tuning_init_text, and the base knows {vocabulary};"
                " give the base's own tokenizer and a text."
            )
        return torch.tensor((tokens * -(-count // len(tokens)))[:count])

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        return p.get_parameter("embedding.weight")[: self.num_virtual_tokens]


def _draw(vocabulary: int, count: int, seed: int | None) -> Tensor:
    return torch.randint(0, vocabulary, (count,), generator=generator_for(seed, "words"))
