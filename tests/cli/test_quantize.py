"""``inlay quantize``: the report of what a LoRA can make up for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from inlay.cli.app import run
from inlay.training.models import bundled_base, bundled_data, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the bundled one's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(bundled_base())
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads = 1, 64, 64, 2
    config.num_key_value_heads, config.head_dim, config.max_position_embeddings, config.initializer_range = 1, 32, 32, 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer("bundled").save_pretrained(path)
    return path


def test_the_report_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bundled_data("commands")
    words = ["quantize", str(folder), "--to", "nf4", "--out", str(tmp_path / "q"), "--report-init", "--calibration", str(data)]
    assert run([*words, "--rank", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    starts = found["starts"]
    assert starts["rank"] == 4
    assert starts["measured_on"] == "held out"
    assert len(starts["layers"]) == 7
    for error in (starts["output"], *(layer["output"] for layer in starts["layers"])):
        assert error["cloq"] < error["own"] < error["plain"]
        assert error["loftq"] < error["plain"]
    for layer in starts["layers"]:
        # Of the weight itself, LoftQ leaves least.
        assert layer["weight"]["loftq"] < layer["weight"]["cloq"] < layer["weight"]["plain"]
    assert (tmp_path / "q" / "model.safetensors").is_file()


def test_the_report_as_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--report-init"]) == 0
    shown = capsys.readouterr().out
    assert "Error of the outputs (own samples) with a LoRA of rank 16" in shown
    assert "CLoQ, own samples" in shown
    assert "CLoQ, data" not in shown
    assert "self_attn.q_proj" in shown


def test_what_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "ls"}) + "\n")
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--calibration", str(rows)]) == 2
    assert "--calibration: only --report-init has a use for data" in capsys.readouterr().err
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--calibration", str(rows), "--report-init"]) == 2
    assert "1 rows can be used; give at least 4" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "q").exists()
