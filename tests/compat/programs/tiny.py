"""What all programs start from, the same under either library."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WORDS = 60
INPUT_IDS = torch.arange(4, 20)[None]


def llama(**options: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    special = {"num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return LlamaForCausalLM(LlamaConfig(**(sizes | special | options))).eval()


def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3} | {f"w{i}": 4 + i for i in range(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def sentences(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(f"w{draw.randrange(WORDS)}" for _ in range(10)) for _ in range(count)]


def values(like: Mapping[str, Tensor], seed: int = 0) -> dict[str, Tensor]:
    """Values for an adapter that depend on nothing but the seed and the names of its tensors in a file."""
    generator = torch.Generator().manual_seed(seed)
    own = sorted(k for k in like if "base_layer" not in k and "embed_tokens.weight" not in k)
    return {k: torch.randn(like[k].shape, generator=generator) * 0.1 for k in own}


def logits(model: Any) -> list[float]:
    with torch.no_grad():
        return model.eval()(INPUT_IDS).logits[0, -1].tolist()


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def trained(model: torch.nn.Module) -> dict[str, int]:
    """The trainable parameters by layer: how many there are and how many numbers they hold."""
    found: dict[str, int] = {}
    for name, q in model.named_parameters():
        if q.requires_grad:
            layer = name.partition(".lora_")[0].partition(".adapters.")[0].partition(".modules_to_save.")[0]
            found[layer] = found.get(layer, 0) + q.numel()
    return found
