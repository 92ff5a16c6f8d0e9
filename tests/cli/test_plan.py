"""``inlay plan`` on the command line: what it shows, what it proposes, what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inlay import LoraConfig, plan
from inlay.cli.app import run
from inlay.cli.plan import amount, bytes_in
from inlay.training.errors import InputError

from .. import tiny_chat_model

SMALL = ["--seq-length", "64", "--batch-size", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_chat_model.save(tmp_path_factory.mktemp("plan") / "model")


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert run(["plan", *words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_flags_of_the_method_are_flags(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "model.safetensors").unlink(missing_ok=True)  # weights are not looked at
    found = planned(capsys, str(model), "--r", "4", "--target-modules", "q_proj,v_proj", *SMALL)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    own = plan(str(model), config, seq_length=64, batch_size=2, dtype="float32", device="cpu")
    assert found["items"] == own.items
    assert found["bytes"] == own.bytes == sum(found["items"].values())
    assert found["parameters"]["trainable"] == own.trainable
    assert planned(capsys, str(model / "config.json"), "--r", "4", "--target-modules", "q_proj,v_proj", *SMALL)["items"] == own.items
    other = planned(capsys, str(model), "--method", "ia3", *SMALL)
    assert other["parameters"]["trainable"] < own.trainable


def test_what_would_make_it_fit(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = planned(capsys, str(model), *SMALL, "--memory", "1GB")
    assert whole["fits"]
    assert whole["remedies"] == []
    room = str(int(whole["bytes"] * 0.7) / 10**6) + "MB"
    tight = planned(capsys, str(model), *SMALL, "--memory", room)
    assert not tight["fits"]
    assert tight["remedies"][0]["change"] == {"gradient_checkpointing": True}
    assert [each["fits"] for each in tight["remedies"]] == [*[False] * (len(tight["remedies"]) - 1), True]
    assert run(["plan", str(model), *SMALL, "--memory", room]) == 0
    shown = capsys.readouterr().out
    for word in ("weights", "activations", "logits", "at the peak", "does not fit", "gradient checkpointing", "fits"):
        assert word in shown
    assert run(["plan", str(model), *SMALL, "--memory", "1GB", "--quantization", "nf4", "--gradient-checkpointing"]) == 0
    assert "linear layers in nf4, checkpointed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "culprit"),
    [
        (["--quantization", "nf5"], "quantization 'nf5'"),
        (["--optimizer", "admw"], "Did you mean 'adamw'"),
        (["--seq-lenght", "8"], "Did you mean --seq-length"),
        (["--lora-alhpa", "8"], "Did you mean --lora-alpha"),
        (["--method", "lroa"], "no such method. Did you mean"),
        (["--target-modules", "q_prj"], "q_proj"),
        (["--memory", "much"], "--memory much: give an amount"),
        (["--seq-length", "100000"], "made for at most 256 tokens"),
    ],
)
def test_a_mistake_is_named(model: Path, words: list[str], culprit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(model), *words]) == 2
    assert culprit in capsys.readouterr().err


def test_a_model_that_is_not_there(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["plan", str(model.with_name("modle"))]) == 2
    assert "no such folder. Did you mean model?" in capsys.readouterr().err


def test_the_plan_of_a_run(model: Path) -> None:
    words = ["--model", str(model), "--r", "4", "--max-length", "64", "--batch-size", "2", "--device", "cpu", "--gradient-checkpointing"]
    command = [sys.executable, "-m", "inlay", "train", *words, "--plan", "--json"]
    done = subprocess.run(command, env=tiny_chat_model.environment(), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["setting"]["gradient_checkpointing"]
    assert found["setting"]["loss"] == "chunked"
    assert (found["setting"]["batch_size"], found["setting"]["seq_length"]) == (2, 64)


def test_amounts() -> None:
    assert (bytes_in("24GB"), bytes_in("24 GiB"), bytes_in("1.5"), bytes_in("80mb")) == (24 * 10**9, 24 * 2**30, 15 * 10**8, 8 * 10**7)
    assert (amount(1_234_500_000), amount(24 * 10**9)) == ("1,234.5 MB", "24.00 GB")
    for wrong in ("", "GB", "24XB", "-1GB"):
        with pytest.raises(InputError, match="--memory"):
            bytes_in(wrong)
