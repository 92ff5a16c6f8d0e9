"""``inlay quantize``: a model folder with its linear layers in 4 or 8 bits, tensor by tensor; it gets its name when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from .output import Json, console, emit, hush
from .tuned import Dtype


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model; 'bundled' is the small one inside Inlay.")],
    to: Annotated[str, typer.Option("--to", help="nf4, fp4 or int4 (blocks with a scale each), or int8 (rows with a scale each).")] = "nf4",
    out: Annotated[Path, typer.Option("--out", help="Folder of the quantised model; must not exist yet.")] = Path("quantized"),
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Modules that stay as they are, by the end of their names.")] = None,
    double: Annotated[bool, typer.Option(help="Quantise the scales of the blocks, too.")] = True,
    block: Annotated[int, typer.Option(help="Numbers that share a scale.")] = 64,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Quantise a model. Each tensor is quantised as it is read, so that the model is never in memory as a whole.

    NF4, FP4 and INT8 are written as bitsandbytes does: transformers reads them with it, and Inlay without.
    """
    from inlay.kernels.quantised import FORMATS
    from inlay.training.errors import InputError, near_miss

    if to not in FORMATS:
        raise InputError(f"--to {to}: give {', '.join(FORMATS)}.{near_miss(to, list(FORMATS))}")
    if out.exists():
        raise InputError(f"--out {out}: exists already; name a new folder.")
    hush()
    from inlay.kernels.quantised_tensor import QuantizedTensor
    from inlay.training.models import load_model, load_tokenizer

    screen = console(to_stderr=as_json)
    loaded = load_model(model, dtype, "cpu", quantization=to, skip=skip, double=double, block=block)
    parameters = dict(loaded.named_parameters())
    quantised = [q for q in parameters.values() if isinstance(q, QuantizedTensor)]
    stacked = [n for n, q in parameters.items() if isinstance(q, QuantizedTensor) and q.ndim != 2]
    if stacked:
        raise InputError(f"--skip: a folder keeps experts one by one, and {stacked[0]} is a stack of them; name such stacks with --skip.")
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        folder.chmod(0o755)  # mkdtemp's 0700 is for secrets
        loaded.save_pretrained(str(folder))
        load_tokenizer(model).save_pretrained(str(folder))
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    numbers, stored = sum(q.numel() for q in quantised), sum(q.stored_bytes for q in quantised)
    left = sum(q.numel() for q in parameters.values()) - numbers
    size = sum(file.stat().st_size for file in out.iterdir())
    if as_json:
        emit(
            {"out": str(out), "to": to, "bytes": size, "quantised": numbers, "left": left, "bytes_per_parameter": stored / max(numbers, 1)}
        )
        return
    screen.print(f"[bold]{out}[/]: {to}, {size / 1e6:,.1f} MB")
    screen.print(f"{numbers:,} parameters at {stored / max(numbers, 1):.3f} bytes each; {left:,} as they were")
