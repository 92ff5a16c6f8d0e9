"""Everything a training run can be told, in one place: the YAML keys, the flags of ``inlay train`` and the record in run.json."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from .errors import InputError

BUNDLED = "bundled"  # the name of the small model inside the package

# Names that people know from other trainers; difflib alone would not lead from them to ours.
KNOWN_ELSEWHERE = {
    "learning_rate": "lr",
    "num_train_epochs": "epochs",
    "num_epochs": "epochs",
    "per_device_train_batch_size": "batch_size",
    "micro_batch_size": "batch_size",
    "gradient_accumulation_steps": "grad_accum",
    "lr_scheduler_type": "scheduler",
    "load_in_4bit": "quantization",
    "load_in_8bit": "quantization",
    "warmup_ratio": "warmup",
    "warmup_steps": "warmup",
    "max_seq_length": "max_length",
    "max_seq_len": "max_length",
    "output_dir": "output",
    "eval_steps": "eval_every",
    "base_model": "model",
    "model_name_or_path": "model",
    "peft_type": "method",
    "dataset": "data",
    "rank": "r",
    "alpha": "lora_alpha",
    "dropout": "lora_dropout",
}


def setting(default: Any, panel: str, description: str, **constraints: Any) -> Any:
    """A field that also knows the panel of ``--help`` it belongs to."""
    return Field(default, description=description, json_schema_extra={"panel": panel}, **constraints)


class RunSettings(BaseModel):
    """The settings of one training run; the fields of the adapter's own config are kept apart, in ``adapter``."""

    model_config = ConfigDict(extra="forbid")

    data: Path | None = setting(None, "Data", "Training rows: .jsonl, .json, .csv or .parquet.")
    val: Path | None = setting(None, "Data", "Validation rows in a file of their own.")
    val_fraction: float = setting(0.05, "Data", "Share of the rows kept aside for validation, when there is no --val.", ge=0, lt=1)
    max_length: int = setting(1024, "Data", "Longest sample in tokens; longer ones are cut, and counted.", ge=8)
    chat_template: str = setting(
        "auto", "Data", "auto: the tokenizer's, or a plain one; none: prompt and answer as they stand; or a .jinja file."
    )
    train_on: Literal["answers", "all"] = setting("answers", "Data", "Which tokens carry the loss.")

    model: str = setting(BUNDLED, "Model and adapter", "Folder or hub id of the base model; 'bundled' is the small one inside Inlay.")
    method: str = setting("lora", "Model and adapter", "Adapter method. Every field of its config is a flag too: --method-help lists them.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = setting(
        "auto", "Model and adapter", "Type of the base weights; auto is bfloat16 on a capable GPU, else float32."
    )
    quantization: Literal["none", "nf4", "fp4", "int4", "int8"] = setting(
        "none", "Model and adapter", "Keep the frozen base in 4 or 8 bits; each tensor is quantised as it is read."
    )
    device: Literal["auto", "cpu", "cuda", "mps"] = setting("auto", "Model and adapter", "Where to train.")
    trust_remote_code: bool = setting(False, "Model and adapter", "Allow a model folder to bring its own Python code.")

    epochs: float = setting(3.0, "Training", "Passes over the data.", gt=0)
    max_steps: int | None = setting(None, "Training", "Stop after this many optimizer steps, whatever --epochs says.", ge=1)
    batch_size: int = setting(8, "Training", "Samples per device and forward pass.", ge=1)
    grad_accum: int = setting(1, "Training", "Forward passes per optimizer step.", ge=1)
    lr: float = setting(2e-4, "Training", "Peak learning rate.", gt=0)
    scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"] = setting("cosine", "Training", "Its shape.")
    warmup: float = setting(0.03, "Training", "Warm-up: a share of the steps below 1, a number of steps from 1 on.", ge=0)
    weight_decay: float = setting(0.0, "Training", "AdamW's weight decay.", ge=0)
    max_grad_norm: float = setting(1.0, "Training", "Clip the gradient to this norm.", gt=0)
    gradient_checkpointing: bool = setting(False, "Training", "Recompute activations in the backward pass: less memory, a fifth slower.")
    seed: int = setting(42, "Training", "Seed of the split, the order of the rows, the adapter's start and dropout.", ge=0)

    output: Path | None = setting(None, "Output", "Folder of the run; runs/<name of the data> when not given.")
    eval_every: int | None = setting(None, "Output", "Validate and save every so many steps; once an epoch when not given.", ge=1)
    patience: int | None = setting(None, "Output", "Stop after this many validations without a better loss.", ge=1)
    samples: int = setting(12, "Output", "Validation rows whose base and tuned answers go into the report.", ge=0)
    overwrite: bool = setting(False, "Output", "Replace a finished run in the same folder.")
    resume: bool = setting(False, "Output", "Go on from the last checkpoint of the run in --output.")

    adapter: dict[str, Any] = Field(default_factory=dict, description="Fields of the adapter's config, as given.")

    def output_folder(self) -> Path:
        """The folder of the run."""
        if self.output is not None:
            return self.output
        return Path("runs") / (self.data.stem if self.data else "run")


