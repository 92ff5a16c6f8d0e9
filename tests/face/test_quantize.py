"""Quantised models: modules and names stay, files go both ways with bitsandbytes, adapters train on them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

import inlay
from inlay.kernels.quantised_tensor import QuantizedTensor
from inlay.quantize import quantizable

from ..tiny import VOCAB, llama, mixtral

IDS = torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(7)
    config = GPT2Config(
        n_layer=2, n_embd=64, n_head=4, vocab_size=VOCAB, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0, bos_token_id=0, eos_token_id=0
    )
    return GPT2LMHeadModel(config).eval()


def wider_llama() -> LlamaForCausalLM:
    """Rows shorter than a block bitsandbytes' kernel for the CPU restores with the scales of other blocks."""
    return llama(hidden_size=64, intermediate_size=128, num_key_value_heads=4)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(IDS).logits


def bnb_4bit(**options: Any) -> BitsAndBytesConfig:
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, **options)


# ---- in place -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("to", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_flush_and_back(build: Any, to: str) -> None:
    dense = build()
    model = inlay.quantize_(copy.deepcopy(dense), to)
    names = quantizable(dense)
    assert names
    assert [(n, type(m)) for n, m in model.named_modules()] == [(n, type(m)) for n, m in dense.named_modules()]
    assert [(n, q.shape, q.dtype) for n, q in model.named_parameters()] == [(n, q.shape, q.dtype) for n, q in dense.named_parameters()]
    assert {n for n, q in model.named_parameters() if isinstance(q, QuantizedTensor)} == set(names)
    y = logits(model)
    assert 1e-4 < (y - logits(dense)).norm() / logits(dense).norm() < 0.3
    back = inlay.dequantize_(copy.deepcopy(model))
    torch.testing.assert_close(logits(back), y, rtol=1e-5, atol=1e-6)
    assert list(back.state_dict()) == list(dense.state_dict())
    assert not any(isinstance(q, QuantizedTensor) for q in back.parameters())
    assert not hasattr(back.config, "quantization_config")
    for module in back.modules():
        assert not module._state_dict_hooks


@pytest.mark.parametrize("to", ["nf4", "int4", "int8"])
@pytest.mark.parametrize("build", [llama, gpt2, mixtral])
def test_state_dicts(build: Any, to: str, tmp_path: Path) -> None:
    model = inlay.quantize_(build(), to, skip=[])
    other = build()
    for q in other.parameters():
        nn.init.normal_(q)
    other = inlay.quantize_(other, to, skip=[])
    state = {n: t.clone() for n, t in model.state_dict().items()}
    assert not any(isinstance(t, QuantizedTensor) for t in state.values())
    save_file(state, tmp_path / "model.safetensors")
    assert not torch.equal(logits(other), logits(model))
    other.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(logits(other), logits(model))
    # Of another format, and of none.
    if to == "nf4":
        other = inlay.quantize_(build(), "fp4", skip=[])
        other.load_state_dict(state)
        assert torch.equal(logits(other), logits(model))
        other.load_state_dict(build().state_dict())
        assert torch.equal(logits(other), logits(model))


def test_ties_stay() -> None:
    model = inlay.quantize_(llama(tie_word_embeddings=True), skip=[])
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert isinstance(model.lm_head.weight, QuantizedTensor)
    torch.testing.assert_close(logits(inlay.dequantize_(copy.deepcopy(model))), logits(model), rtol=1e-5, atol=1e-6)


def test_what_stays() -> None:
    names = quantizable(llama())
    assert len(names) == 14
    assert "lm_head.weight" not in names
    assert set(quantizable(llama(), ["down_proj", "layers.0.self_attn", "embed_tokens"])) >= {"lm_head.weight"}
    assert not [n for n in quantizable(llama(), ["down_proj", r"layers\.0\.self_attn"]) if "down_proj" in n or "0.self_attn" in n]
    with pytest.raises(ValueError, match="fits no module"):
        inlay.quantize_(llama(), skip=["q_porj"])
    with pytest.raises(ValueError, match="'nf5'"):
        inlay.quantize_(llama(), "nf5")
    model: Any = inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="has adapters"):
        inlay.quantize_(model)


# ---- files --------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("to", ["nf4", "fp4"])
@pytest.mark.parametrize("build", [wider_llama, gpt2])
def test_files_of_bitsandbytes_both_ways(build: Any, to: str, double: bool, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path / "dense")
    ours = inlay.from_pretrained_quantized(tmp_path / "dense", to, double=double)
    config = bnb_4bit(bnb_4bit_quant_type=to, bnb_4bit_use_double_quant=double)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", quantization_config=config)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    for name, tensor in theirs.state_dict().items():
        if "quant_state" not in name:
            assert torch.equal(ours.state_dict()[name], tensor), name
    y = logits(ours)
    # For inference bitsandbytes packs weights in another way on some CPUs, and rounds the scales by that.
    torch.testing.assert_close(logits(theirs.train()), y, rtol=1e-4, atol=1e-5)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(inlay.from_pretrained_quantized(tmp_path / folder)), y)
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert "Linear4bit" in {type(m).__name__ for m in read.modules()}
    torch.testing.assert_close(logits(read.train()), y, rtol=1e-4, atol=1e-5)


