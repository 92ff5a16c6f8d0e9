"""Models without transformers, whose import takes longer than a merge's planning: decoders that their files and config.json describe fully.

Where the two do not say the same to the last bias, or an architecture is not in the table, transformers is asked.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..formats.streaming import Checkpoint

_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
_NORMED = (*_ATTENTION, "self_attn.q_norm", "self_attn.k_norm")
_GATED = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
_NORMS = ("input_layernorm", "post_attention_layernorm")
_MORE_NORMS = (*_NORMS, "pre_feedforward_layernorm", "post_feedforward_layernorm")
_LLAMA = (*_ATTENTION, *_GATED, *_NORMS)
# What a block is made of, in transformers' order, by architecture.
BLOCKS: dict[str, tuple[str, ...]] = {
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Qwen2ForCausalLM": _LLAMA,
    "Qwen3ForCausalLM": (*_NORMED, *_GATED, *_NORMS),
    "GemmaForCausalLM": _LLAMA,
    "Gemma2ForCausalLM": (*_ATTENTION, *_GATED, *_MORE_NORMS),
    "Gemma3ForCausalLM": (*_NORMED, *_GATED, *_MORE_NORMS),
    "Phi3ForCausalLM": ("self_attn.o_proj", "self_attn.qkv_proj", "mlp.gate_up_proj", "mlp.down_proj", *_NORMS),
    "GraniteForCausalLM": _LLAMA,
    "SmolLM3ForCausalLM": _LLAMA,
}
# Those whose head is the embedding unless config.json says otherwise.
TIED = {"GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "SmolLM3ForCausalLM"}


class RMSNorm(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))


class Outline(nn.Module):
    """A model of modules that have shapes and cannot be called.

    Attributes:
        config: what config.json says.
    """

    base_model_prefix = "model"

    def __init__(self, config: Mapping[str, Any], modules: Mapping[str, nn.Module], tied: bool) -> None:
        super().__init__()
        self.config = SimpleNamespace(**config)
        for path, module in modules.items():
            *parents, name = path.split(".")
            owner: nn.Module = self
            for i, parent in enumerate(parents):
                if parent not in owner._modules:
                    numbered = ".".join(parents[: i + 1]) == "model.layers"
                    owner._modules[parent] = nn.ModuleList() if numbered else nn.Module()
                owner = owner._modules[parent]  # type: ignore[assignment]
            owner._modules[name] = module
        if tied:
            self.get_output_embeddings()._parameters["weight"] = self.get_input_embeddings()._parameters["weight"]

    def get_input_embeddings(self) -> nn.Module:
        return self.get_submodule("model.embed_tokens")

    def get_output_embeddings(self) -> nn.Module:
        return self.get_submodule("lm_head")


def outline(config: Mapping[str, Any], checkpoint: Checkpoint) -> Outline | None:
    """The model of a folder, on the meta device; None where config and files do not describe one that is known here, and each other.

    Args:
        config: the content of config.json.
    """
    name = (config.get("architectures") or [""])[0]
    if name not in BLOCKS:
        return None
    held = {key: entry.shape for key, entry in checkpoint.tensors.items()}
    tied = bool(config.get("tie_word_embeddings", name in TIED))
    try:
        with torch.device("meta"):
            # Its class has the name that transformers' has.
            model: Outline = type(name, (Outline,), {})(config, _modules(name, config), tied)
    except (KeyError, TypeError, ZeroDivisionError):
        # A size is missing, or is none.
        return None
    return model if held == {key: tuple(q.shape) for key, q in model.named_parameters()} else None


def _modules(name: str, config: Mapping[str, Any]) -> dict[str, nn.Module]:
    hidden, inner, heads = config["hidden_size"], config["intermediate_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    keys = (config.get("num_key_value_heads") or heads) * head
    shapes = {
        "q_proj": (hidden, heads * head), "k_proj": (hidden, keys), "v_proj": (hidden, keys), "o_proj": (heads * head, hidden),
        "qkv_proj": (hidden, heads * head + 2 * keys), "gate_proj": (hidden, inner), "up_proj": (hidden, inner),
        "gate_up_proj": (hidden, 2 * inner), "down_proj": (inner, hidden),
    }  # fmt: skip

    def made(path: str) -> nn.Module:
        leaf = path.rpartition(".")[2]
        if leaf not in shapes:
            return RMSNorm(head if path.startswith("self_attn") else hidden)
        if name == "Qwen2ForCausalLM":
            bias = leaf in ("q_proj", "k_proj", "v_proj")
        else:
            bias = bool(config.get("attention_bias" if path.startswith("self_attn") else "mlp_bias"))
        return nn.Linear(*shapes[leaf], bias=bias)

    words = torch.empty(config["vocab_size"], hidden)
    # Drawing numbers, also those that are nowhere, makes torch load its compiler.
    found: dict[str, nn.Module] = {"model.embed_tokens": nn.Embedding(config["vocab_size"], hidden, _weight=words)}
    found |= {f"model.layers.{i}.{path}": made(path) for i in range(config["num_hidden_layers"]) for path in BLOCKS[name]}
    return found | {"model.norm": RMSNorm(hidden), "lm_head": nn.Linear(hidden, config["vocab_size"], bias=False)}
