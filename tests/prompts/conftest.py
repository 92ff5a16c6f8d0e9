"""Tiny random bases, the same each time they are made, and batches for them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
# Large weights, so that an error in a prompt or a position shows in the logits.
SPREAD = {"initializer_range": 0.2}


def _seeded(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return build().eval()


def llama(cls: str = "LlamaForCausalLM", **options: object) -> nn.Module:
    import transformers

    config = transformers.LlamaConfig(**SIZES, **SPREAD, num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0, **options)
    return _seeded(lambda: getattr(transformers, cls)(config))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return _seeded(lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, **SPREAD, **ids)))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    ids = {"decoder_start_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    return _seeded(lambda: T5ForConditionalGeneration(T5Config(**sizes, **ids, initializer_factor=2.0)))


def bart() -> nn.Module:
    from transformers import BartConfig, BartForConditionalGeneration

    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 2, "forced_eos_token_id": None}
    sides = {f"{side}_{name}": n for side in ("encoder", "decoder") for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))}
    sizes = {"vocab_size": 64, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.2}
    return _seeded(lambda: BartForConditionalGeneration(BartConfig(**sizes, **sides, **ids)))


def bert(cls: str, labels: int = 3) -> nn.Module:
    import transformers

    return _seeded(lambda: getattr(transformers, cls)(transformers.BertConfig(**SIZES, **SPREAD, num_labels=labels)))


BASES: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "llama": ("CAUSAL_LM", llama),
    "gpt2": ("CAUSAL_LM", gpt2),
    "t5": ("SEQ_2_SEQ_LM", t5),
    "bart": ("SEQ_2_SEQ_LM", bart),
    "bert-sequence": ("SEQ_CLS", lambda: bert("BertForSequenceClassification")),
    "bert-token": ("TOKEN_CLS", lambda: bert("BertForTokenClassification")),
    "bert-question": ("QUESTION_ANS", lambda: bert("BertForQuestionAnswering", 2)),
    "bert-feature": ("FEATURE_EXTRACTION", lambda: bert("BertModel")),
    "llama-sequence": ("SEQ_CLS", lambda: llama("LlamaForSequenceClassification", num_labels=3)),
}


@pytest.fixture
def bases() -> dict[str, tuple[str, Callable[[], nn.Module]]]:
    """By name: the task, and what makes the base."""
    return BASES


@pytest.fixture
def ids() -> Tensor:
    """``(3, 7)`` tokens, none of them special."""
    return torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def right_padded() -> Tensor:
    """A mask for `ids` that hides the ends of two rows."""
    return torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 3 + [0] * 4])
