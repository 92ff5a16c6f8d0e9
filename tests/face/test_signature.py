"""Trainers ask a model's forward what columns it takes; the answer is the base's."""

from __future__ import annotations

import copy
import inspect
import pickle

import torch
from transformers import BertConfig, BertForSequenceClassification

import inlay


def model() -> inlay.PeftModel:
    torch.manual_seed(0)
    config = BertConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    return inlay.get_peft_model(BertForSequenceClassification(config).eval(), inlay.LoraConfig(task_type="SEQ_CLS")).eval()


def test_forward_shows_what_the_base_takes() -> None:
    shown = list(inspect.signature(model().forward).parameters)
    assert shown[:3] == ["input_ids", "attention_mask", "token_type_ids"]
    assert {"labels", "inputs_embeds", "adapter_names"} <= set(shown)


def test_copies_run_their_own_forward() -> None:
    first, ids = model(), torch.tensor([[1, 2, 3]])
    before = first(ids).logits
    for twin in (copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        assert torch.equal(twin(ids).logits, before)
        for q in twin.parameters():
            q.data.zero_()
        assert not torch.equal(twin(ids).logits, before)
        assert torch.equal(first(ids).logits, before)
        assert twin.forward.__self__ is twin
