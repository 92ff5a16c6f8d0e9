"""Cartridges: keys and values that stand for a long text, started from the text's own and learned (arXiv 2506.06266)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.config import PeftConfig, PeftType
from ..core.method import register
from ..core.param import Param, normal
from ..formats.slots import Slot
from .cached import CachedMethod
from .prefix_tuning import PrefixTuningConfig
from .prompt import Prompt

if TYPE_CHECKING:
    from ..model import PeftModel


@register
@dataclass
class CartridgeConfig(CachedMethod):
    """Learn keys and values of virtual tokens. `initialize_kv_prefix_from_text` starts them from a text.

    Args:
        num_frozen_tokens: the first tokens, which draw attention whatever they hold, stay as they start.

    Raises:
        ValueError: more tokens are frozen than there are.
    """

    peft_type: str | None = PeftType.CARTRIDGE
    num_frozen_tokens: int = field(default=1, metadata={"help": "How many of the first tokens stay as they start."})

    paper: ClassVar[str] = "2506.06266"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_frozen_tokens < 0 or (self.num_virtual_tokens is not None and self.num_frozen_tokens > self.num_virtual_tokens):
            raise ValueError(
                f"num_frozen_tokens={self.num_frozen_tokens} of num_virtual_tokens={self.num_virtual_tokens}: freeze none or some of them."
            )

    def params(self) -> dict[str, Param]:
        width, frozen = (self.num_layers or 0) * 2 * (self.token_dim or 0), self.num_frozen_tokens
        trained = {"trainable_embedding": Param(((self.num_virtual_tokens or 0) - frozen, width), normal())}
        return trained | ({"frozen_embedding": Param((frozen, width), normal(), trainable=False)} if frozen else {})

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        trained = p.get_parameter("trainable_embedding")
        return torch.cat((p.get_buffer("frozen_embedding"), trained)) if self.num_frozen_tokens else trained

    def slots(self, p: Prompt, live: str) -> list[Slot]:
        return [_Joined("prompt_embeddings", f"{live}trainable_embedding", p, "trainable_embedding")]

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        return {"prompt_embeddings": self.vectors(p, {})}


class _Joined(Slot):
    """Frozen and trained tokens, which a file has in one tensor."""

    __slots__ = ()

    @property
    def tensor(self) -> Tensor:
        frozen, trained = self.holder._buffers.get("frozen_embedding"), self.holder._parameters["trainable_embedding"]
        assert trained is not None
        return trained if frozen is None else torch.cat((frozen, trained))

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    def put(self, tensor: Tensor) -> None:
        count = self.tensor.shape[0] - self.holder._parameters["trainable_embedding"].shape[0]  # type: ignore[union-attr]
        for name, part in (("frozen_embedding", tensor[:count]), ("trainable_embedding", tensor[count:])):
            if count or name == "trainable_embedding":
                Slot(name, name, self.holder, name).put(part)


# ---- starts --------------------------------------------------------------------------------------------------------------
def prompt_embeddings_from_past_key_values(past_key_values: Any, *, num_virtual_tokens: int) -> Tensor:
    """The first tokens of a cache as a prefix: ``(tokens, layers * 2 * heads * head_dim)``.

    Args:
        past_key_values: a cache of one sequence, or keys and values by layer.
        num_virtual_tokens: how many.

    Raises:
        ValueError: the cache is empty, of several sequences, too short, or its layers differ.
    """
    layers = [(layer[0], layer[1]) for layer in past_key_values]
    if not layers:
        raise ValueError("The cache is empty; run the model on a text with `use_cache=True` first.")
    first = layers[0][0]
    for keys, values in layers:
        if keys.ndim != 4 or keys.shape[0] != 1:
            raise ValueError(f"The cache holds {tuple(keys.shape)}; give one sequence: (1, heads, tokens, head_dim).")
        if keys.shape != first.shape or values.shape != first.shape:
            raise ValueError(f"Layers of the cache differ: {tuple(first.shape)}, {tuple(keys.shape)}, {tuple(values.shape)}.")
    if first.shape[2] < num_virtual_tokens:
        raise ValueError(f"The cache holds {first.shape[2]} tokens and the prefix {num_virtual_tokens}; give a longer text.")
    blocks = torch.stack([t[0, :, :num_virtual_tokens].to(first.device) for pair in layers for t in pair])
    return blocks.permute(2, 0, 1, 3).flatten(1)


@torch.no_grad()
def initialize_kv_prefix_from_past_key_values(
    model: PeftModel, *, adapter_name: str | None = None, past_key_values: Any, num_virtual_tokens: int | None = None
) -> Tensor:
    """Start a cartridge, or a prefix without a network, from a cache. Returns what it starts from.

    Raises:
        ValueError: the adapter has no keys and values of its own, or the cache does not fit.
    """
    name, count = _prefix_of(model, adapter_name, num_virtual_tokens)
    found = prompt_embeddings_from_past_key_values(past_key_values, num_virtual_tokens=count)
    model.prompt_encoder[name].load_prompt_embeddings(found)  # type: ignore[operator]
    return found


@torch.no_grad()
def initialize_kv_prefix_from_text(
    model: PeftModel,
    tokenizer: Any,
    *,
    text: str,
    adapter_name: str | None = None,
    num_virtual_tokens: int | None = None,
    use_chat_template: bool = True,
    max_length: int | None = None,
) -> Tensor:
    """Start a cartridge, or a prefix without a network, from what the base makes of a text. Returns what it starts from.

    Args:
        model: the adapted model.
        tokenizer: the base's.
        text: at least as many tokens as the prefix.
        adapter_name: the active one where None.
        num_virtual_tokens: those of the adapter where None.
        use_chat_template: have the text as a system message, where the tokenizer has a template.
        max_length: read no more tokens than this.

    Raises:
        ValueError: as for `initialize_kv_prefix_from_past_key_values`.
    """
    name, count = _prefix_of(model, adapter_name, num_virtual_tokens)
    if use_chat_template and getattr(tokenizer, "chat_template", None):
        ids = tokenizer.apply_chat_template([{"role": "system", "content": text}], return_dict=False, return_tensors="pt")
    else:
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids[:, :max_length].to(next(model.get_base_model().parameters()).device)
    with model.disable_adapter():
        cache = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True).past_key_values
    return initialize_kv_prefix_from_past_key_values(model, adapter_name=name, past_key_values=cache, num_virtual_tokens=count)


def _prefix_of(model: PeftModel, name: str | None, count: int | None) -> tuple[str, int]:
    name = name or model.active_adapters[0]
    config = model.peft_config[name]
    if not isinstance(config, (CartridgeConfig, PrefixTuningConfig)):
        raise ValueError(f"Adapter {name!r} is {config.peft_type}; CARTRIDGE and PREFIX_TUNING start from a cache.")
    if getattr(config, "prefix_projection", False):
        raise ValueError(f"A network makes the keys of {name!r}; set prefix_projection=False to start them from a cache.")
    return name, count or config.num_virtual_tokens or 0


# ---- composition ---------------------------------------------------------------------------------------------------------
def compose_cartridge_adapters(adapter_paths: Sequence[str | Path], *, output_path: str | Path, safe_serialization: bool = True) -> None:
    """Write an adapter that is several cartridges one behind another. The frozen tokens are those of the first.

    Raises:
        ValueError: there are fewer than two, or they are of different bases.
    """
    from ..formats.folder import write_adapter
    from ..state_dict import load_peft_weights

    if len(adapter_paths) < 2:
        raise ValueError("Give at least two adapters to compose.")
    configs = [PeftConfig.from_pretrained(p) for p in adapter_paths]
    first = configs[0]
    for path, config in zip(adapter_paths, configs, strict=True):
        if not isinstance(config, CartridgeConfig):
            raise ValueError(f"{path} holds {config.peft_type}; cartridges can be composed.")
        for name in ("task_type", "token_dim", "num_layers", "num_attention_heads", "num_transformer_submodules"):
            if getattr(config, name) != getattr(first, name):
                raise ValueError(
                    f"{path} has {name}={getattr(config, name)}, and the first {getattr(first, name)}; they do not go together."
                )
    together = torch.cat([load_peft_weights(str(p), "cpu")["prompt_embeddings"] for p in adapter_paths])
    composed: Any = replace(first, num_virtual_tokens=len(together))  # type: ignore[type-var]
    write_adapter(output_path, {"prompt_embeddings": together}, composed.to_file(), safe_serialization=safe_serialization)
