"""Methods that plan their budget run by themselves under transformers' Trainer, without a callback."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

import inlay
from inlay.core.inlaid import adapters_of

STEPS = 6


class Watch(TrainerCallback):
    """Notes after each step how many triplets are in the budget and how many have a value."""

    def __init__(self) -> None:
        self.masked: list[int] = []
        self.alive: list[int] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        layers: list[Any] = adapters_of(kwargs["model"], "default")
        self.masked.append(sum(sum(p.method.mask or [True] * len(p.lora_E)) for p in layers))
        self.alive.append(sum(int((p.lora_E != 0).sum()) for p in layers))


def train(model: Any, folder: Path, *callbacks: TrainerCallback) -> None:
    rows = [{"input_ids": [i, i + 1, i + 2, i + 3], "labels": [i, i + 1, i + 2, i + 3]} for i in range(2 * STEPS)]
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=STEPS, per_device_train_batch_size=2, learning_rate=0.01, report_to=[], save_strategy="no",
        disable_tqdm=True, use_cpu=True, logging_strategy="no", seed=0,
    )  # fmt: skip
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train()  # type: ignore[arg-type]


@pytest.mark.parametrize(("tinit", "tfinal"), [(1, 1), (0, 2)])
def test_adalora(tinit: int, tfinal: int, tiny_model: Any, tmp_path: Path) -> None:
    config = inlay.AdaLoraConfig(
        init_r=4, target_r=2, total_step=STEPS, tinit=tinit, tfinal=tfinal, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
    )
    model, watch = inlay.get_peft_model(copy.deepcopy(tiny_model), config), Watch()
    train(model, tmp_path, watch)
    layers = adapters_of(model, "default")
    start, end, last = 4 * len(layers), 2 * len(layers), STEPS - tfinal

    def planned(step: int) -> int:
        if step <= tinit:
            return start
        left = max(0.0, 1 - (step - tinit) / (last - tinit))
        return int((start - end) * left**3 + end)

    assert watch.masked == [planned(step) for step in range(1, STEPS + 1)]
    assert watch.alive[-1] == watch.masked[-1] == end < start
    pattern: Any = config.rank_pattern
    assert sum(map(sum, pattern.values())) == end


def test_adamss_with_and_without_the_callback(tiny_model: Any, tmp_path: Path) -> None:
    from inlay.compat.callbacks import AdamssAsaCallback

    found = []
    for callbacks in ([], [AdamssAsaCallback()]):
        config = inlay.AdamssConfig(
            r=4, num_subspaces=2, use_asa=True, asa_target_subspaces=3, init_warmup=1, final_warmup=4, mask_interval=1,
            target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM",
        )  # fmt: skip
        model = inlay.get_peft_model(copy.deepcopy(tiny_model), config)
        train(model, tmp_path, *callbacks)
        trained = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
        found.append(trained)
    # A and B of each group that is left.
    assert len(found[0]) == len(found[1]) == 2 * 3
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=0)
