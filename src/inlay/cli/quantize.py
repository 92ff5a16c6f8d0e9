"""``inlay quantize``: a model folder with its linear layers in 4 or 8 bits, tensor by tensor; it gets its name when it is complete."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import asdict
from os.path import commonpath
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .output import Json, console, counting, emit, hush, table
from .tuned import check_new

if TYPE_CHECKING:
    from rich.console import Console

    from inlay.initializers.start_errors import StartErrors

# Of the calibration data that are read at most.
ROWS = 512


def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub id of the model; 'bundled' is the small one inside Inlay.")],
    to: Annotated[str, typer.Option("--to", help="nf4, fp4 or int4 (blocks with a scale each), or int8 (rows with a scale each).")] = "nf4",
    out: Annotated[Path, typer.Option("--out", help="Folder of the quantised model; must not exist yet.")] = Path("quantized"),
    skip: Annotated[list[str] | None, typer.Option("--skip", help="Modules that stay as they are, by the end of their names.")] = None,
    double: Annotated[bool, typer.Option(help="Quantise the scales of the blocks, too.")] = True,
    block: Annotated[int, typer.Option(help="Numbers that share a scale.")] = 64,
    dtype: Annotated[
        str, typer.Option("--dtype", help="Of all that is not quantised: auto (as in the model's files), float32 or bfloat16.")
    ] = "auto",
    report_init: Annotated[
        bool, typer.Option("--report-init", help="Show the errors that are left after each start of LoRA: plain, LoftQ, CLoQ.")
    ] = False,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Rows for --report-init: three in four to start from, the others to measure on.")
    ] = None,
    rank: Annotated[int, typer.Option("--rank", help="Of the LoRA in --report-init.", min=1)] = 16,
    as_json: Json = False,
) -> None:
    """Quantise a model. Each tensor is quantised as it is read, so that the model is never in memory as a whole.

    NF4, FP4 and INT8 are written as bitsandbytes does: transformers reads them with it, and Inlay without.

    With --report-init, the original is read once more, a weight at a time, for what a LoRA of --rank can make up for.
    """
    from inlay.kernels.quantised import FORMATS
    from inlay.training.errors import InputError, near_miss

    if to not in FORMATS:
        raise InputError(f"--to {to}: give {', '.join(FORMATS)}.{near_miss(to, list(FORMATS))}")
    if calibration is not None and not report_init:
        raise InputError("--calibration: only --report-init has a use for data; quantising has none.")
    check_new(out)
    hush()
    from inlay.formats.folder import as_usual
    from inlay.kernels.quantised_tensor import QuantizedTensor
    from inlay.training.models import load_model, load_tokenizer

    screen = console(to_stderr=as_json)
    tokenizer = load_tokenizer(model)
    batches = _batches(calibration, tokenizer, model) if calibration is not None else None
    loaded = load_model(model, dtype, "cpu", quantization=to, as_stored=True, skip=skip, double=double, block=block)
    parameters = dict(loaded.named_parameters())
    quantised = [q for q in parameters.values() if isinstance(q, QuantizedTensor)]
    out.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    try:
        loaded.save_pretrained(str(folder))
        tokenizer.save_pretrained(str(folder))
        as_usual(folder)
        folder.rename(out)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    numbers, stored = sum(q.numel() for q in quantised), sum(q.stored_bytes for q in quantised)
    left = sum(q.numel() for q in parameters.values()) - numbers
    size = sum(file.stat().st_size for file in out.iterdir())
    errors = _errors(loaded, batches, rank, screen) if report_init else None
    if as_json:
        found: dict[str, Any] = {"out": str(out), "to": to, "bytes": size, "quantised": numbers, "left": left}
        found["bytes_per_parameter"] = stored / max(numbers, 1)
        emit(found | ({} if errors is None else {"starts": asdict(errors) | {"weight": errors.weight, "output": errors.output}}))
        return
    screen.print(f"[bold]{out}[/]: {to}, {size / 1e6:,.1f} MB")
    screen.print(f"{numbers:,} parameters at {stored / max(numbers, 1):.3f} bytes each; {left:,} as they were")
    if errors is not None:
        _show(errors, screen)


def _batches(path: Path, tokenizer: Any, model: str) -> tuple[list[Any], list[Any]]:
    """Rows to start from, and rows to measure on."""
    import torch

    from inlay.training.data import read
    from inlay.training.errors import InputError
    from inlay.training.masking import Encoder, apply_template_choice
    from inlay.training.models import context_length

    apply_template_choice(tokenizer, "auto")
    samples = read(path, "--calibration").samples[:ROWS]
    rows = Encoder(tokenizer, "all").encode_all(samples, min(1024, context_length(model))).rows
    if len(rows) < 4:
        raise InputError(f"--calibration {path}: {len(rows)} rows can be used; give at least 4, and better a hundred.")
    batches = [{"input_ids": torch.tensor([row.input_ids])} for row in rows]
    return [b for i, b in enumerate(batches) if i % 4 != 3], batches[3::4]


def _errors(loaded: Any, batches: tuple[list[Any], list[Any]] | None, rank: int, screen: Console) -> StartErrors:
    from inlay.initializers.start_errors import start_errors

    given, held_out = batches or (None, None)
    with counting(screen, "measuring starts", 1000) as advance:
        return start_errors(
            loaded,
            None,
            given,
            held_out,
            rank=rank,
            progress=lambda done, total: advance(1000 * done // total - 1000 * (done - 1) // total),
        )


def _show(errors: StartErrors, screen: Console) -> None:
    from inlay.initializers.start_errors import STARTS

    starts = list(errors.output)
    made = table("layer", *(STARTS[s] for s in starts), right=tuple(STARTS.values()))
    names = [layer.name.removesuffix(".weight") for layer in errors.layers]
    common = len(commonpath([name.replace(".", "/") for name in names]))
    for name, layer in zip(names, errors.layers, strict=True):
        made.add_row(name[common:].lstrip(".") or name, *(f"{layer.output[s]:.2%}" for s in starts))
    made.add_row("[bold]all[/]", *(f"[bold]{errors.output[s]:.2%}[/]" for s in starts))
    screen.print(f"\nError of the outputs ({errors.measured_on}) with a LoRA of rank {errors.rank}:")
    screen.print(made)
    screen.print("[dim]LoftQ: `replace_lora_weights_loftq`; CLoQ: `initialize_lora_cloq_weights`[/]")
