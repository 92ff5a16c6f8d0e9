"""LoftQ against the real library's, which is written for an accelerator and runs here on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import peft
import pytest
import torch
from peft.utils import loftq_utils
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import inlay
from inlay.core.site import site_of
from inlay.initializers.compensation import best_factors
from inlay.initializers.loftq import quantized

from ..tiny import llama
from .test_initializers import adapters, factors

TOKENS = torch.arange(24).view(2, 12)
LAYERS = ["q_proj", "down_proj"]


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it wants to have on an accelerator stays."""

    def staying(move: Any) -> Any:
        def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            here = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
            return move(self, *("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **here)

        return to

    for cls in (torch.Tensor, bnb.nn.Params4bit):
        monkeypatch.setattr(cls, "to", staying(cls.to))


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("iterations", [1, 2, 5])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.filterwarnings("ignore")
def test_the_same_residual(bits: int, iterations: int) -> None:
    """Their 8 bits are taken from the weight in half precision, so that some numbers fall on the next step."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 96)
    w = layer.weight.detach()
    rounded, a, b = loftq_utils.loftq_init(w, bits, 8, iterations)
    its = float((w - rounded - b @ a).norm())
    site = site_of(layer)
    assert site is not None
    (ours,) = quantized([site], w.unsqueeze(0), 8, inlay.LoftQConfig(loftq_bits=bits, loftq_iter=iterations))
    left = w - ours
    mine_a, mine_b = (t.float() for t in best_factors(left, 8, 1.0))
    error = float((left - mine_b @ mine_a).norm())
    if bits == 4:
        torch.testing.assert_close(ours, rounded, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(mine_b @ mine_a, b @ a, rtol=1e-4, atol=1e-5)
        assert error == pytest.approx(its, rel=1e-5)
    else:
        assert (ours - rounded).abs().max() < 2 * float(w.abs().max()) / 127
        assert error == pytest.approx(its, rel=0.01)


def base() -> LlamaForCausalLM:
    return llama(seed=0, hidden_size=64, intermediate_size=128, num_key_value_heads=4, vocab_size=64)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=TOKENS).logits


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.filterwarnings("ignore")
def test_files_of_the_real_library(iterations: int, tmp_path: Path) -> None:
    """They hold the factors; the rounded weight is found again from the base."""
    options = {"r": 4, "lora_alpha": 4, "target_modules": LAYERS, "init_lora_weights": "loftq"}
    config = peft.LoraConfig(**options, loftq_config=peft.LoftQConfig(loftq_bits=4, loftq_iter=iterations))
    theirs = peft.get_peft_model(base(), config)
    theirs.save_pretrained(tmp_path)
    mine = inlay.LoraConfig(**options, loftq_config=inlay.LoftQConfig(loftq_bits=4, loftq_iter=iterations))
    ours = inlay.get_peft_model(base(), mine)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-4, atol=1e-5)
    read = inlay.PeftModel.from_pretrained(base(), tmp_path)
    torch.testing.assert_close(logits(read), logits(theirs), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.filterwarnings("ignore")
def test_the_same_factors_on_a_quantised_base(tmp_path: Path) -> None:
    base().save_pretrained(tmp_path)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    products: list[dict[str, Tensor]] = []
    for library in (peft, inlay):
        stored = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=nf4, device_map="cpu", dtype=torch.float32)
        model = library.get_peft_model(stored, library.LoraConfig(r=4, lora_alpha=4, target_modules=LAYERS))
        library.replace_lora_weights_loftq(model, str(tmp_path / "model.safetensors"))
        if library is peft:
            products.append({n: b @ a for n, (a, b) in factors(model).items()})
        else:
            products.append({n: (p.lora_B @ p.lora_A).detach() for n, p in adapters(model).items()})
    theirs, ours = products
    assert theirs.keys() == ours.keys()
    for name, product in theirs.items():
        torch.testing.assert_close(ours[name], product, rtol=1e-4, atol=1e-5)
