"""transformers by itself: its Trainer, and adapters in a model without any wrapper."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    HRAConfig,
    IA3Config,
    LoraConfig,
    OFTConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments, pipeline

from .tiny import INPUT_IDS, llama, logits, losses, sentences, tokenizer, trained, values

TARGETS = ["q_proj", "v_proj", "down_proj"]


def fill(model: Any, name: str, seed: int) -> None:
    set_peft_model_state_dict(model, values(get_peft_model_state_dict(model, adapter_name=name), seed), name)


def train(model: Any, folder: Path, resume: bool = False) -> Trainer:
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer()(sentences(32))["input_ids"]]
    arguments = TrainingArguments(
        str(folder), max_steps=6, save_steps=3, logging_steps=1, per_device_train_batch_size=4, learning_rate=1e-2,
        report_to="none", use_cpu=True, seed=3, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)  # type: ignore[arg-type]
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def wrapped(folder: Path) -> dict[str, Any]:
    """The Trainer with a `PeftModel`, in one go and interrupted; checkpointed activations; two adapters."""

    def start(**options: Any) -> Any:
        model = get_peft_model(llama(), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM", **options))
        fill(model, "default", 1)
        return model

    trainer = train(start(), folder / "trainer")
    shutil.rmtree(folder / "trainer" / "checkpoint-6")
    resumed = train(start(), folder / "trainer", resume=True)
    assert losses(resumed) == losses(trainer)
    assert logits(resumed.model) == logits(trainer.model)

    two = start()
    two.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    fill(two, "other", 2)
    two.set_adapter("other")
    before = logits(two)
    other = train(two, folder / "two")
    shutil.rmtree(folder / "two" / "checkpoint-6")
    again = start()
    again.add_adapter("other", LoraConfig(r=2, target_modules=["o_proj"], task_type="CAUSAL_LM"))
    again.set_adapter("other")
    assert losses(train(again, folder / "two", resume=True)) == losses(other)

    checkpointed = start()
    checkpointed.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    checkpointed.enable_input_require_grads()
    return {
        "trainer": losses(trainer), "trainer trained": trained(trainer.model), "trainer logits": logits(trainer.model),
        "two before": before, "two": losses(other), "two trained": trained(two), "checkpointed": losses(train(checkpointed, folder / "c")),
    }  # fmt: skip


def injected(folder: Path) -> dict[str, Any]:
    """`add_adapter` and its kin."""
    model = llama()
    base = logits(model)
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), "a")
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj", "o_proj"], use_rslora=True), "b")
    fill(model, "a", 1)
    fill(model, "b", 2)
    result: dict[str, Any] = {"b": logits(model), "b trained": trained(model), "active": model.active_adapters()}
    model.set_adapter("a")
    result |= {"a": logits(model), "a trained": trained(model)}
    model.set_adapter(["a", "b"])
    result |= {"both": logits(model), "both active": model.active_adapters()}
    model.disable_adapters()
    assert logits(model) == base
    model.enable_adapters()
    assert logits(model) == result["both"]
    model.set_adapter("a")
    result["keys"] = sorted(model.get_adapter_state_dict())
    model.base_model_name_or_path = "nowhere"
    model.save_pretrained(folder / "a")
    result["files"] = sorted(p.name for p in (folder / "a").iterdir())
    loaded = llama()
    loaded.load_adapter(str(folder / "a"))
    assert logits(loaded) == result["a"]
    assert not trained(loaded)
    assert logits(PeftModel.from_pretrained(llama(), folder / "a")) == result["a"]
    trainable = llama()
    trainable.load_adapter(str(folder / "a"), adapter_name="t", is_trainable=True)
    result["loaded to train"] = len([n for n, q in trainable.named_parameters() if q.requires_grad and ".t" in n])

    result["layers"] = sum(isinstance(m, LoraLayer) and isinstance(m, BaseTunerLayer) for m in model.modules())
    model.delete_adapter("a")
    assert logits(model) == result["b"]
    assert list(model.peft_config) == ["b"]
    model.delete_adapter("b")
    assert logits(model) == base
    assert not hasattr(model, "peft_config")
    model.add_adapter(LoraConfig(r=4, target_modules=TARGETS), "a")
    fill(model, "a", 1)
    assert logits(model) == result["a"]

    fresh = llama()
    fresh.add_adapter(LoraConfig(r=4, target_modules=TARGETS))
    fill(fresh, "default", 1)
    result["trained in place"] = losses(train(fresh, folder / "injected"))
    saved = llama()
    saved.load_adapter(str(folder / "injected" / "checkpoint-6"))
    assert logits(saved) == logits(fresh)
    return result


def by_path(folder: Path) -> dict[str, Any]:
    """`from_pretrained` and `pipeline` with the folder of an adapter."""
    llama().save_pretrained(folder / "base")
    tokenizer().save_pretrained(folder / "base")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "base"), LoraConfig(r=4, target_modules=TARGETS))
    fill(model, "default", 1)
    model.save_pretrained(folder / "tuned")
    tokenizer().save_pretrained(folder / "tuned")
    loaded = AutoModelForCausalLM.from_pretrained(folder / "tuned")
    assert logits(loaded) == logits(model)
    generate = pipeline("text-generation", model=str(folder / "tuned"), device="cpu")
    text = generate("w1 w2 w3", max_new_tokens=8, do_sample=False)[0]["generated_text"]
    return {"from the folder": logits(loaded), "generated": text}


def methods(folder: Path) -> dict[str, Any]:
    """transformers' own loading for everything that a file can hold."""
    cases = {
        "dora": LoraConfig(r=4, target_modules=TARGETS, use_dora=True),
        "bias": LoraConfig(r=4, target_modules=TARGETS, lora_bias=True),
        "head": LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"]),
        "embedding": LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
        "tokens": LoraConfig(r=4, target_modules=TARGETS, trainable_token_indices={"embed_tokens": [5, 9]}),
        "ia3": IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
        "oft": OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"], bias="none"),
        "hra": HRAConfig(r=4, target_modules=["q_proj", "v_proj"]),
    }
    result: dict[str, Any] = {}
    for name, config in cases.items():
        model = get_peft_model(llama(), config)
        fill(model, "default", 3)
        expected = logits(model)
        model.save_pretrained(folder / name)
        result[name] = expected
        result[f"{name} wrappers"] = sum(isinstance(m, ModulesToSaveWrapper) for m in model.modules())
        if "inlay" not in sys.modules:
            # HF's own way through transformers loses some of them (DoRA's magnitudes, ...).
            continue
        loaded = llama()
        report = loaded.load_adapter(str(folder / name), adapter_name="x")
        assert not report.missing_keys, (name, report)
        assert not report.unexpected_keys, (name, report)
        assert logits(loaded) == expected, name
        assert not trained(loaded)
    return result


