"""Tiny random models of real architectures, and what the tests do to them."""

import copy
from typing import Any

import torch
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

VOCAB = 100


SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
}


def llama(layers: int = 2, seed: int = 7, **options: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_hidden_layers": layers, **options})).eval()


def mixtral(seed: int = 7, **options: Any) -> MixtralForCausalLM:
    torch.manual_seed(seed)
    return MixtralForCausalLM(MixtralConfig(**{**SIZES, "num_local_experts": 4, **options})).eval()


def bert_classifier() -> BertForSequenceClassification:
    torch.manual_seed(7)
    return BertForSequenceClassification(BertConfig(**{k: n for k, n in SIZES.items() if k != "num_key_value_heads"})).eval()


def ids(rows: int = 2, length: int = 6) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(3))


def stir(model: nn.Module, name: str = "default", by: float = 0.05, seed: int = 1) -> None:
    """Give an adapter values that do something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, q in model.named_parameters():
            if f".adapters.{name}." in key:
                q += by * torch.randn(q.shape, generator=generator).to(q.dtype)


def logits(model: nn.Module, x: torch.Tensor, **options) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=x, **options).logits


def snapshot(model: nn.Module) -> dict:
    """Everything that a failed or undone operation must leave as it was."""
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
        "tensors": copy.deepcopy(model.state_dict()),
        "ids": {n: id(q) for n, q in model.named_parameters(remove_duplicate=False)},
        "trainable": {n: q.requires_grad for n, q in model.named_parameters()},
    }


def assert_same(before: dict, after: dict) -> None:
    assert before["classes"] == after["classes"]
    assert before["attributes"] == after["attributes"]
    assert before["ids"] == after["ids"]
    assert before["trainable"] == after["trainable"]
    assert before["tensors"].keys() == after["tensors"].keys()
    for key, value in before["tensors"].items():
        assert torch.equal(value, after["tensors"][key]), key
