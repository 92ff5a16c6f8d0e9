"""Starts on a base that transformers loaded with bitsandbytes, against the real library and in its hands."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM, MixtralForCausalLM

import inlay
from inlay.core.adapter import Adapter
from inlay.core.inlaid import places

from ..tiny import llama, mixtral
from .support import WEIGHTS

IDS = torch.arange(48).view(4, 12) % 40
LOADING = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": torch.float32},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "vocab_size": 40}
    path = tmp_path_factory.mktemp("llama")
    # In shards, as large models are.
    llama(seed=0, **sizes, initializer_range=0.2).save_pretrained(path, max_shard_size="100kB")
    assert (path / "model.safetensors.index.json").is_file()
    return path


def loaded(folder: Path, to: str = "nf4") -> nn.Module:
    options = BitsAndBytesConfig(**LOADING[to])
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=options, device_map="cpu", dtype=torch.float32)


def adapted(library: Any, folder: Path, to: str = "nf4") -> Any:
    return library.get_peft_model(
        loaded(folder, to), library.LoraConfig(r=8, lora_alpha=12, target_modules="all-linear", task_type="CAUSAL_LM")
    )


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def products(model: Any) -> dict[str, Tensor]:
    """``B A`` by layer, of either library."""
    if isinstance(model, inlay.PeftModel):
        found = [p for place in places(model.get_base_model()) for p in place.adapters.values() if isinstance(p, Adapter)]
        return {p.path: (p.lora_B @ p.lora_A).detach() for p in found}
    return {
        name.removeprefix("base_model.model."): (m.lora_B["default"].weight @ m.lora_A["default"].weight).detach()
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }


@pytest.fixture
def _on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real library moves each weight to a GPU, which no formula asks for."""
    to = Tensor.to

    def here(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return to(self, *args, **(kwargs | {"device": "cpu"} if kwargs.get("device") == "cuda" else kwargs))

    monkeypatch.setattr(Tensor, "to", here)


@pytest.mark.usefixtures("_on_cpu")
def test_loftq_is_that_of_the_real_library(folder: Path) -> None:
    """The same products from the same shards. The real library leaves out the scaling, so that its update is ``alpha / r`` times what
    was lost (a bug); ours is what was lost."""
    ours, theirs = adapted(inlay, folder), adapted(peft, folder)
    inlay.replace_lora_weights_loftq(ours, str(folder / "model.safetensors"), adapter_name="default", callback=None)
    peft.replace_lora_weights_loftq(theirs, str(folder), adapter_name="default", callback=None)
    wanted = products(theirs)
    assert products(ours).keys() == wanted.keys()
    for path, found in products(ours).items():
        torch.testing.assert_close(1.5 * found, wanted[path], rtol=1e-4, atol=1e-5)


def test_the_callback_is_greedy_as_there(folder: Path) -> None:
    """The documented use: keep a layer's start where the outputs come nearer, in several rounds."""
    exact = logits(LlamaForCausalLM.from_pretrained(folder))
    model = adapted(inlay, folder)
    least = [float((logits(model) - exact).square().mean())]
    plain = least[0]

    def better(model: nn.Module, name: str) -> bool:
        left = float((logits(model) - exact).square().mean())
        if left < least[0]:
            least[0] = left
            return True
        return False

    # Where None, the base is looked for where it was loaded from.
    inlay.replace_lora_weights_loftq(model, callback=better)

    assert float((logits(model) - exact).square().mean()) == pytest.approx(least[0])
    assert least[0] < plain


@pytest.mark.parametrize("to", LOADING)
def test_outputs_come_nearer_and_the_file_is_that_of_lora(folder: Path, to: str, tmp_path: Path) -> None:
    exact, left = logits(LlamaForCausalLM.from_pretrained(folder)), {}
    for how in ("plain", "loftq", "own", "cloq"):
        model = adapted(inlay, folder, to)
        if how == "loftq":
            inlay.replace_lora_weights_loftq(model)
        elif how != "plain":
            inlay.initialize_lora_cloq_weights(model, calibration=[{"input_ids": IDS}] if how == "cloq" else None)
        left[how] = float((logits(model) - exact).norm() / exact.norm())
        found = logits(model)
    assert left["cloq"] < left["own"] < left["loftq"] < left["plain"]
    # bitsandbytes rounds the inputs of int8 layers, too, which no start makes up for.
    assert left["cloq"] < (0.95 if to == "int8" else 0.85) * left["loftq"]

    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["init_lora_weights"] is True
    assert {key.rsplit(".", 2)[1] for key in load_file(tmp_path / WEIGHTS)} == {"lora_A", "lora_B"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(loaded(folder, to), tmp_path)
    module: Any
    for module in theirs.modules():
        # On some CPUs the layer rounds its scales for inference. Inlay turns that off.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    torch.testing.assert_close(logits(theirs), found, rtol=1e-4, atol=1e-4)


def test_experts_that_the_file_keeps_one_by_one(tmp_path: Path) -> None:
    """The model has them as stacks, and the rows of each are those that were routed to it."""
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    exact = mixtral(seed=0, **sizes, vocab_size=40, num_local_experts=3, num_experts_per_tok=2, initializer_range=0.2)
    exact.save_pretrained(tmp_path)
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in load_file(tmp_path / WEIGHTS.replace("adapter_", ""))
    left = {}
    for how in ("plain", "loftq", "cloq"):
        base = inlay.quantize_(MixtralForCausalLM.from_pretrained(tmp_path), "nf4")
        targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
        model = inlay.get_peft_model(base, inlay.LoraConfig(r=8, target_modules=["q_proj", "v_proj"], target_parameters=targets))
        if how == "loftq":
            inlay.replace_lora_weights_loftq(model)
        elif how == "cloq":
            inlay.initialize_lora_cloq_weights(model, calibration=[{"input_ids": IDS}])
        left[how] = float((logits(model) - logits(exact)).norm())
    assert left["cloq"] < left["loftq"] < left["plain"]


def test_gpt2_and_its_transposed_weights(tmp_path: Path) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    exact = GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.2)).eval()
    exact.save_pretrained(tmp_path)
    left = {}
    for how in ("plain", "loftq", "cloq"):
        base = inlay.from_pretrained_quantized(tmp_path, "nf4", dtype=torch.float32)
        model = inlay.get_peft_model(base, inlay.LoraConfig(r=8, target_modules=["c_attn", "c_proj", "c_fc"]))
        if how == "loftq":
            inlay.replace_lora_weights_loftq(model, tmp_path)
        elif how == "cloq":
            inlay.initialize_lora_cloq_weights(model, tmp_path, [IDS])
        left[how] = float((logits(model) - logits(exact)).norm())
    assert left["cloq"] < 0.8 * left["loftq"]
    assert left["loftq"] < left["plain"]


