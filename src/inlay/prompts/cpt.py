"""Context-aware prompt tuning: the tokens of a few examples are the prompt, and small steps away from them are learned
(arXiv 2410.17222)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import PeftType, TaskType
from ..core.method import register
from ..core.param import Param, zeros
from .inputs import IGNORED_LABEL, before_forward
from .method import PromptMethod, words_of
from .prompt import Prompt

# What a token is, by the remainder of its type by four.
LABEL, INPUT_FORMAT, INPUT, OUTPUT_FORMAT = range(4)


@register
@dataclass
class CPTConfig(PromptMethod):
    """Learn how far to go from the embeddings of given tokens. A forward pass may be told by ``input_type_mask`` what each of its
    tokens is; all are labels where it is not.

    Args:
        cpt_token_ids: the tokens of the prompt.
        cpt_mask: of the prompt; kept for files.
        cpt_tokens_type_mask: what each token is: by its remainder by four a label (0; and no part of any example if it is 0
            itself), the format of an input, an input, the format of an output.
        opt_weighted_loss_type: ``"decay"`` weighs examples less the earlier they are.
        opt_loss_decay_factor: by this much for each example.
        opt_projection_epsilon: how far an input's embedding may go.
        opt_projection_format_epsilon: how far a format's embedding may go.
        tokenizer_name_or_path: kept for files.

    Raises:
        ValueError: the task is another, or the masks are of other lengths.
    """

    peft_type: str | None = PeftType.CPT
    cpt_token_ids: list[int] | None = field(default=None, metadata={"help": "The tokens of the prompt."})
    cpt_mask: list[int] | None = field(default=None, metadata={"help": "The mask of the prompt."})
    cpt_tokens_type_mask: list[int] | None = field(default=None, metadata={"help": "What each token of the prompt is."})
    opt_weighted_loss_type: Literal["none", "decay"] | None = field(default="none", metadata={"help": "Weights of examples in the loss."})
    opt_loss_decay_factor: float | None = field(default=1.0, metadata={"help": "By how much an example weighs less than the next."})
    opt_projection_epsilon: float | None = field(default=0.1, metadata={"help": "How far an input's embedding may go."})
    opt_projection_format_epsilon: float | None = field(default=0.1, metadata={"help": "How far a format's embedding may go."})
    tokenizer_name_or_path: str | None = field(default=None, metadata={"help": "The tokenizer of the prompt."})

    paper: ClassVar[str] = "2410.17222"
    options: ClassVar[tuple[str, ...]] = ("input_type_mask",)
    own_loss: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.task_type != TaskType.CAUSAL_LM:
            raise ValueError(f"CPT is for task_type='CAUSAL_LM', not {self.task_type!r}.")
        self.num_layers = self.token_dim = self.num_attention_heads = None
        self.num_transformer_submodules = 1
        self.cpt_token_ids = [0] if self.cpt_token_ids is None else self.cpt_token_ids
        self.num_virtual_tokens = len(self.cpt_token_ids)
        for name in ("cpt_mask", "cpt_tokens_type_mask"):
            if getattr(self, name) is None:
                setattr(self, name, [1] * self.num_virtual_tokens)
            if len(getattr(self, name)) != self.num_virtual_tokens:
                raise ValueError(f"{name} is of {len(getattr(self, name))} tokens, and cpt_token_ids of {self.num_virtual_tokens}.")

    # -- the prompt --
    def params(self) -> dict[str, Param]:
        shape = (self.num_virtual_tokens or 0, self.token_dim or 0)
        return {
            "embedding.weight": Param(shape, trainable=False, key="prompt_embeddings"),
            "delta_embedding.weight": Param(shape, zeros, persistent=False),
        }

    def start(self, p: Prompt, words: nn.Module) -> None:
        weight: Tensor = words.weight  # type: ignore[assignment]
        p.get_buffer("embedding.weight").copy_(words(torch.tensor(self.cpt_token_ids, device=weight.device)))

    def loaded(self, p: Prompt) -> None:
        p.get_parameter("delta_embedding.weight").zero_()

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        delta, types = p.get_parameter("delta_embedding.weight"), self._types(p.get_parameter("delta_embedding.weight").device)
        with torch.no_grad():
            near = delta * (self._bounds(types) / delta.norm(dim=1).clamp(min=self._bounds(types)))[:, None]
        if torch.is_grad_enabled() and delta.requires_grad:
            with torch.no_grad():
                delta.copy_(near)  # the next step starts from inside the bound
        # Gradients pass the bound by; those of labels stop.
        moving = (types % 4 != LABEL)[:, None]
        return p.get_buffer("embedding.weight") + torch.where(moving, near + (delta - delta.detach()), near)

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.vectors(p, {})}

    def _types(self, device: torch.device) -> Tensor:
        return torch.tensor(self.cpt_tokens_type_mask, device=device)

    def _bounds(self, types: Tensor) -> Tensor:
        """How long each token's step may be: ``(tokens,)``."""
        root = ((self.token_dim or 0) / 2048) ** 0.5
        formats = (self.opt_projection_format_epsilon or 0.0) * root
        by_kind = torch.tensor([1e-10, formats, (self.opt_projection_epsilon or 0.0) * root, formats], device=types.device)
        return torch.where(types > 0, by_kind[types % 4], by_kind[LABEL])

    # -- the loss --
    def forward(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor, options: Mapping[str, Any]) -> Any:
        inputs = dict(inputs)
        labels = inputs.pop("labels", None)
        if inputs.get("fused_lm_head"):
            raise ValueError("CPT has a loss of its own, and this trainer makes its loss of logits; use that of transformers.")
        outputs = base(**before_forward(inputs, vectors, words_of(base), self.task_type))
        if labels is None:
            return outputs
        if vectors.shape[1] != self.num_virtual_tokens:
            raise ValueError("Prompts of CPT have losses of their own; train one at a time.")
        given = options.get("input_type_mask")
        labels, types = self._with_prompt(labels, torch.full_like(labels, 4) if given is None else given.to(labels))
        logits = outputs.logits if hasattr(outputs, "logits") else outputs[0]
        loss = self._loss(logits, labels.to(logits.device), types.to(logits.device))
        return type(outputs)(**{"loss": loss, **outputs}) if hasattr(outputs, "logits") else (loss, *outputs)

    def _with_prompt(self, labels: Tensor, types: Tensor) -> tuple[Tensor, Tensor]:
        """Labels and types of prompt and input: only what is a label is learned, and examples keep to themselves."""
        own = self._types(labels.device)
        # The kind is the remainder by four, so what is added has to be a multiple of it (HF adds the maximum as it is, and with the
        # default of one kind for the whole prompt no label is left).
        types = torch.where(types > 0, types + 4 * -(-own.max() // 4), types)
        ids = torch.tensor(self.cpt_token_ids, device=labels.device)
        labels = torch.cat((ids.expand(len(labels), -1), labels), 1)
        types = torch.cat((own.expand(len(types), -1), types), 1)
        return labels.masked_fill((types <= 0) | (types % 4 != LABEL), IGNORED_LABEL), types

    def _loss(self, logits: Tensor, labels: Tensor, types: Tensor) -> Tensor:
        # Shifted are the labels, and the logits stay where they are.
        labels, types = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL), F.pad(types[:, 1:], (0, 1))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORED_LABEL)
        losses = losses.view(labels.shape)
        if self.opt_weighted_loss_type == "decay":
            weights = torch.ones_like(losses)
            for row, kinds in zip(weights, types, strict=True):
                examples = kinds[(kinds > 0) & (kinds % 4 == LABEL)].unique()
                for age, example in enumerate(examples.flip(0)):
                    row[kinds == example] = (self.opt_loss_decay_factor or 0.0) ** age
            losses = losses * weights
        return losses[labels != IGNORED_LABEL].mean()