def test_files_in_eight_bits_and_of_our_own(tmp_path: Path) -> None:
    for to in ("int8", "int4"):
        model = inlay.quantize_(llama(), to)
        model.save_pretrained(tmp_path / to)
        again = inlay.from_pretrained_quantized(tmp_path / to)
        assert torch.equal(logits(again), logits(model))
        assert again.config.quantization_config["quant_method"] == ("bitsandbytes" if to == "int8" else "inlay")
    read: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "int8")
    codes = inlay.from_pretrained_quantized(tmp_path / "int8").model.layers[0].mlp.up_proj.weight.codes
    assert torch.equal(read.model.layers[0].mlp.up_proj.weight.data, codes)
    with pytest.raises(ValueError, match="already"):
        inlay.from_pretrained_quantized(tmp_path / "int8", "nf4")
    llama().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="say to what"):
        inlay.from_pretrained_quantized(tmp_path / "dense")


def test_each_tensor_is_quantised_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are merged from the file's single ones first; no two dense weights are there at a time."""
    dense = mixtral()
    dense.save_pretrained(tmp_path)
    seen: list[str] = []
    of = QuantizedTensor.of.__func__  # type: ignore[attr-defined]
    monkeypatch.setattr(QuantizedTensor, "of", classmethod(lambda cls, w, *a, **k: seen.append(str(tuple(w.shape))) or of(cls, w, *a, **k)))
    streamed = inlay.from_pretrained_quantized(tmp_path, "nf4", dtype=torch.float32)
    assert len(seen) == len(quantizable(dense))
    assert torch.equal(logits(streamed), logits(inlay.quantize_(dense, "nf4")))
    assert isinstance(streamed.model.layers[0].mlp.experts.gate_up_proj, QuantizedTensor)


@pytest.mark.parametrize("to", ["nf4", "int8", "int4"])
@pytest.mark.parametrize("skip", [None, ["down_proj", "lm_head", "embed_tokens"], ["0.mlp.experts.down_proj"]], ids=str)
@pytest.mark.parametrize("in_memory", [True, False])
def test_files_of_experts(skip: Any, to: str, in_memory: bool, tmp_path: Path) -> None:
    """Stacks are in the file under the model's own names, with the ends that linear layers have."""
    dense = mixtral()
    dense.save_pretrained(tmp_path / "dense")
    model: Any = inlay.quantize_(dense, to, skip=skip) if in_memory else inlay.from_pretrained_quantized(tmp_path / "dense", to, skip=skip)
    y = logits(model)
    for source, target in (("a", "b"), ("b", "c")):  # saved again after it was read
        (model if source == "a" else inlay.from_pretrained_quantized(tmp_path / "b")).save_pretrained(tmp_path / target)
        again = inlay.from_pretrained_quantized(tmp_path / target)
        assert torch.equal(logits(again), y)
        kinds = {n: type(q) for n, q in model.named_parameters()}
        assert {n: type(q) for n, q in again.named_parameters()} == kinds
    keys = set(load_file(tmp_path / "c" / "model.safetensors"))
    stack = "experts.gate_up_proj"
    assert any(k.endswith(f"{stack}.SCB" if to == "int8" else f"{stack}.absmax") for k in keys)
    assert again.config.quantization_config["quant_method"] == "inlay"
    # Dense again, the file is one of single experts, as transformers writes it.
    inlay.dequantize_(again).save_pretrained(tmp_path / "d")
    assert any(k.endswith("experts.0.w1.weight") for k in load_file(tmp_path / "d" / "model.safetensors"))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "d")), y, rtol=1e-5, atol=1e-6)


