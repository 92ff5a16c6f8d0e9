"""One adapter changes the weight of a module that another retrains as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import inlay

IDS = torch.arange(3, 11).view(1, 8)
HOSTS: dict[str, Any] = {"linear": lambda: nn.Linear(4, 4), "norm": lambda: LlamaRMSNorm(4)}


class Model(nn.Module):
    def __init__(self, host: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.host, self.head = HOSTS[host](), nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.tanh(self.host(x)))


@pytest.mark.parametrize("reads_weight", [False, True])
@pytest.mark.parametrize("first", ["changes", "retrains"])
@pytest.mark.parametrize("host", HOSTS)
def test_each_acts_when_it_is_chosen(host: str, first: str, reads_weight: bool) -> None:
    configs = {
        "changes": inlay.LoraConfig(r=2, target_modules=["host"], init_lora_weights=False, use_dora=reads_weight),
        "retrains": inlay.LoraConfig(r=2, target_modules=["head"], modules_to_save=["host"], init_lora_weights=False, seed=3),
    }
    names = [first, *(set(configs) - {first})]
    model = inlay.get_peft_model(Model(host), configs[names[0]], names[0])
    model.add_adapter(names[1], configs[names[1]])
    model.eval()
    x, expected = torch.randn(3, 4), {}
    for name, config in configs.items():
        alone = inlay.get_peft_model(Model(host), config, name).eval()
        for n, q in alone.named_parameters():
            if "adapters" in n and n.startswith("base_model.model.host") and name == "retrains":
                q.data += 0.5
        for n, q in model.named_parameters():
            other = dict(alone.named_parameters()).get(n)
            if f".adapters.{name}" in n and other is not None:
                q.data.copy_(other.data)
        expected[name] = alone(x)
    expected["__base__"] = Model(host)(x)
    for name in configs:
        with model.use_adapters(name):
            torch.testing.assert_close(model(x), expected[name])
    with model.disable_adapter():
        torch.testing.assert_close(model(x), expected["__base__"])
    rows = ["changes", "__base__", "retrains"]
    mixed = model(x, adapter_names=rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i], expected[row][i])
    for merged in configs:
        model.merge_adapter([merged])
        for name in configs:
            with model.use_adapters(name):
                torch.testing.assert_close(model(x), expected[name])
        with model.disable_adapter():
            torch.testing.assert_close(model(x), expected["__base__"])
        mixed = model(x, adapter_names=rows)
        for i, row in enumerate(rows):
            torch.testing.assert_close(mixed[i], expected[row][i])
        model.unmerge_adapter()


@pytest.fixture
def heads() -> Any:
    """A head that one adapter retrains and another changes."""
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    first = inlay.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["lm_head"], init_lora_weights=False)
    tuned: Any = inlay.get_peft_model(LlamaForCausalLM(config), first, "whole")
    tuned.get_base_model().lm_head.adapters["whole"].weight.data.normal_()
    tuned.add_adapter("low", inlay.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False, seed=3))
    return tuned.eval()


@pytest.mark.parametrize("order", [[["whole", "low"]], [["low", "whole"]], [["whole"], ["low"]], [["low"], ["whole"]]])
@torch.no_grad()
def test_merging_both_gives_what_acts_live(order: list[list[str]], heads: Any) -> None:
    """In whatever order they come."""
    model = heads
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
    model.set_adapter(["whole", "low"])
    made = model.merge_and_unload(base="requantized" if len(order) > 1 else "dequantized")
    torch.testing.assert_close(made(input_ids=IDS).logits, both, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_merge_that_fails_leaves_what_was_merged(heads: Any) -> None:
    heads.merge_adapter(["low"])
    with heads.use_adapters("low"):
        low = heads(input_ids=IDS).logits
    heads.add_adapter("broken", inlay.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]))
    heads.get_base_model().model.norm.adapters["broken"].weight.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="not finite"):
        heads.merge_adapter(["whole", "broken"], safe_merge=True)
    with heads.use_adapters("low"):
        assert torch.equal(heads(input_ids=IDS).logits, low)
    assert heads.get_base_model().lm_head._inlay["weight"].merged == ("low",)
