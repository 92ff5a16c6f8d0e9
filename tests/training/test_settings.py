"""One list of settings: YAML keys and values are checked, mistypings get the nearest name, run.json goes in again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from inlay.training.errors import InputError
from inlay.training.settings import read_config, resolve

LORA = {"r", "lora_alpha", "lora_dropout", "target_modules"}


def test_training_keys_and_adapter_fields_are_told_apart() -> None:
    settings = resolve({"lr": "1e-3", "batch-size": 4, "r": 16, "lora_alpha": 32}, LORA, "lora")
    assert (settings.lr, settings.batch_size) == (0.001, 4)
    assert settings.adapter == {"r": 16, "lora_alpha": 32}


def test_a_record_goes_in_again() -> None:
    settings = resolve({"data": "a/b.jsonl", "epochs": 2, "r": 16}, LORA, "lora")
    assert resolve(json.loads(settings.model_dump_json()), LORA, "lora") == settings
    assert settings.output_folder() == Path("runs/b")


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
        resolve(given, LORA, "lora")


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
