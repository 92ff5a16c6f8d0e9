"""Starting up: help without torch, the version, a module as well as a binary, Ctrl-C."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from inlay.cli.consumers import AdapterFacts, verdicts
from inlay.cli.tuned import base_of
from inlay.training.errors import InputError

from .. import tiny_chat_model
from ..tiny_chat_model import environment, rows


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *words], env=environment(), capture_output=True, text=True, timeout=120)


def test_help_does_without_torch() -> None:
    code = (
        "import sys\nfrom inlay.cli.app import run\n"
        "codes = [run(['--help']), run(['train', '--help']), run(['compare', '--help']), run(['--version'])]\n"
        "print(codes, 'torch' in sys.modules, 'transformers' in sys.modules)"
    )
    finished = run("-c", code)
    assert finished.stdout.splitlines()[-1] == "[0, 0, 0, 0] False False", finished.stderr
    for word in ("quickstart", "--grad-accum", "--max-new-tokens"):
        assert word in finished.stdout


def test_the_module_is_the_binary() -> None:
    finished = run("-m", "inlay", "--version")
    assert finished.stdout.split()[0] == "inlay"
    assert finished.returncode == 0
    assert run("-m", "inlay", "inspect", "nowhere").returncode == 2
    assert "Traceback" in run("-m", "inlay", "inspect", "nowhere", "--debug").stderr


def test_ctrl_c_saves_the_adapter_and_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    tiny_chat_model.save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(rows(20))
    words = ["train", "rows.jsonl", "--model", "model", "--epochs", "10000", "--output", "run", "--eval-every", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "inlay", *words], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and not (metrics.is_file() and metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(1, len(steps) + 1))
    assert f"Stopped after {steps[-1]} steps" in out
    assert "inlay train --output run --resume" in out
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == [f"checkpoint-{steps[-1]}"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "interrupted"


@pytest.mark.slow
def test_two_processes_speak_with_one_voice(tmp_path: Path) -> None:
    tiny_chat_model.save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text(rows(24))
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    words = ["-m", "inlay", "train", "rows.jsonl", "--model", "model", "--max-steps", "3", "--batch-size", "4", "--output", "run", "--json"]
    finished = subprocess.run(
        [sys.executable, *launch, *words], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    summary = json.loads(finished.stdout)  # one object, from one process
    assert summary["results"]["steps"] == 3
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics if "loss" in line] == [1, 2, 3]
    single = 4 * (35 + 2)  # tokens of a batch at most, for one process
    assert single < metrics[0]["tokens"] <= 2 * single
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


def test_an_adapter_of_the_bundled_base_finds_it_on_another_machine(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "/elsewhere/site-packages/inlay/assets/base"}')
    assert base_of(None, tmp_path) == "bundled"
    assert base_of("own", tmp_path) == "own"
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "some/model"}')
    assert base_of(None, tmp_path) == "some/model"
    assert base_of(None, None) == "bundled"
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="does not name its base model; give it with --model"):
        base_of(None, tmp_path)


@pytest.mark.parametrize(
    ("config", "tensor", "wanted"),
    [
        ({"r": 8, "lora_alpha": 8}, "q.lora_A.weight", {"vLLM": "reads", "SGLang": "reads", "llama.cpp": "reads", "LoRAX": "reads"}),
        ({"r": 8, "use_dora": True}, "q.lora_A.weight", {"vLLM": "refuses", "SGLang": "refuses", "llama.cpp": "refuses"}),
        ({"r": 8, "use_rslora": True}, "q.lora_A.weight", {"vLLM": "reads", "SGLang": "wrong", "llama.cpp": "wrong", "LoRAX": "reads"}),
        ({"alpha_pattern": {"q": 2}}, "q.lora_A.weight", {"vLLM": "check", "SGLang": "refuses", "llama.cpp": "wrong", "LoRAX": "wrong"}),
        ({"rank_pattern": {"q": 2}}, "q.lora_A.weight", {"vLLM": "check", "SGLang": "refuses", "llama.cpp": "reads", "LoRAX": "wrong"}),
        ({"modules_to_save": ["lm_head"]}, "q.lora_A.weight", {"vLLM": "refuses", "llama.cpp": "refuses"}),
        ({"bias": "all"}, "q.lora_A.weight", {"vLLM": "refuses"}),
        ({"lora_alpha": 8.5}, "q.lora_A.weight", {"Ollama": "refuses"}),
        ({}, "e.lora_embedding_A", {"llama.cpp": "refuses"}),
    ],
)
def test_consumers_refuse_or_misread_what_they_are_known_to(config: dict[str, Any], tensor: str, wanted: dict[str, str]) -> None:
    found = {row["consumer"]: row["verdict"] for row in verdicts(AdapterFacts({"peft_type": "LORA", **config}, {tensor: (8, 16)}))}
    assert {name: found[name] for name in wanted} == wanted


def test_other_methods_than_lora_are_for_the_training_libraries_only() -> None:
    found = {row["consumer"]: row["verdict"] for row in verdicts(AdapterFacts({"peft_type": "IA3", "base_model_name_or_path": "b"}, {}))}
    assert found.pop("transformers, peft, TRL") == "reads"
    assert set(found.values()) == {"refuses"}


def test_a_large_rank_needs_a_flag_of_vllm() -> None:
    rows_found = verdicts(AdapterFacts({"peft_type": "LORA"}, {"q.lora_A.weight": (64, 16)}))
    assert next(row for row in rows_found if row["consumer"] == "vLLM")["why"] == "needs --max-lora-rank 64"
