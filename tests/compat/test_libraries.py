"""Other libraries, unchanged, on Inlay and on the real peft: the same programs, each in a process of its own, give the same numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent


def start(library: str, program: str, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir()
    command = [sys.executable, str(HERE / "child.py"), library, program, str(folder)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize("program", ["trl_trainers", "transformers_models", "diffusers_models", "quantised_models"])
def test_the_same_numbers_as_on_the_real_peft(program: str, tmp_path: Path):
    children = {library: start(library, program, tmp_path / library) for library in ("inlay", "peft")}
    results: dict[str, dict[str, Any]] = {}
    for library, child in children.items():
        _, errors = child.communicate()
        assert child.returncode == 0, f"{library}:\n{errors[-6000:]}"
        results[library] = json.loads((tmp_path / library / "result.json").read_text())
    ours, real = results["inlay"], results["peft"]
    assert ours.keys() == real.keys()
    for name, value in ours.items():
        expected = real[name]
        if isinstance(value, list) and value and isinstance(value[0], float):
            assert value == pytest.approx(expected, abs=1e-4), name
        else:
            assert value == expected, name
