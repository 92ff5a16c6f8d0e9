"""QLoRA as users do it: a model that transformers has quantised by bitsandbytes, trained by its Trainer, saved, loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

from .tiny import INPUT_IDS, llama, logits, losses, tokenizer, trained, values

IN_4_BITS = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}


def loaded(folder: Path, **options: Any) -> Any:
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**options), device_map="cpu", dtype=torch.float32
    )
    # On some CPUs the library packs weights at the first inference, and passes no gradient from then on.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model


def run(base: Path, folder: Path, checkpointing: bool, **options: Any) -> dict[str, Any]:
    model = prepare_model_for_kbit_training(loaded(base, **options), use_gradient_checkpointing=checkpointing)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
    set_peft_model_state_dict(model, values(get_peft_model_state_dict(model)))
    rows = INPUT_IDS.repeat(8, 1).tolist()
    arguments = TrainingArguments(
        str(folder / "run"), per_device_train_batch_size=2, max_steps=6, learning_rate=1e-2, logging_steps=1, report_to="none",
        use_cpu=True, bf16=False, seed=3, disable_tqdm=True, save_strategy="no", gradient_checkpointing=checkpointing,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}))
    trainer.train()
    model.save_pretrained(folder / "adapter")
    again = PeftModel.from_pretrained(loaded(base, **options), folder / "adapter")
    found, here = logits(again), logits(model)
    assert max(abs(a - b) for a, b in zip(found, here, strict=True)) < 1e-4
    return {"losses": losses(trainer), "trained": trained(model), "counts": list(model.get_nb_trainable_parameters()), "logits": found}


def with_trl(base: Path, folder: Path, optimizer: str) -> dict[str, Any]:
    """TRL's trainer is given the quantised model and a configuration, and does all else itself."""
    from trl import SFTConfig, SFTTrainer

    rows = INPUT_IDS.repeat(8, 1).tolist()
    arguments = SFTConfig(
        str(folder), per_device_train_batch_size=2, max_steps=5, learning_rate=1e-2, logging_steps=1, report_to="none", use_cpu=True,
        bf16=False, seed=3, disable_tqdm=True, save_strategy="no", gradient_checkpointing=True, max_length=None, optim=optimizer,
        dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    trainer = SFTTrainer(
        loaded(base, **IN_4_BITS), arguments, train_dataset=Dataset.from_dict({"input_ids": rows, "labels": rows}),
        processing_class=tokenizer(), peft_config=LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )  # fmt: skip
    model: Any = trainer.model
    set_peft_model_state_dict(model, values(get_peft_model_state_dict(model)))
    trainer.train()
    found = losses(trainer)
    assert found[-1] < found[0] - 0.1, found
    return {"losses": found, "trained": trained(model), "logits": logits(model)}


def main(folder: Path) -> dict[str, Any]:
    base = folder / "base"
    llama(hidden_size=64, intermediate_size=128).save_pretrained(base)
    result = {}
    for name, options in (("nf4", IN_4_BITS), ("int8", {"load_in_8bit": True})):
        for checkpointing in (False, True):
            got = run(base, folder / f"{name}-{checkpointing}", checkpointing, **options)
            result |= {f"{name} {checkpointing} {key}": value for key, value in got.items()}
    for optimizer in ("adamw_torch", "adamw_8bit", "paged_adamw_8bit"):
        got = with_trl(base, folder / optimizer, optimizer)
        result |= {f"trl {optimizer} {key}": value for key, value in got.items()}
    return result
