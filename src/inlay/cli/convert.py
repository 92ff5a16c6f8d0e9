"""``inlay convert``: an adapter of any method on weights becomes LoRA, and what that costs at each layer is shown."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from .combine import Base, Out, adapted, parsed_rank, write
from .output import Json, console, emit, table
from .tuned import Device, Dtype, check_adapters, check_new, hush


def convert(
    adapter: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    out: Out,
    rank: Annotated[
        str | None, typer.Option("--rank", help="A rank, or the share that is to stay (0.95); not needed for low rank.")
    ] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Write an adapter as LoRA: exactly where it is of low rank, else the nearest of a rank."""
    from inlay.training.errors import InputError

    check_adapters(adapter)
    check_new(out)
    share = parsed_rank(rank)
    hush()
    from inlay import PeftConfig
    from inlay.operations.convert import conversion, origin

    model, _ = adapted([adapter], base, dtype, device)
    try:
        found = conversion(model, share, "source_0")
    except (ValueError, TypeError) as error:
        raise InputError(f"{adapter}: {' '.join(str(error).split())}") from error
    found.config.inference_mode = True
    write(out, found.tensors, found.config, model, origin(found, adapter.name, PeftConfig.from_pretrained(adapter)))
    worst = max(found.layers, key=lambda layer: layer.error)
    if as_json:
        emit({"out": str(out), "r": found.config.r, "largest_error": worst.error, "layers": [asdict(layer) for layer in found.layers]})
        return
    screen = console()
    made = table("layer", "rank", "norm", "error", right=("rank", "norm", "error"))
    for layer in found.layers:
        made.add_row(layer.name, str(layer.rank), f"{layer.norm:.3g}", f"{layer.error:.1e}")
    screen.print(made)
    screen.print("[dim]error: what LoRA lacks of the change, relative to its norm[/]")
    size = sum(t.nbytes for t in found.tensors.values())
    screen.print(f"[bold]{out}[/]: LoRA, largest error {worst.error:.1e} at {worst.name}, {size / 1e6:,.1f} MB")
