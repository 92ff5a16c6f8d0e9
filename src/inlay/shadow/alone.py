"""The shadow of an adapter (`methods.shadow`) as a model of its own."""

from __future__ import annotations

import copy as copying
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from .network import Shadow


def alone(bank: Shadow, copy: bool) -> nn.Module:
    """The shadow, its projection and its head: a model of transformers that predicts tokens, or classes.

    Args:
        copy: of all modules, with those that are the base's; else they are the same modules.

    Raises:
        ValueError: the shadow reads no tokens.
    """
    from .base import reads_embeddings, set_embeddings

    if not reads_embeddings(bank.shadow_backbone):
        raise ValueError("This shadow sees one hidden state at a time and reads no tokens, so it is no model without its base.")
    taken = copying.deepcopy if copy else (lambda module: module)
    backbone, projection = taken(bank.shadow_backbone), taken(bank.shadow_projection)
    classifies = hasattr(bank, "shadow_head")
    head = bank.shadow_head if classifies else bank.base.get_output_embeddings()  # type: ignore[operator]
    shared = bank.holder.get_input_embeddings() if bank.shares else None
    if copy and shared is not None:
        set_embeddings(backbone, copying.deepcopy(shared))
        shared = None
    return _class()(backbone, projection, None if head is None else taken(head), classifies, shared)


@cache
def _class() -> type[nn.Module]:
    from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
    from transformers.modeling_outputs import CausalLMOutputWithPast, SequenceClassifierOutput

    from .network import classified, last_token

    class DetachedShadowModel(PreTrainedModel, GenerationMixin):
        """A backbone, a projection and a head.

        Args:
            shared: embeddings that belong to another model; they are in no state dict of this one.
        """

        base_model_prefix = "backbone"
        _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

        def __init__(
            self, backbone: Any, projection: nn.Module, head: nn.Module | None, classifies: bool, shared: nn.Module | None
        ) -> None:
            super().__init__(backbone.config)
            self.backbone, self.shadow_hidden_projection, self.head = backbone, projection, head
            self.is_classification, self._shared = classifies, (shared,)
            self.generation_config = GenerationConfig.from_model_config(self.config)

        def can_generate(self) -> bool:  # type: ignore[override]
            return getattr(self, "head", None) is not None and not self.is_classification

        def get_input_embeddings(self) -> nn.Module:
            return self._shared[0] or self.backbone.get_input_embeddings()

        def get_output_embeddings(self) -> Any:
            return None if self.is_classification else self.head

        def forward(
            self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
        ) -> Any:
            kept = kwargs.pop("logits_to_keep", 0)
            if input_ids is not None and self._shared[0] is not None and kwargs.get("inputs_embeds") is None:
                kwargs["inputs_embeds"] = self._shared[0](input_ids).to(next(self.backbone.parameters()).dtype)
                input_ids = None
            out = self.backbone(input_ids=input_ids, attention_mask=attention_mask, **kwargs | {"return_dict": True})
            hidden = self.shadow_hidden_projection(out.last_hidden_state)
            if self.head is None:
                return SimpleNamespace(last_hidden_state=hidden, past_key_values=getattr(out, "past_key_values", None))
            loss, dtype = None, next(self.head.parameters()).dtype
            if self.is_classification:
                logits = self.head(last_token(hidden, attention_mask).to(dtype))
                loss = None if labels is None else classified(logits, labels)
                return SequenceClassifierOutput(loss=loss, logits=logits)
            logits = self.head(hidden[:, -kept:].to(dtype) if isinstance(kept, int) else hidden[:, kept].to(dtype))
            if labels is not None:
                loss = F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)
            return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=getattr(out, "past_key_values", None))

    return DetachedShadowModel
