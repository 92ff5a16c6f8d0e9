"""A base model with an adapter set into it, as compare, chat and merge need it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import hush

Model = Annotated[str | None, typer.Option("--model", help="Folder or hub id of the base model; the one the adapter names when not given.")]
Adapter = Annotated[Path, typer.Option("--adapter", help="Adapter folder, as `inlay train` writes it.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or mps.")]
Quantization = Annotated[
    str | None,
    typer.Option("--quantization", help="Of the base: none, nf4, fp4, int4 or int8; as in the adapter's training when not given."),
]


@dataclass(frozen=True)
class Tuned:
    """The model (with the adapter in it, when there is one), its tokenizer and what the base is called and kept as."""

    model: Any
    tokenizer: Any
    base: str
    adapter: Path | None
    quantization: str


def check_folder(folder: Path, kind: str, holds: str, flag: str = "") -> None:
    """
    Args:
        kind: ``"adapter"`` or ``"model"``.
        holds: a file that every folder of this kind has.
        flag: under which it was named, with a space behind.

    Raises:
        InputError: it is no such folder.
    """
    from inlay.training.errors import InputError, near_miss

    if (folder / holds).is_file():
        return
    siblings = [entry.name for entry in folder.parent.iterdir() if entry.name != folder.name] if folder.parent.is_dir() else []
    raise InputError(f"{flag}{folder}: no {kind} folder (no {holds} in there).{near_miss(folder.name, siblings)}")


def check_adapters(*folders: Path, flag: str = "") -> None:
    """
    Raises:
        InputError: one of them is no adapter's folder.
    """
    for folder in folders:
        check_folder(folder, "adapter", "adapter_config.json", flag)


def check_new(out: Path) -> None:
    """
    Raises:
        InputError: there is something of this name.
    """
    from inlay.training.errors import InputError

    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new folder.")


def base_of(model: str | None, adapter: Path | None) -> str:
    """The base model to load: the one given, the one the adapter names, or the bundled one.

    Raises:
        InputError: the adapter folder cannot be read, or names no base.
    """
    from inlay.training.errors import InputError
    from inlay.training.models import adapter_base, bundled_base
    from inlay.training.settings import BUNDLED

    named = adapter_base(adapter) if adapter is not None else None
    if model is not None:
        return model
    if adapter is None:
        return BUNDLED
    if not named:
        raise InputError(f"--adapter {adapter}: does not name its base model; give it with --model.")
    # Trained on the bundled base somewhere else, the adapter names that machine's copy of it.
    return BUNDLED if Path(named).parts[-3:] == bundled_base().parts[-3:] else named


def quantization_of(adapter: Path | None) -> str:
    """How the base was kept while the adapter was trained, as the record of the run says; ``none`` where there is no record."""
    from inlay.training.errors import InputError
    from inlay.training.sft import CHECKPOINTS, recorded_settings

    if adapter is None:
        return "none"
    run = adapter.parent.parent if adapter.absolute().parent.name == CHECKPOINTS else adapter
    try:
        return str(recorded_settings(run).get("quantization", "none"))
    except InputError:
        return "none"


def load(model: str | None, adapter: Path | None, dtype: str = "auto", device: str = "auto", quantization: str | None = None) -> Tuned:
    """Load base, tokenizer and adapter.

    Args:
        quantization: of the base; as in the adapter's training where None.

    Raises:
        InputError: one of them is missing or does not fit.
    """
    hush()
    base = base_of(model, adapter)
    from inlay.training import adapters, masking, models
    from inlay.training.errors import InputError

    if dtype not in ("auto", "float32", "bfloat16", "float16"):
        raise InputError(f"--dtype {dtype}: give auto, float32, bfloat16 or float16.")
    if device not in ("auto", "cpu", "cuda", "mps"):
        raise InputError(f"--device {device}: give auto, cpu, cuda or mps.")
    how = models.choose_quantization(quantization_of(adapter) if quantization is None else quantization)
    adapters.serve_peft()
    tokenizer = models.load_tokenizer(base, adapter)
    masking.apply_template_choice(tokenizer, "auto")
    loaded = models.load_model(base, dtype, device, quantization=how)
    return Tuned(adapters.load_adapter(loaded, adapter) if adapter is not None else loaded, tokenizer, base, adapter, how)
