"""A head that one adapter retrains as a whole and another adapts: merged, it gives what it gives live, in whatever order they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

IDS = torch.arange(3, 11).view(1, 8)


@pytest.fixture
def model() -> Any:
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    first = inlay.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    tuned: Any = inlay.get_peft_model(LlamaForCausalLM(config), first, "whole")
    tuned.get_base_model().lm_head.adapters["whole"].weight.data.normal_()
    tuned.add_adapter("low", inlay.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, seed=3))
    return tuned.eval()


@pytest.mark.parametrize("order", [[["whole", "low"]], [["low", "whole"]], [["whole"], ["low"]], [["low"], ["whole"]]])
@torch.no_grad()
def test_merging_is_what_acts(order: list[list[str]], model: Any) -> None:
    before = {name: t.clone() for name, t in model.get_base_model().state_dict().items()}
    model.set_adapter(["whole", "low"])
    both = model(input_ids=IDS).logits
    with model.use_adapters("low"):
        low = model(input_ids=IDS).logits
    assert (both - low).abs().max() > 0.1
    for names in order:
        model.merge_adapter(names)
    torch.testing.assert_close(model(input_ids=IDS).logits, both, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert all(torch.equal(t, before[name]) for name, t in model.get_base_model().state_dict().items())
    with model.use_adapters("low"):
        assert torch.equal(model(input_ids=IDS).logits, low)
    torch.testing.assert_close(model.merge_and_unload()(input_ids=IDS).logits, both, rtol=1e-5, atol=1e-5)