# ---- adapters -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_dropout": 0.2}], ids=str)
def test_training_is_that_on_the_dequantised_model(options: dict[str, Any]) -> None:
    def losses(model: LlamaForCausalLM) -> list[float]:
        config = inlay.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, seed=3, **options)
        peft: Any = inlay.get_peft_model(model, config).train()
        optimizer = torch.optim.SGD([q for q in peft.parameters() if q.requires_grad], lr=0.1)
        found = []
        torch.manual_seed(5)
        for _ in range(3):
            loss = peft(IDS.repeat(8, 8), labels=IDS.repeat(8, 8)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return found

    quantised = inlay.quantize_(llama())
    dense = inlay.dequantize_(copy.deepcopy(quantised))
    ours, theirs = losses(quantised), losses(dense)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert ours[2] < ours[0]


def test_adapters_come_and_go_and_merge() -> None:
    base = inlay.quantize_(llama())
    before = base.state_dict()
    model: Any = inlay.get_peft_model(base, inlay.LoraConfig(target_modules="all-linear", init_lora_weights=False))
    y = logits(model)
    with pytest.warns(UserWarning, match="quantised again"):
        model.merge_adapter()
    assert isinstance(model.get_base_model().model.layers[0].mlp.up_proj.weight, QuantizedTensor)
    assert 0 < (logits(model) - y).norm() / y.norm() < 0.5
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    bare = model.unload()
    assert all(torch.equal(t, before[n]) for n, t in bare.state_dict().items())


EXPERTS = [f"model.layers.{i}.mlp.experts.{name}" for i in range(2) for name in ("gate_up_proj", "down_proj")]


@pytest.mark.parametrize("base", ["dequantized", "original"])
@pytest.mark.parametrize("parameters", [[], EXPERTS[1::2], EXPERTS], ids=["none-adapted", "one-of-two", "all"])
def test_merging_out_leaves_no_stack_quantised(parameters: list[str], base: str, tmp_path: Path) -> None:
    """Stacks of experts become dense with the rest, be there an adapter on them, on another stack of the same module, or on neither."""
    mixtral().save_pretrained(tmp_path)
    config = inlay.LoraConfig(
        r=2, target_modules=["q_proj"], target_parameters=parameters or None, init_lora_weights=False, seed=1, lora_alpha=8
    )
    quantised = inlay.from_pretrained_quantized(tmp_path, "nf4", dtype=torch.float32)
    dense = mixtral() if base == "original" else inlay.dequantize_(copy.deepcopy(quantised))
    expected: Any = inlay.get_peft_model(dense, config)
    y = logits(expected.eval())
    assert not torch.allclose(y, logits(mixtral()), atol=1e-2)
    for out_dtype in (None, torch.bfloat16):
        model: Any = inlay.get_peft_model(copy.deepcopy(quantised), config).eval()
        merged = model.merge_and_unload(base=base, out_dtype=out_dtype, **({"original": str(tmp_path)} if base == "original" else {}))
        assert not any(isinstance(q, QuantizedTensor) for q in merged.parameters())
        assert {q.dtype for q in merged.parameters()} == {out_dtype or torch.float32}
        if out_dtype is None:
            torch.testing.assert_close(logits(merged), y, rtol=1e-4, atol=1e-4)
            for name, q in expected.merge_and_unload().named_parameters():
                torch.testing.assert_close(merged.get_parameter(name), q, rtol=1e-4, atol=1e-5)
            expected = inlay.get_peft_model(mixtral(), config)
        merged.save_pretrained(tmp_path / str(out_dtype))
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(out_dtype))
        assert torch.equal(logits(again), logits(merged))


@pytest.mark.parametrize("options", [{"lora_bias": True}, {"bias": "all"}, {"lora_bias": True, "lora_alpha": 16}], ids=str)
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_biases_are_merged_in_full(to: str, options: dict[str, Any]) -> None:
    """Of layers whose weight is quantised, with a bias of LoRA's factor B, or with their own retrained."""
    quantised = inlay.quantize_(gpt2(), to)
    config = inlay.LoraConfig(r=2, target_modules=["c_attn", "c_proj"], init_lora_weights=False, seed=1, fan_in_fan_out=True, **options)

    def adapted(base: Any) -> Any:
        model: Any = inlay.get_peft_model(copy.deepcopy(base), config)
        generator = torch.Generator().manual_seed(3)
        for name, q in model.named_parameters():
            if q.requires_grad:
                q.data += 0.2 * torch.randn(q.shape, generator=generator) * ("bias" in name)
        return model.eval()

    model, before = adapted(quantised), {n: t.clone() for n, t in quantised.state_dict().items()}
    y = logits(model)
    dense = adapted(inlay.dequantize_(copy.deepcopy(quantised)))
    torch.testing.assert_close(logits(dense), y, rtol=1e-4, atol=1e-4)
    expected = dict(dense.merge_and_unload().named_parameters())
    if "lora_bias" in options:
        b = model.get_base_model().get_parameter("transformer.h.1.mlp.c_proj.adapters.default.lora_B_bias")
        by_hand = before["transformer.h.1.mlp.c_proj.bias"] + options.get("lora_alpha", 8) / 2 * b
        torch.testing.assert_close(expected["transformer.h.1.mlp.c_proj.bias"], by_hand)
    for name, q in model.merge_and_unload(base="dequantized").named_parameters():
        torch.testing.assert_close(q, expected[name], rtol=1e-4, atol=1e-5)
    model = adapted(quantised)
    model.merge_adapter()
    for name, q in model.get_base_model().named_parameters():
        if name.endswith("bias") and "adapters" not in name:
            torch.testing.assert_close(q, expected[name], rtol=1e-5, atol=1e-6)
    model.unmerge_adapter()
    assert torch.equal(logits(model), y)
    assert all(torch.equal(t, before[n]) for n, t in model.unload().state_dict().items())


def test_compiled_with_an_adapter() -> None:
    model: Any = inlay.get_peft_model(inlay.quantize_(llama()), inlay.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    y = logits(model)
    torch.testing.assert_close(logits(torch.compile(model, backend="aot_eager")), y, rtol=1e-5, atol=1e-5)
