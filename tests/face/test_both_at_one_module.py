"""One adapter changes the weight of a module that another retrains as a whole."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import inlay

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