@pytest.mark.parametrize("by", ["inlay", "bitsandbytes"])
def test_a_base_that_was_quantised_again_is_saved_along(by: str, folder: Path, tmp_path: Path) -> None:
    """With the alternation the adapter belongs to another base, which is one like any other."""

    def model() -> Any:
        return inlay.from_pretrained_quantized(folder, "nf4", dtype=torch.float32) if by == "inlay" else loaded(folder)

    ours = inlay.get_peft_model(model(), inlay.LoraConfig(r=8, target_modules="all-linear"))
    inlay.initialize_lora_cloq_weights(ours, folder, [{"input_ids": IDS}], iterations=3)
    wanted = logits(ours)
    ours.save_pretrained(tmp_path / "adapter")
    ours.unload().save_pretrained(tmp_path / "base")
    again = inlay.from_pretrained_quantized(tmp_path / "base", dtype=torch.float32)
    torch.testing.assert_close(logits(inlay.PeftModel.from_pretrained(again, tmp_path / "adapter")), wanted, rtol=1e-4, atol=1e-4)
    # On the base as it was, what the adapter makes up for is something else.
    before = inlay.PeftModel.from_pretrained(model(), tmp_path / "adapter")
    assert (logits(before) - wanted).norm() > 0.1 * wanted.norm()
