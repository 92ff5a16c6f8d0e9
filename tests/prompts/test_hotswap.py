"""Hot-swapping of what acts on inputs: the values go where the others were, and the rest of the model is not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.compat.hotswap import hotswap_adapter

IDS = torch.arange(1, 13).view(2, 6)
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "prompt": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p": ("PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "prefix": ("PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix-projected": ("PrefixTuningConfig", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}),
    "cartridge": ("CartridgeConfig", {"num_virtual_tokens": 3}),
}


@pytest.fixture
def llama(bases: Any) -> Callable[[], nn.Module]:
    return bases["llama"][1]


def prompted(base: nn.Module, method: str, seed: int, **more: Any) -> inlay.PeftModel:
    name, options = METHODS[method]
    model = inlay.get_peft_model(base, getattr(inlay, name)(task_type="CAUSAL_LM", **(options | more)))
    generator = torch.Generator().manual_seed(seed)
    for q in model.parameters():
        if q.requires_grad:
            q.data = torch.randn(q.shape, generator=generator) * 0.3
    return model.eval()


@pytest.mark.parametrize("method", METHODS)
def test_a_swap_is_a_load_in_place(method: str, tmp_path: Path, llama: Callable[[], nn.Module]) -> None:
    other = prompted(llama(), method, 2)
    other.save_pretrained(tmp_path / "other")
    prompted(llama(), method, 1).save_pretrained(tmp_path / "first")
    model = inlay.PeftModel.from_pretrained(llama(), str(tmp_path / "first")).eval()
    memory = {name: t.data_ptr() for name, t in model.state_dict().items()}
    with torch.no_grad():
        assert not torch.allclose(model(IDS).logits, other(IDS).logits)
        hotswap_adapter(model, str(tmp_path / "other"), "default", torch_device="cpu")
        torch.testing.assert_close(model(IDS).logits, other(IDS).logits)
    assert {name: t.data_ptr() for name, t in model.state_dict().items()} == memory


def test_more_tokens_are_no_padding(tmp_path: Path, llama: Callable[[], nn.Module]) -> None:
    model = prompted(llama(), "prompt", 1)
    prompted(llama(), "prompt", 2, num_virtual_tokens=4).save_pretrained(tmp_path)
    before = model(IDS).logits
    with pytest.raises(ValueError, match="num_virtual_tokens, 3 != 4"):
        hotswap_adapter(model, str(tmp_path), "default", torch_device="cpu")
    assert torch.equal(model(IDS).logits, before)
