"""Values as typed on a command line become the config's types; what does not fit is refused with the flag's name."""

from __future__ import annotations

from typing import Any

import pytest

from inlay.training.adapters import build_config, config_fields, group_of, is_switch
from inlay.training.errors import InputError


@pytest.mark.parametrize(
    ("field", "typed", "value"),
    [
        ("r", "4", 4),
        ("lora_dropout", "1e-1", 0.1),
        ("use_rslora", "true", True),
        ("target_modules", "q_proj,v_proj", {"q_proj", "v_proj"}),
        ("target_modules", "q_proj", {"q_proj"}),
        ("target_modules", ["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ("target_modules", "all-linear", "all-linear"),
        ("target_modules", r".*\.(q|v)_proj", r".*\.(q|v)_proj"),
        ("rank_pattern", "{q_proj: 2}", {"q_proj": 2}),
        ("modules_to_save", "lm_head", ["lm_head"]),
        ("layers_to_transform", "0,1", [0, 1]),
        ("bias", "lora_only", "lora_only"),
    ],
)
def test_typed_values_become_the_fields_types(field: str, typed: Any, value: Any) -> None:
    found = getattr(build_config("lora", {field: typed}), field)
    assert (set(found) if isinstance(value, set) else found) == value


@pytest.mark.parametrize("typed", ["32", 32])
def test_whole_numbers_stay_whole(typed: Any) -> None:
    """Some readers of adapter_config.json take a whole lora_alpha only."""
    assert repr(build_config("lora", {"lora_alpha": typed}).lora_alpha) == "32"


def test_the_task_is_causal_language_modelling_unless_told() -> None:
    assert build_config("lora", {}).task_type == "CAUSAL_LM"


@pytest.mark.parametrize(
    ("method", "given", "said"),
    [
        ("lora", {"r": "many"}, r"--r many: .*valid integer"),
        ("lora", {"bias": "some"}, r"bias"),
        ("lroa", {}, r"--method lroa: no such method\. Did you mean .*lora"),
    ],
)
def test_what_does_not_fit_is_refused(method: str, given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        build_config(method, given)


def test_switches_and_hidden_fields() -> None:
    assert is_switch("lora", "use_rslora")
    assert not is_switch("lora", "r")
    assert "peft_type" not in config_fields("lora")
    assert "r" in config_fields("lora")


@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.11.self_attn.q_proj.lora_A.weight",  # in a file
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight",
        "base_model.model.model.layers.3.self_attn.q_proj.adapters.default.lora_A",
    ],
)
def test_layers_are_grouped_by_their_kind(name: str) -> None:
    assert group_of(name) == "self_attn.q_proj"
