"""TRL, unchanged: supervised fine-tuning with a `peft_config`, going on from a checkpoint, preferences with a reference adapter."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from .tiny import llama, logits, losses, sentences, tokenizer, trained, values

COMMON = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "seed": 3,
    "disable_tqdm": True,
    "max_length": 32,
    "max_steps": 6,
}


def config(**options: Any) -> LoraConfig:
    return LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM", **options)


def supervised(folder: Path, resume: bool, **options: Any) -> SFTTrainer:
    rows = Dataset.from_dict({"text": sentences(32)})
    arguments = SFTConfig(output_dir=str(folder), save_steps=3, **COMMON)
    trainer = SFTTrainer(llama(), args=arguments, train_dataset=rows, processing_class=tokenizer(), peft_config=config(**options))
    set_peft_model_state_dict(trainer.model, values(get_peft_model_state_dict(trainer.model)))
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def preferences(folder: Path, model: Any, **options: Any) -> DPOTrainer:
    chosen, rejected = sentences(16, 1), sentences(16, 2)
    rows = Dataset.from_dict({"prompt": sentences(16, 3), "chosen": chosen, "rejected": rejected})
    arguments = DPOConfig(output_dir=str(folder), save_strategy="no", **COMMON)
    trainer = DPOTrainer(model, args=arguments, train_dataset=rows, processing_class=tokenizer(), **options)
    if options:
        set_peft_model_state_dict(trainer.model, values(get_peft_model_state_dict(trainer.model)))
    trainer.train()
    return trainer


def main(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = {}
    trainer = supervised(folder / "sft", resume=False)
    result["sft"] = losses(trainer)
    result["trained"] = trained(trainer.model)
    result["logits"] = logits(trainer.model)
    trainer.save_model(str(folder / "adapter"))
    reloaded = PeftModel.from_pretrained(llama(), folder / "adapter")
    assert logits(reloaded) == result["logits"]
    result["merged"] = logits(reloaded.merge_and_unload())

    shutil.rmtree(folder / "sft" / "checkpoint-6")
    again = supervised(folder / "sft", resume=True)
    assert losses(again) == result["sft"], (losses(again), result["sft"])
    assert logits(again.model) == result["logits"]

    head = supervised(folder / "head", resume=False, modules_to_save=["lm_head"])
    result["head"], result["head trained"] = losses(head), trained(head.model)

    fresh = preferences(folder / "dpo", llama(), peft_config=config())
    result["dpo"] = losses(fresh)
    tuned = get_peft_model(llama(), config())
    set_peft_model_state_dict(tuned, values(get_peft_model_state_dict(tuned)))
    trainer = preferences(folder / "ref", tuned)
    assert sorted(trainer.model.peft_config) == ["default", "ref"]
    result["dpo with reference"], result["dpo trained"] = losses(trainer), trained(trainer.model)
    parameters = dict(trainer.model.named_parameters())
    moved = [n for n in parameters if ".default." in n and not parameters[n].equal(parameters[n.replace(".default.", ".ref.")])]
    result["moved"] = len(moved)
    return result
