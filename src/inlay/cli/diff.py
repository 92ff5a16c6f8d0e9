"""``inlay diff``: what two adapters have in common, layer by layer."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .combine import Base, adapted
from .output import Json, console, emit, table
from .tuned import Device, Dtype, check_adapters, hush


def diff(
    a: Annotated[Path, typer.Argument(help="Adapter folder.", show_default=False)],
    b: Annotated[Path, typer.Argument(help="The other adapter folder.", show_default=False)],
    out: Annotated[Path | None, typer.Option("--out", help="Write a heat map to this .png file.", show_default=False)] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Compare two adapters layer by layer: sizes, cosine, shared subspaces, opposite signs.

    LoRA is compared from the files alone; what depends on the base's weights needs --base, or an adapter that names it.
    """
    from inlay.training.errors import InputError

    check_adapters(a, b)
    if out is not None and out.suffix.lower() != ".png":
        raise InputError(f"--out {out}: the heat map is a PNG; name it {out.with_suffix('.png').name}.")
    if out is not None and not out.parent.is_dir():
        raise InputError(f"--out {out}: there is no folder {out.parent}.")
    hush()
    from inlay.operations.diff import compare, draw

    model, alone = adapted([a, b], base, dtype, device)
    try:
        layers = compare(model, "source_0", "source_1")
    except (ValueError, TypeError) as error:
        raise InputError(f"{a}, {b}: {' '.join(str(error).split())}") from error
    if out is not None:
        draw(layers, out, f"A: {a.name}, B: {b.name}")
    if as_json:
        emit({"a": str(a), "b": str(b), "from_files_alone": alone, "layers": [asdict(layer) for layer in layers]})
        return
    _show(layers, a, b, out, console())


def _show(layers: list[Any], a: Path, b: Path, out: Path | None, screen: Any) -> None:
    numbers = ("norm A", "norm B", "|A - B|", "cosine", "reads", "writes", "signs")
    made = table("layer", *numbers, right=numbers)
    for layer in layers:
        made.add_row(
            layer.name,
            f"{layer.norm_a:.3g}",
            f"{layer.norm_b:.3g}",
            f"{layer.distance:.3g}",
            _number(layer.cosine, "+.3f"),
            _number(layer.overlap_in, ".0%"),
            _number(layer.overlap_out, ".0%"),
            _number(layer.conflicts, ".0%"),
        )
    from inlay.operations.diff import altogether

    *norms, cosine = altogether(layers)
    made.add_section()
    made.add_row("all of them", *(f"{norm:.3g}" for norm in norms), _number(cosine, "+.3f"), "", "", "")
    screen.print(made)
    screen.print(f"[dim]A: {a}; B: {b}; reads, writes: overlap of the subspaces; signs: entries in which they are opposite[/]")
    if out is not None:
        screen.print(f"[bold]{out}[/]: heat map")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