TRAINING_KEYS = tuple(name for name in RunSettings.model_fields if name != "adapter")


def read_config(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a run.json written by an earlier run gives the settings of that run.

    Raises:
        InputError: the file is missing, is not YAML or holds no mapping.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read ({error.strerror}).") from None
    except yaml.YAMLError as error:
        problem = " ".join(str(error).split())
        raise InputError(f"--config {path}: not valid YAML: {problem}") from None
    if not isinstance(content, dict):
        raise InputError(f"--config {path}: expected 'key: value' lines, for example 'lr: 0.0002'.")
    return content["settings"] if isinstance(content.get("settings"), dict) else content


def divide(given: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell (training settings, fields of the adapter's config) apart; the latter may stand among the former or under ``adapter``.

    Raises:
        InputError: ``adapter`` holds no fields.
    """
    nested = given.get("adapter") or {}
    if not isinstance(nested, dict):
        raise InputError("adapter: expected the fields of the adapter's config, for example 'adapter: {r: 8}'.")
    training: dict[str, Any] = {}
    adapter = {str(key).replace("-", "_"): value for key, value in nested.items()}
    for key, value in given.items():
        name = str(key).replace("-", "_")
        if name in TRAINING_KEYS:
            training[name] = value
        elif name != "adapter":
            adapter[name] = value
    return training, adapter


def resolve(sources: Iterable[dict[str, Any]], adapter_fields: Callable[[str], set[str]]) -> RunSettings:
    """Validate what was given; a later source wins over an earlier one.

    Args:
        sources: each in the spelling of YAML, for example ``{"lr": 1e-3, "lora_alpha": 16}``.
        adapter_fields: the fields of a method's config class.

    Raises:
        InputError: an unknown key, with the nearest known one, or a value out of range.
    """
    training: dict[str, Any] = {}
    adapter: dict[str, Any] = {}
    for source in sources:
        its_training, its_adapter = divide(source)
        training |= its_training
        adapter |= its_adapter
    method = str(training.get("method", RunSettings.model_fields["method"].default))
    known = adapter_fields(method)
    for name in adapter:
        if name not in known:
            raise InputError(unknown_name(name, known, method))
    try:
        return RunSettings(**training, adapter=adapter)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise InputError(f"{name}: {first['msg'].lower()}, got {first['input']!r}.") from None


def unknown_name(
    name: str, adapter_fields: set[str], method: str, spelt: str | None = None, settings: Iterable[str] = TRAINING_KEYS
) -> str:
    """What to say about a flag or key that neither training nor the method's config knows.

    Args:
        settings: those that there are beside the method's.
        spelt: as the user wrote it, ``--lora-alhpa``; the hint is then a flag, too.
    """
    known = {*settings, *adapter_fields}
    foreign = {other: ours for other, ours in KNOWN_ELSEWHERE.items() if ours in known}
    nearest = difflib.get_close_matches(name, [*known, *foreign], n=1, cutoff=0.6)
    hint = ""
    if nearest:
        ours = foreign.get(nearest[0], nearest[0])
        hint = f" Did you mean {'--' + ours.replace('_', '-') if spelt else ours}?"
    return f"{spelt or name}: neither a training setting nor a field of {method}'s config.{hint} `inlay train --method-help` lists them."
