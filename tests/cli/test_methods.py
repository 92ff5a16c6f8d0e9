"""``inlay methods`` and ``inlay train --method``: every registered method, by its name and its fields."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from inlay.capabilities import capabilities, method_names
from inlay.cli.train import take_adapter_flags
from inlay.core.method import METHODS
from inlay.training.adapters import build_config, is_switch

NAMES = method_names()


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "inlay", *words], capture_output=True, text=True, timeout=120)


def test_the_list_and_one_method() -> None:
    listed = json.loads(run("methods", "--json").stdout)["methods"]
    assert [each["name"] for each in listed] == NAMES
    lora = next(each for each in listed if each["name"] == "LORA")
    assert (lora["parameters"], lora["count"], lora["to_lora"], lora["merges"]) == ("r·in + out·r", 65536, "exact", True)
    assert {"name": "r", "default": 8, "help": "Rank of the update."} in lora["fields"]
    assert lora["refused"] == {}
    assert {"pissa", "olora", "eva", "corda", "loftq", "lora_ga", "orthogonal", "gaussian", "mica"} <= set(lora["starts"])
    shown = run("methods", "lora").stdout
    for word in ("W + s B A", "2106.09685", "--lora-alpha", "--target-modules", "65,536"):
        assert word in shown
    wrong = run("methods", "lorra")
    assert wrong.returncode == 2
    assert "lora" in wrong.stderr


@pytest.mark.parametrize("name", NAMES)
def test_a_method_says_what_it_is(name: str) -> None:
    found = capabilities(name)
    assert found.title
    assert found.equation
    assert found.layouts
    assert found.merges != bool(found.why_not)
    assert all(field.help for field in found.fields), [f.name for f in found.fields if not f.help]
    assert found.lines > 20
    # Retrained tokens are no paper's: they are an idea of HF peft's own.
    assert found.paper_link.startswith("https://") or name == "TRAINABLE_TOKENS"


@pytest.mark.parametrize("name", sorted(METHODS))
def test_every_field_is_a_flag(name: str) -> None:
    """What the law is tested with can be typed on a command line."""
    for options in METHODS[name].examples.values():
        words: list[str] = []
        for key, value in options.items():
            flag = f"--{key.replace('_', '-')}"
            typed = value if isinstance(value, str) else json.dumps(value)
            words.append(flag if value is True and is_switch(name.lower(), key) else f"{flag}={typed}")
        given, rest = take_adapter_flags(words, set(), name.lower())
        assert rest == []
        built: Any = build_config(name.lower(), given)
        made: Any = METHODS[name](task_type="CAUSAL_LM", **options)
        assert built == made
