"""LLaMA-Adapter against HF peft."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import inlay

SIZES = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
SPREAD = {"initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
BASES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES, **SPREAD)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES, **SPREAD, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=64, n_embd=32, n_layer=3, n_head=4, n_positions=64, **SPREAD)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, **SPREAD, num_key_value_heads=2, head_dim=16)),
}
IDS = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))


def base(name):
    torch.manual_seed(0)
    return BASES[name]().eval()


def wrapped(library, name, **options):
    config = library.AdaptionPromptConfig(task_type="CAUSAL_LM", **{"adapter_len": 4, "adapter_layers": 2} | options)
    return library.get_peft_model(base(name), config).eval()


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    for q in model.parameters():
        if q.requires_grad:
            q.data.normal_(generator=generator)
    return model


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt2"])
def test_both_ways_and_five_steps(name, tmp_path):
    theirs = randomised(wrapped(peft, name))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(base(name), tmp_path / "theirs", is_trainable=True).eval()
    expected = theirs(IDS).logits
    assert (ours(IDS).logits - expected).abs().max() < 1e-5
    assert (base(name)(IDS).logits - expected).abs().max() > 1e-2
    with ours.disable_adapter():
        assert torch.equal(ours(IDS).logits, base(name)(IDS).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(name), tmp_path / "ours").eval()
    assert (again(IDS).logits - expected).abs().max() < 1e-5
    mine, other = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    assert mine | {"base_model_name_or_path": None, "inference_mode": True} == other | {"base_model_name_or_path": None}
    options = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    assert torch.equal(ours.generate(**options), theirs.generate(**options))
    losses = []
    for model in (ours, theirs):
        optimiser = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-2)
        losses.append([])
        for _ in range(5):
            loss = model(input_ids=IDS, labels=IDS).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("name", BASES)
def test_it_starts_as_the_base_in_the_last_blocks(name):
    options = {"target_modules": "self_attn"} if name == "qwen3" else {}
    model = wrapped(inlay, name, **options)
    assert torch.equal(model(IDS).logits, base(name)(IDS).logits)
    trained = [n for n, q in model.named_parameters() if q.requires_grad]
    assert len(trained) == 4
    assert all(".1." in n or ".2." in n for n in trained)
    randomised(model)
    assert (model(IDS).logits - base(name)(IDS).logits).abs().max() > 1e-3
    with pytest.raises(ValueError, match="adapter_layers=9, and the base has 3"):
        wrapped(inlay, name, adapter_layers=9, **options)
    with pytest.raises(ValueError, match="adapter_len=None: say how many"):
        wrapped(inlay, name, adapter_len=None, **options)


GREEDY = {"attention_mask": torch.ones_like(IDS), "max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_several_adapters_rows_and_cached_generation(name):
    """HF peft has one adapter at a time; prompts that act together add what each of them finds."""
    model = randomised(wrapped(inlay, name))
    model.add_adapter("b", inlay.AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=3, adapter_layers=1, seed=5))
    model.set_adapter("b")
    randomised(model)
    found, texts = {}, {}
    for names in ((), ("default",), ("b",), ("default", "b"), ("b", "default")):
        with model.use_adapters(*names):
            found[names] = model(IDS).logits
            texts[names] = model.generate(input_ids=IDS, **GREEDY)
            assert torch.equal(model.generate(input_ids=IDS, **GREEDY, use_cache=False), texts[names])
            assert torch.equal(model.generate(input_ids=IDS, **GREEDY, cache_implementation="static"), texts[names])
    assert (found["default",] - found["b",]).abs().max() > 1e-2
    assert (found["default", "b"] - found["b",]).abs().max() > 1e-2
    assert (found["default", "b"] - found["b", "default"]).abs().max() < 1e-5
    for rows in (["b", "__base__", "default"], [("default", "b"), "b", ("default", "b")]):
        mixed, generated = model(IDS, adapter_names=rows).logits, model.generate(input_ids=IDS, **GREEDY, adapter_names=rows)
        for i, row in enumerate(rows):
            names = () if row == "__base__" else (row,) if isinstance(row, str) else row
            assert (mixed[i] - found[names][i]).abs().max() < 1e-5
            assert torch.equal(generated[i], texts[names][i])
    beams = model.generate(input_ids=IDS, **GREEDY, num_beams=2, adapter_names=["b", "default", "b"])
    with model.use_adapters("default"):
        assert torch.equal(beams[1], model.generate(input_ids=IDS, **GREEDY, num_beams=2)[1])


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_attentions_own_products_serve_both(name):
    """What comes of the input and what goes to the output is multiplied once; with a hook on its layer each is multiplied apart."""
    model = randomised(wrapped(inlay, name))
    first, last = (model.get_base_model().model.layers[2].self_attn.get_submodule(n) for n in ("q_proj", "o_proj"))
    prompts = [q for q in model.parameters() if q.requires_grad]

    def run():
        with FlopCounterMode(display=False) as flops:
            logits = model(IDS).logits
        return logits, torch.autograd.grad(logits.square().sum(), prompts), flops.get_total_flops()

    together, gradients, least = run()
    hook = last.register_forward_hook(lambda *_: None)
    apart, gradients_apart, most = run()
    hook.remove()
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5)
    for one, other in zip(gradients, gradients_apart, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))
    assert most - least == 2 * IDS.numel() * (first.weight.numel() + last.weight.numel())


def test_modules_that_are_left_out_do_not_count():
    model = wrapped(inlay, "llama", exclude_modules=["model.layers.2.self_attn"])
    assert {n.split(".")[4] for n, q in model.named_parameters() if q.requires_grad} == {"0", "1"}
    assert model.peft_config["default"].exclude_modules == {"model.layers.2.self_attn"}
    told = inlay.explain_targets(base("llama"), inlay.AdaptionPromptConfig(adapter_len=4, adapter_layers=1))
    assert told.matched == ["model.layers.2.self_attn"]
    assert told.excluded["model.layers.0.self_attn"] == "AdaptionPromptConfig takes 1 of the 3 that match"
