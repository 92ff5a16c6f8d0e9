"""Prompts and adapters of weights in one model: they act together, in any order of coming, and each is what it is by itself."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import inlay

IDS = torch.arange(3, 23).view(4, 5)
WEIGHTS: dict[str, Any] = {
    "lora": lambda: inlay.LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False, seed=1, task_type="CAUSAL_LM"),
    "oft": lambda: inlay.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], init_weights=False, task_type="CAUSAL_LM"),
}
PROMPTS: dict[str, Any] = {
    "prompt": lambda: inlay.PromptTuningConfig(num_virtual_tokens=3, seed=2, task_type="CAUSAL_LM"),
    "prefix": lambda: inlay.PrefixTuningConfig(num_virtual_tokens=2, seed=3, task_type="CAUSAL_LM"),
    "network": lambda: inlay.PromptEncoderConfig(num_virtual_tokens=4, encoder_hidden_size=8, seed=4, task_type="CAUSAL_LM"),
}


def together(bases: Any, *names: str) -> Any:
    configs = {**WEIGHTS, **PROMPTS}
    torch.manual_seed(0)
    model: Any = inlay.get_peft_model(bases["llama"][1](), configs[names[0]](), names[0], mixed=True)
    for name in names[1:]:
        model.add_adapter(name, configs[name]())
    return model.eval()


def logits(model: Any, *names: str, **inputs: Any) -> Tensor:
    with torch.no_grad(), model.use_adapters(*names):
        return model(**{"input_ids": IDS, **inputs}).logits


def reference(bases: Any, weight: str, prompt: str) -> Tensor:
    """The prompt alone, on a base into which the other adapter is merged."""
    torch.manual_seed(0)
    base = inlay.get_peft_model(bases["llama"][1](), WEIGHTS[weight]()).merge_and_unload()
    model = inlay.get_peft_model(base, PROMPTS[prompt]()).eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.parametrize("prompt", list(PROMPTS))
@pytest.mark.parametrize("weight", list(WEIGHTS))
def test_both_act(weight: str, prompt: str, bases: Any) -> None:
    expected = reference(bases, weight, prompt)
    for names in ((weight, prompt), (prompt, weight)):
        model = together(bases, *names)
        model.set_adapter([weight, prompt])
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(logits(model, weight), expected[:, -5:], atol=1e-3)
        assert not torch.allclose(logits(model, prompt)[:, -5:], expected[:, -5:], atol=1e-3)
        with torch.no_grad(), model.disable_adapter():
            torch.testing.assert_close(model(input_ids=IDS).logits, logits(model))


@pytest.mark.parametrize("first", ["lora", "prompt"])
def test_rows(first: str, bases: Any) -> None:
    names = [first, *({"lora", "oft", "prompt", "prefix"} - {first})]
    model = together(bases, *sorted(names, key=lambda n: n != first))
    rows = [("lora", "prompt"), "prompt", "oft", ("prefix", "lora")]
    with torch.no_grad():
        mixed = model(input_ids=IDS, adapter_names=rows).logits
    for i, row in enumerate(rows):
        single = logits(model, *((row,) if isinstance(row, str) else row), input_ids=IDS[i : i + 1])[0]
        torch.testing.assert_close(mixed[i, -len(single) :], single, rtol=1e-5, atol=1e-5)


def test_generation(bases: Any) -> None:
    model, options = together(bases, "lora", "prompt", "oft"), {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    rows = [("lora", "prompt"), "oft", "__base__", "prompt"]
    mixed = model.generate(input_ids=IDS, adapter_names=rows, **options)
    for i, row in enumerate(rows):
        with model.use_adapters(*(() if row == "__base__" else (row,) if isinstance(row, str) else row)):
            assert torch.equal(mixed[i], model.generate(input_ids=IDS[i : i + 1], **options)[0])


@pytest.mark.parametrize("names", [("lora", "prompt"), ("prompt", "lora")])
def test_files(names: tuple[str, str], bases: Any, tmp_path: Path) -> None:
    """Each file is what it is in a model of its own, and both go into one model again."""
    model = together(bases, *names)
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    again: Any = inlay.PeftModel.from_pretrained(bases["llama"][1](), tmp_path / names[1], names[1])
    again.load_adapter(tmp_path / names[0], names[0])
    assert torch.equal(logits(again, "lora", "prompt"), logits(model, "lora", "prompt"))
    torch.manual_seed(0)
    import peft

    for name in names:
        torch.manual_seed(0)
        theirs = peft.PeftModel.from_pretrained(bases["llama"][1](), str(tmp_path / name)).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(input_ids=IDS).logits, logits(model, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("names", [("lora", "prompt"), ("prompt", "lora")])
def test_training_reaches_both(names: tuple[str, str], bases: Any) -> None:
    model = together(bases, *names)
    model.set_adapter(list(names))
    model.set_requires_grad(list(names))
    trained = {n for n, q in model.named_parameters() if q.requires_grad}
    assert {n for n in trained if "prompt_encoder" in n}
    assert {n for n in trained if "lora_A" in n}
    before = copy.deepcopy(dict(model.named_parameters()))
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=0.1)
    model.train()(input_ids=IDS, labels=IDS).loss.backward()
    optimizer.step()
    assert {n for n, q in model.named_parameters() if not torch.equal(q, before[n])} == trained


@pytest.mark.parametrize("names", [("lora", "prompt"), ("prompt", "lora")])
def test_merging_takes_the_weights_alone(names: tuple[str, str], bases: Any) -> None:
    model = together(bases, *names)
    model.set_adapter(list(names))
    expected = logits(model, "lora", "prompt")
    model.merge_adapter()
    torch.testing.assert_close(logits(model, "lora", "prompt"), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert torch.equal(logits(model, "lora", "prompt"), expected)
    with pytest.raises(ValueError, match=r"'prompt' \(PROMPT_TUNING\) acts on inputs and cannot be merged"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"'prompt' \(PROMPT_TUNING\) acts on inputs; only adapters of weights have a strength"):
        model.set_scale("prompt", 0.5)
    model.set_scale("lora", 0.0)
    torch.testing.assert_close(logits(model, "lora", "prompt"), logits(model, "prompt"))
    model.set_scale("lora", 1.0)
    alone = logits(model, "lora")
    torch.testing.assert_close(model.merge_and_unload(adapter_names=["lora"])(input_ids=IDS).logits, alone, rtol=1e-5, atol=1e-5)
    # Whoever asks afterwards gets an answer and no error.
    assert not model._is_prompt_learning
    assert isinstance(hasattr(model, "merge_adapter"), bool)


def test_one_goes_and_the_other_stays(bases: Any) -> None:
    model = together(bases, "prompt", "lora")
    lora, prompt = logits(model, "lora"), logits(model, "prompt")
    model.delete_adapter("prompt")
    assert torch.equal(logits(model, "lora"), lora)
    model.add_adapter("prompt", PROMPTS["prompt"]())
    assert torch.equal(logits(model, "prompt"), prompt)
    model.delete_adapter("lora")
    assert torch.equal(logits(model, "prompt"), prompt)
