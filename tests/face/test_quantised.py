"""Quantised models as users have them: loaded by transformers with bitsandbytes, saved, merged, unloaded."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaForCausalLM

import inlay
from inlay import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from inlay.compat.hotswap import hotswap_adapter

from ..tiny import llama

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
TOKENS = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4, "vocab_size": 64}
    model = llama(seed=0, **sizes, attention_bias=True, initializer_range=0.2)
    for name, q in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(q, std=0.2)
    path = tmp_path_factory.mktemp("llama")
    model.save_pretrained(path)
    return path


def loaded(folder: Path, **options: Any) -> nn.Module:
    quantised = BitsAndBytesConfig(**(options or NF4))
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantised, device_map="cpu", dtype=torch.float32)


def adapted(folder: Path, **options: Any) -> PeftModel:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, seed=1, task_type="CAUSAL_LM")
    return get_peft_model(loaded(folder, **options), config)


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=TOKENS).logits


def test_checkpointing_changes_no_gradient(folder: Path) -> None:
    found = []
    for checkpointing in (False, True):
        model = adapted(folder)
        prepare_model_for_kbit_training(model.get_base_model(), use_gradient_checkpointing=checkpointing)
        model.set_requires_grad("default")
        model.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        found.append({n: q.grad for n, q in model.named_parameters() if q.requires_grad})
    assert found[0].keys() == found[1].keys()
    assert len(found[0]) == 12
    for name, grad in found[0].items():
        torch.testing.assert_close(found[1][name], grad)


def test_preparing_keeps_the_dtypes_that_torchao_needs(folder: Path) -> None:
    """Its kernels for some formats take no input of another dtype."""
    from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

    for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
        model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        quantize_(model, config, filter_fn=lambda m, name: isinstance(m, nn.Linear) and name != "lm_head")
        expected, kinds = logits(model), {n: (type(q), q.dtype) for n, q in model.named_parameters()}
        prepared = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        assert {n: (type(q), q.dtype) for n, q in prepared.named_parameters()} == kinds
        assert torch.equal(logits(prepared), expected)
        peft = get_peft_model(prepared, LoraConfig(r=4, target_modules=["q_proj"]))
        peft.train()(input_ids=TOKENS, labels=TOKENS).loss.backward()
        assert sum(q.grad is not None for q in peft.parameters()) == 4


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_preparing_casts_what_is_not_quantised(folder: Path, storage: torch.dtype) -> None:
    options: dict[str, Any] = NF4 | {"bnb_4bit_quant_storage": storage}
    config = BitsAndBytesConfig(**options)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.bfloat16)
    codes = model.model.layers[0].mlp.up_proj.weight.detach().clone()
    prepared: Any = prepare_model_for_kbit_training(model)
    assert torch.equal(prepared.model.layers[0].mlp.up_proj.weight, codes)
    assert {q.dtype for q in prepared.parameters() if type(q) is nn.Parameter} == {torch.float32}
    assert prepared.is_gradient_checkpointing
    own = inlay.quantize_(LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))
    expected = logits(own)
    found = logits(prepare_model_for_kbit_training(own))
    assert found.dtype == torch.float32
    assert (found - expected).norm() < 0.02 * expected.norm()


def test_files_and_switching(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    first = logits(model)
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(loaded(folder), tmp_path)
    assert torch.equal(logits(other), first)
    other.add_adapter("b", LoraConfig(r=2, target_modules=["k_proj"], init_lora_weights=False))
    other.set_adapter("b")
    assert not torch.allclose(logits(other), first, atol=1e-3)
    other.load_adapter(tmp_path, "b2")
    other.set_adapter("b2")
    assert torch.equal(logits(other), first)
    with torch.no_grad():
        mixed = other(input_ids=TOKENS, adapter_names=["default", "b"]).logits
    torch.testing.assert_close(mixed[0], first[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("own", [False, True], ids=["bitsandbytes", "inlay"])
def test_hotswap_and_mixed_batches_with_the_base(own: bool, folder: Path, tmp_path: Path) -> None:
    def base() -> Any:
        return inlay.from_pretrained_quantized(folder, "nf4", dtype=torch.float32) if own else loaded(folder)

    def config(seed: int) -> LoraConfig:
        return LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False, seed=seed, task_type="CAUSAL_LM")

    model, other = get_peft_model(base(), config(1)), get_peft_model(base(), config(2))
    first, second = logits(model), logits(other)
    assert not torch.allclose(first, second, atol=1e-2)
    with torch.no_grad():
        mixed = model(input_ids=TOKENS, adapter_names=["__base__", "default"]).logits
        with model.disable_adapter():
            torch.testing.assert_close(mixed, torch.stack([logits(model)[0], first[1]]), rtol=1e-5, atol=1e-5)
    other.save_pretrained(tmp_path)
    hotswap_adapter(model, str(tmp_path), "default")
    assert torch.equal(logits(model), second)


def test_counts_are_those_of_the_dense_model(folder: Path) -> None:
    dense = get_peft_model(LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=4, target_modules=["q_proj"]))
    assert get_peft_model(loaded(folder), LoraConfig(r=4, target_modules=["q_proj"])).get_nb_trainable_parameters() == (
        dense.get_nb_trainable_parameters()
    )


def test_dequantised_merge_loses_nothing(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    before = logits(model)
    merged = model.merge_and_unload(base="dequantized")
    torch.testing.assert_close(logits(merged), before, rtol=1e-4, atol=1e-4)
    assert {type(m) for n, m in merged.named_modules() if n.endswith("_proj")} == {nn.Linear}
    merged.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(LlamaForCausalLM.from_pretrained(tmp_path)), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path_is_given", [False, True])
def test_merge_into_the_original(folder: Path, path_is_given: bool) -> None:
    dense = LlamaForCausalLM.from_pretrained(folder)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False, seed=1, task_type="CAUSAL_LM")
    expected = logits(get_peft_model(dense, config))
    merged = adapted(folder).merge_and_unload(base="original", original=str(folder) if path_is_given else None)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-5, atol=1e-5)
    assert not getattr(merged, "is_loaded_in_4bit", False)


def test_out_dtype(folder: Path) -> None:
    merged = adapted(folder).merge_and_unload(base="dequantized", out_dtype=torch.bfloat16)
    assert {q.dtype for q in merged.parameters()} == {torch.bfloat16}


def test_weights_that_an_adapter_does_not_change_are_not_rounded_again(folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, seed=1, bias="all", task_type="CAUSAL_LM")
    model = get_peft_model(loaded(folder), config)
    stored = {n: q.detach().clone() for n, q in model.named_parameters() if type(q).__name__ == "Params4bit"}
    with torch.no_grad():
        for name, q in model.named_parameters():
            if "bias" in name and q.requires_grad:
                q.add_(0.1)
    before = logits(model)
    with pytest.warns(UserWarning, match="2 merged weights were quantised again") as caught:
        model.merge_adapter()
    share = re.search(r"up to (\d+)% of what", str(caught[0].message))
    assert share is not None
    assert int(share[1]) < 60
    changed = [n for n, q in model.named_parameters() if n in stored and not torch.equal(q, stored[n])]
    assert len(changed) == 2
    assert all("q_proj" in n for n in changed)
    assert (logits(model) - before).norm() < 0.2 * before.norm()
    model.unmerge_adapter()
    assert torch.equal(logits(model), before)


def test_requantised_merge_says_what_it_lost(folder: Path) -> None:
    model = adapted(folder)
    stored = {n: q.detach().clone() for n, q in model.named_parameters() if type(q).__name__ == "Params4bit"}
    before = logits(model)
    with pytest.warns(UserWarning, match="6 merged weights were quantised again") as caught:
        model.merge_adapter()
    assert "base='dequantized'" in str(caught[0].message)
    changed = [n for n, q in model.named_parameters() if n in stored and not torch.equal(q, stored[n])]
    assert len(changed) == 6
    model.unmerge_adapter()
    assert all(torch.equal(q, stored[n]) for n, q in model.named_parameters() if n in stored)
    assert torch.equal(logits(model), before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged = model.merge_and_unload()
    assert sum(type(q).__name__ == "Params4bit" for q in merged.parameters()) == 14
    assert (logits(merged) - before).norm() < 0.5 * before.norm()


def test_a_retrained_bias_is_merged_once(folder: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only", init_lora_weights=False)
    model: Any = get_peft_model(loaded(folder), config)
    for n, q in model.named_parameters():
        if q.requires_grad and "bias" in n:
            q.data += 0.5
    before = logits(model)
    model.base_model.set_adapter("default")
    torch.testing.assert_close(logits(model.merge_and_unload(base="dequantized")), before, rtol=1e-4, atol=1e-4)


def test_unknown_bases_and_lost_originals_change_nothing(folder: Path, tmp_path: Path) -> None:
    model = adapted(folder)
    before = logits(model)
    with pytest.raises(ValueError, match="dequantized"):
        model.merge_and_unload(base="dequantised")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        model.merge_and_unload(base="original", original=str(tmp_path))
    assert torch.equal(logits(model), before)
