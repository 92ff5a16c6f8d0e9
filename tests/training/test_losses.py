"""What a method adds to the loss, and a loss of a method's own, count in ``inlay train`` too, whose trainer makes the loss of logits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import inlay
from inlay.core.inlaid import adapters_of

from .. import tiny_chat_model
from ..tiny_chat_model import environment, rows


def losses(folder: Path, *words: str) -> list[float]:
    """Of every step of a training on the tiny model."""
    command = ["train", "rows.jsonl", "--model", "model", "--output", "run", "--overwrite", "--val-fraction", "0", "--samples", "0"]
    finished = subprocess.run(
        [sys.executable, "-m", "inlay", *command, *(() if "--epochs" in words else ("--max-steps", "2")), "--lr", "1e-9", *words],
        cwd=folder, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    found = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in found if "loss" in line]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_chat_model.save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(rows(8))
    return tmp_path


def test_adalora_pays_for_directions_that_are_not_orthogonal(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    options = {"init_r": 3, "target_r": 2, "total_step": 2, "target_modules": ["q_proj", "v_proj"]}
    words = ["--method", "adalora", "--init-r", "3", "--target-r", "2", "--total-step", "2", "--target-modules", "q_proj,v_proj"]
    plain, paid = (losses(folder, *words, "--orth-reg-weight", weight) for weight in ("1e-9", "2"))
    seed = json.loads((folder / "run" / "run.json").read_text())["settings"]["seed"]
    config = inlay.AdaLoraConfig(**options, orth_reg_weight=2.0, task_type="CAUSAL_LM", seed=seed)
    model = inlay.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "model"), config)
    with torch.no_grad():
        penalty = config.penalty(adapters_of(model.get_base_model(), "default"))
    assert penalty is not None
    assert penalty.item() > 0.1
    assert paid[0] - plain[0] == pytest.approx(penalty.item(), rel=1e-3)


def test_cpt_trains_on_its_own_loss(folder: Path) -> None:
    words = ["--method", "cpt", "--cpt-token-ids", "5", "--cpt-token-ids", "6"]
    found = losses(folder, *words)
    assert len(found) == 2
    assert all(0 < loss < 20 for loss in found)


def test_adalora_is_told_the_steps_of_the_run(folder: Path) -> None:
    """8 rows in batches of 3, two of them a step, for three epochs."""
    found = losses(folder, "--method", "adalora", "--batch-size", "3", "--grad-accum", "2", "--epochs", "3")
    assert json.loads((folder / "run" / "adapter_config.json").read_text())["total_step"] == len(found) == 6