def experts(folder: Path) -> dict[str, Any]:
    """Stacks of experts: two adapted parameters of one module."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        num_local_experts=3, num_experts_per_tok=2, max_position_embeddings=64,
    )  # fmt: skip
    base = MixtralForCausalLM(config).eval()
    state = {k: t.clone() for k, t in base.state_dict().items()}

    def fresh() -> Any:
        made = MixtralForCausalLM(config).eval()
        made.load_state_dict(state)
        return made

    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = get_peft_model(fresh(), LoraConfig(r=2, target_modules=["q_proj"], target_parameters=targets))
    fill(model, "default", 4)
    expected = logits(model)
    model.save_pretrained(folder / "experts")
    loaded = fresh()
    if "adapter_state_dict_load_map" in loaded.load_adapter.__code__.co_names:
        report = loaded.load_adapter(str(folder / "experts"))
        assert not report.missing_keys | report.unexpected_keys, report
    else:
        # An older transformers cannot tell the parameters of one module apart.
        if "inlay" in sys.modules:
            with pytest.raises(ValueError, match="newer transformers"):
                loaded.load_adapter(str(folder / "experts"))
        loaded = PeftModel.from_pretrained(fresh(), folder / "experts")
    torch.testing.assert_close(loaded(INPUT_IDS).logits[0, -1], torch.tensor(expected))
    return {"experts": expected}


def main(folder: Path) -> dict[str, Any]:
    return wrapped(folder) | injected(folder) | by_path(folder) | methods(folder) | experts(folder)
