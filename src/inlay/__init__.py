"""Inlay sets small trainable adapters flush into a large frozen PyTorch model.

Names are loaded when they are first used, so that importing the package costs nothing. Which there are, and where each lives,
stands in ``__init__.pyi``, for people, type checkers and this file alike.
"""

from __future__ import annotations

import ast
import importlib
from pathlib import Path
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    name.name: line.module
    for line in ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8")).body
    if isinstance(line, ast.ImportFrom)
    for name in line.names
}

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        # The registry is filled by the modules that hold the methods.
        importlib.import_module("inlay.methods")
        importlib.import_module("inlay.prompts")
    value = getattr(importlib.import_module(f"inlay.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
