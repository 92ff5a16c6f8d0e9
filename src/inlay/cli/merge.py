"""``inlay merge``: base and adapter become one ordinary model folder, checked before it is given its name."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, console, emit
from .tuned import Adapter, Device, Dtype, Model, load

PROBE_TEXT = "The quick brown fox jumps over the lazy dog. 0123456789 kubectl get pods -A"
# Largest difference of a logit, relative to the largest logit, that rounding explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


def merge(
    adapter: Adapter,
    out: Annotated[Path, typer.Option("--out", help="Folder of the merged model; must not exist yet.")],
    model: Model = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Merge an adapter into its base model and write an ordinary model folder.

    The logits of a probe text are compared before merging, after merging, and once more from the files on disk.
    """
    from inlay.training.errors import InputError

    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new folder.")
    screen = console(to_stderr=as_json)
    tuned = load(model, adapter, dtype, device)
    if tuned.model.active_peft_config.is_prompt_learning:
        raise InputError(f"--adapter {adapter}: it acts on the inputs of the model, not on its weights, so it cannot be merged.")
    wanted = probe(tuned.model, tuned.tokenizer)
    try:
        merged = tuned.model.merge_and_unload(safe_merge=True)
    except (ValueError, NotImplementedError, TypeError, AttributeError) as error:
        raise InputError(f"--adapter {adapter}: cannot be merged: {' '.join(str(error).split())}") from error
    error_merged = relative_error(wanted, probe(merged, tuned.tokenizer))
    number_type = str(merged.dtype).removeprefix("torch.")
    _check(error_merged, number_type, "merging changes the logits")

    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 is for secrets
        merged.save_pretrained(str(folder))
        tuned.tokenizer.save_pretrained(str(folder))
        del merged
        error_saved = relative_error(wanted, _probe_saved(folder, number_type, device))
        _check(error_saved, number_type, "the written files give other logits")
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        emit({"out": str(out), "dtype": number_type, "bytes": size, "error_merged": error_merged, "error_saved": error_saved})
        return
    screen.print(f"[bold]{out}[/]: merged model, {number_type}, {size / 1e6:,.1f} MB")
    screen.print(f"largest error of a logit, relative to the largest one: {error_merged:.1e} merged, {error_saved:.1e} read back from disk")


def probe(model: Any, tokenizer: Any) -> Any:
    """The logits of the probe text, in float32 on the CPU."""
    import torch

    ids = tokenizer(PROBE_TEXT, return_tensors="pt")["input_ids"].to(model.device)
    with torch.inference_mode():
        return model(input_ids=ids).logits.float().cpu()


def _probe_saved(folder: Path, number_type: str, device: str) -> Any:
    from inlay.training.models import load_model, load_tokenizer

    return probe(load_model(str(folder), number_type, device), load_tokenizer(str(folder)))


def relative_error(wanted: Any, found: Any) -> float:
    """max |wanted - found| / max |wanted|."""
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-12))


def _check(error: float, number_type: str, what: str) -> None:
    if not error <= TOLERANCE[number_type]:
        raise RuntimeError(f"{what} by {error:.1e} of the largest one, more than {number_type} explains; nothing was written.")
