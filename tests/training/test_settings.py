"""One list of settings: YAML keys and values are checked, mistypings get the nearest name, run.json goes in again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.training.errors import InputError
from inlay.training.settings import RunSettings, read_config, resolve

LORA = {"r", "lora_alpha", "lora_dropout", "target_modules", "seed"}


def settings(*sources: dict[str, Any]) -> RunSettings:
    return resolve(sources, lambda method: LORA)


def test_training_keys_and_adapter_fields_are_told_apart() -> None:
    run = settings({"lr": "1e-3", "batch-size": 4, "r": 16, "lora-alpha": 32})
    assert (run.lr, run.batch_size) == (0.001, 4)
    assert run.adapter == {"r": 16, "lora_alpha": 32}


def test_later_sources_win_and_a_name_that_both_have_is_kept_apart() -> None:
    run = settings({"lr": 1.0, "r": 4, "adapter": {"seed": 7, "lora_alpha": 1}}, {"lr": 2.0}, {"adapter": {"r": 8}})
    assert (run.lr, run.seed) == (2.0, 42)
    assert run.adapter == {"seed": 7, "lora_alpha": 1, "r": 8}


def test_a_record_goes_in_again() -> None:
    run = settings({"data": "a/b.jsonl", "epochs": 2, "r": 16})
    assert settings(json.loads(run.model_dump_json())) == run
    assert run.output_folder() == Path("runs/b")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lora_alhpa": 1}, r"^lora_alhpa: .* Did you mean lora_alpha\?"),
        ({"epoch": 1}, r"Did you mean epochs\?"),
        ({"learning_rate": 1}, r"Did you mean lr\?"),
        ({"per_device_train_batch_size": 1}, r"Did you mean batch_size\?"),
        ({"zzzz": 1}, r"zzzz: neither a training setting nor a field of lora's config\. `inlay"),
        ({"adapter": {"rr": 1, "x": 2}}, r"^rr: neither"),
        ({"adapter": 3}, r"adapter: expected the fields"),
        ({"batch_size": 0}, r"^batch_size: input should be greater than or equal to 1, got 0\.$"),
        ({"scheduler": "cosin"}, r"^scheduler: input should be 'linear', 'cosine'.* got 'cosin'"),
        ({"lr": "fast"}, r"^lr: input should be a valid number"),
    ],
)
def test_what_is_wrong_is_named(given: dict[str, object], said: str) -> None:
    with pytest.raises(InputError, match=said):
        settings(given)


def test_config_files(tmp_path: Path) -> None:
    good = tmp_path / "run.yaml"
    good.write_text("lr: 0.001\nr: 8\n")
    assert read_config(good) == {"lr": 0.001, "r": 8}
    record = tmp_path / "run.json"
    record.write_text('{"status": "finished", "settings": {"lr": 0.01}}')
    assert read_config(record) == {"lr": 0.01}
    for text, said in (("- a\n", "expected 'key: value' lines"), ("a: [1\n", "not valid YAML")):
        good.write_text(text)
        with pytest.raises(InputError, match=said):
            read_config(good)
    with pytest.raises(InputError, match="cannot be read"):
        read_config(tmp_path / "nowhere.yaml")
