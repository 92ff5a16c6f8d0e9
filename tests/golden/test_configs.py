"""The fields of every configuration, against the real library."""

from __future__ import annotations

from dataclasses import MISSING, Field, asdict, fields
from typing import Any

import peft
import pytest

import inlay.methods
import inlay.prompts  # noqa: F401
from inlay.core.config import CONFIGS
from inlay.core.method import METHODS


def default(f: Field[Any]) -> Any:
    value = f.default if f.default is not MISSING else f.default_factory()  # type: ignore[misc]
    return asdict(value) if hasattr(value, "__dataclass_fields__") else value


# Options without which a configuration cannot be.
REQUIRED: dict[str, dict[str, Any]] = {"ADALORA": {"total_step": 10}}
# The methods of the real library, and those of ours that it does not have.
THEIRS = {str(t.value): cls for t, cls in peft.PEFT_TYPE_TO_CONFIG_MAPPING.items()}
SHARED = sorted(set(METHODS) & set(THEIRS))


def of_ours(cls: type) -> set[str]:
    """The fields that HF's class of the same name lacks, as our class says."""
    return {f.name for f in fields(cls) if f.name in cls.ours or f.metadata.get("ours")}  # type: ignore[attr-defined]


def test_every_method_is_here() -> None:
    assert set(THEIRS) <= set(CONFIGS), sorted(set(THEIRS) - set(CONFIGS))


@pytest.mark.parametrize("name", SHARED)
def test_fields(name: str) -> None:
    theirs = THEIRS[name]
    assert CONFIGS[name].__name__ == theirs.__name__
    its = {f.name: default(f) for f in fields(theirs)}
    mine = {f.name: default(f) for f in fields(CONFIGS[name])}
    assert its.keys() <= mine.keys(), "fields of the real library are missing"
    assert mine.keys() - its.keys() == of_ours(CONFIGS[name]), "`ours` must name what the real library does not know"
    # Which method it is stands in the class there and in the field here.
    elsewhere = {"peft_type", "runtime_config"}
    assert {k: v for k, v in its.items() if k not in elsewhere} == {k: mine[k] for k in its if k not in elsewhere}


@pytest.mark.parametrize("name", SHARED)
def test_a_fresh_file_has_the_fields_of_the_real_library(name: str) -> None:
    theirs = THEIRS[name]
    written = CONFIGS[name](**REQUIRED.get(name, {})).to_file()
    assert written["peft_type"] == name
    assert written.keys() == {f.name for f in fields(theirs)} - {"runtime_config"}
    theirs(**{k: v for k, v in written.items() if k not in ("peft_type", "auto_mapping")})


@pytest.mark.parametrize("name", SHARED)
def test_default_targets(name: str) -> None:
    its = getattr(peft.mapping.PEFT_TYPE_TO_TUNER_MAPPING[peft.PeftType(name)], "target_module_mapping", None)
    if its is not None:
        mine = CONFIGS[name](**REQUIRED.get(name, {})).default_targets()
        assert {base: mine[base] for base in its} == its


def test_ia3_knows_the_same_architectures() -> None:
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )

    from inlay.methods.ia3 import _DEFAULTS, IA3Config

    mine = {base: set(names) for base, names in IA3Config().default_targets().items()}
    assert mine == {base: set(names) for base, names in TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING.items()}
    inputs = {base: set(inputs.split()) for base, (_, inputs) in _DEFAULTS.items()}
    assert inputs == {base: set(names) for base, names in TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING.items()}
