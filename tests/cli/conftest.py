"""A user's session on the command line, carried out once in a process of its own (the peft alias has to come before transformers)."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .. import tiny_chat_model
from ..tiny_chat_model import environment, rows

# Runs command lines one after the other, as `inlay` would, and writes down what each of them printed.
DRIVER = """
import contextlib, io, json, shutil, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from inlay.cli import main

done = {}
for step in json.loads(Path(sys.argv[1]).read_text()):
    if "copy" in step:
        with contextlib.suppress(FileNotFoundError):  # when the step before failed, its own test says why
            shutil.copytree(*step["copy"])
        continue
    if "remove" in step:
        path = Path(step["remove"])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        continue
    out, err = io.StringIO(), io.StringIO()
    sys.stdin = io.StringIO(step.get("stdin", ""))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(step["words"])
        except SystemExit as leaving:
            code = leaving.code
    done[step["name"]] = {"code": code, "out": out.getvalue(), "err": err.getvalue()}
Path(sys.argv[2]).write_text(json.dumps(done))
"""


@dataclass(frozen=True)
class Result:
    """What one command line left."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@dataclass(frozen=True)
class Session:
    folder: Path
    results: dict[str, Result]

    def __getitem__(self, name: str) -> Result:
        return self.results[name]


@pytest.fixture(scope="session")
def session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    folder = tmp_path_factory.mktemp("session")
    model = str(tiny_chat_model.save(folder / "model"))
    (folder / "rows.jsonl").write_text(rows(24))
    (folder / "held_out.jsonl").write_text(rows(6, first=50))
    (folder / "bad.jsonl").write_text(rows(2) + "{oops\n")
    data, held_out, run = (str(folder / name) for name in ("rows.jsonl", "held_out.jsonl", "run"))
    (folder / "run.yaml").write_text(f"model: {model}\nmethod: ia3\nepochs: 1\nval_fraction: 0\nlr: 1e-2\n")
    (folder / "typo.yaml").write_text(f"model: {model}\nlora_alhpa: 3\n")
    yaml, typo, none = (str(folder / name) for name in ("run.yaml", "typo.yaml", "none"))
    small = ["--max-steps", "8", "--eval-every", "4", "--batch-size", "4", "--val-fraction", "0.25", "--samples", "2"]
    adapter = ["--r", "4", "--lora-alpha=8", "--target-modules", "q_proj,v_proj", "--lora-dropout", "0.1", "--lr", "0.02"]
    steps: list[dict[str, Any]] = [
        {"name": "train", "words": ["train", data, "--model", model, *small, *adapter, "--output", run, "--json"]},
        {"copy": [run, str(folder / "resumed")]},
        {"remove": str(folder / "resumed" / "checkpoints" / "checkpoint-8")},
        {"remove": str(folder / "resumed" / "adapter_model.safetensors")},
        {"name": "resume", "words": ["train", "--output", str(folder / "resumed"), "--resume", "--json"]},
        {"name": "again", "words": ["train", data, "--model", model, "--output", run]},
        {
            "name": "yaml",
            "words": ["train", data, "--config", yaml, "--max-steps", "2", "--output", str(folder / "ia3")],
        },
        {"name": "typo in yaml", "words": ["train", data, "--config", typo]},
        {"name": "typo in flag", "words": ["train", data, "--model", model, "--lora-alhpa", "3"]},
        {"name": "typo in method", "words": ["train", data, "--model", model, "--method", "lroa"]},
        {"name": "typo in model", "words": ["train", data, "--model", str(folder / "modle"), "--output", none]},
        {"name": "typo in verb", "words": ["trian"]},
        {"name": "bad row", "words": ["train", str(folder / "bad.jsonl"), "--model", model, "--output", none]},
        {"name": "bad value", "words": ["train", data, "--model", model, "--r", "many"]},
        {"name": "no target", "words": ["train", data, "--model", model, "--target-modules", "q_prj", "--output", none]},
        {"name": "too short", "words": ["train", data, "--model", model, "--max-length", "8", "--output", none]},
        {"name": "fields", "words": ["train", "--method-help", "--json"]},
        {
            "name": "compare",
            "words": ["compare", "--adapter", run, "--data", held_out, "--prompt", "Say [b]x[/b]."],
        },
        {"name": "compare json", "words": ["compare", "--adapter", run, "--data", held_out, "--max-new-tokens", "4", "--json"]},
        {
            "name": "train nf4",
            "words": [
                "train",
                data,
                "--model",
                model,
                "--quantization",
                "nf4",
                "--max-steps",
                "2",
                "--eval-every",
                "1",
                "--lr",
                "0.02",
                "--r",
                "4",
                "--target-modules",
                "q_proj",
                "--output",
                str(folder / "nf4"),
                "--json",
            ],
        },
        {
            "name": "compare nf4",
            "words": ["compare", "--adapter", str(folder / "nf4"), "--data", held_out, "--max-new-tokens", "4", "--json"],
        },
        {
            "name": "compare a checkpoint",
            "words": [
                "compare",
                "--adapter",
                str(folder / "nf4" / "checkpoints" / "checkpoint-2"),
                "--data",
                held_out,
                "--max-new-tokens",
                "4",
                "--json",
            ],
        },
        {
            "name": "compare nf4 on dense",
            "words": [
                "compare",
                "--adapter",
                str(folder / "nf4"),
                "--data",
                held_out,
                "--quantization",
                "none",
                "--max-new-tokens",
                "4",
                "--json",
            ],
        },
        {"name": "compare nf5", "words": ["compare", "--adapter", str(folder / "nf4"), "--data", held_out, "--quantization", "nf5"]},
        {
            "name": "chat nf4",
            "words": ["chat", "--adapter", str(folder / "nf4"), "--max-new-tokens", "4", "--json"],
            "stdin": "Say 1.\n",
        },
        {"name": "compare nothing", "words": ["compare", "--adapter", run]},
        {
            "name": "chat",
            "words": ["chat", "--adapter", run, "--max-new-tokens", "4", "--json"],
            "stdin": "Say 1.\n/base\nSay 1.\n/reset\n/quit\nnot heard\n",
        },
        {"name": "inspect adapter", "words": ["inspect", run, "--json"]},
        {"name": "inspect model", "words": ["inspect", model, "--json"]},
        {"name": "inspect for people", "words": ["inspect", run]},
        {"name": "inspect nothing", "words": ["inspect", str(folder / "rum")]},
        {"name": "merge", "words": ["merge", "--adapter", run, "--out", str(folder / "merged"), "--verify", "--json"]},
        {"name": "merge again", "words": ["merge", "--adapter", run, "--out", str(folder / "merged")]},
        {"name": "adapter as model", "words": ["chat", "--model", run]},
    ]
    (folder / "steps.json").write_text(json.dumps(steps))
    finished = subprocess.run(
        [sys.executable, "-c", DRIVER, str(folder / "steps.json"), str(folder / "done.json")],
        env=environment(),
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert finished.returncode == 0, finished.stderr
    done = json.loads((folder / "done.json").read_text())
    return Session(folder, {name: Result(**result) for name, result in done.items()})
