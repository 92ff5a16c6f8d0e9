"""What files and outputs of prompts are compared by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def outputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        # HF writes into some of them.
        return {k: v for k, v in model(**{k: v.clone() for k, v in inputs.items()}).items() if isinstance(v, Tensor)}


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].shape == tensor.shape, name
        assert (ours[name] - tensor).abs().max() < tolerance, name


def settings(folder: Path) -> dict[str, Any]:
    """A configuration's file. HF writes the heads of a task once for each time that it adds them, and no name in two ways."""
    plain = json.loads((folder / "adapter_config.json").read_text())
    heads, name = sorted(set(plain["modules_to_save"] or ())), plain["base_model_name_or_path"] or None
    return plain | {"modules_to_save": heads, "base_model_name_or_path": name}
