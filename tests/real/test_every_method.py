"""Every registered method learns on pretrained weights."""

from __future__ import annotations

import runpy
import warnings
from pathlib import Path
from typing import Any

import pytest

import inlay.methods  # noqa: F401  registers them
from inlay.core.method import METHODS

TOOL = runpy.run_path(str(Path(__file__).parents[2] / "tools" / "make_method_losses.py"))
# These need more than this model: other adapters that they choose from, or a decoder's attention.
NOT_ALONE = {"XLORA", "ADAPTION_PROMPT"}
# By how much the loss has to fall, at least; most methods reach far more.
FACTOR = 1.2
# TinyLoRA trains a few hundred numbers in all, which go less far in eight steps.
FACTORS = {"TINYLORA": 1.05}


@pytest.fixture(scope="module")
def task() -> Any:
    return TOOL["load"]()


@pytest.mark.parametrize("name", sorted(set(METHODS) - NOT_ALONE))
def test_the_loss_falls(name: str, task: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = TOOL["train"](*task, name)
    assert result.parameters > 0
    assert all(0 < loss < 10 for loss in result.losses)
    assert result.factor > FACTORS.get(name, FACTOR)
