"""``inlay extract``: what training changed of a full model, as a LoRA of the base."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .combine import Out, parsed_rank, write
from .output import Json, console, counting, emit, table
from .tuned import check_folder, check_new, hush


def extract(
    base: Annotated[Path, typer.Argument(help="Folder of the base model.", show_default=False)],
    tuned: Annotated[Path, typer.Argument(help="Folder of the model that was trained from it.", show_default=False)],
    out: Out,
    rank: Annotated[str, typer.Option("--rank", help="A rank, or the share of each change that is to stay (0.95).")] = "16",
    retrain_others: Annotated[
        bool, typer.Option("--retrain-others", help="Bring along biases, norms and other tensors that are no matrices.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Make a LoRA of two full models: of the weights that differ, read tensor by tensor from their files."""
    from inlay.training.errors import InputError

    for folder in (base, tuned):
        check_folder(folder, "model", "config.json")
    check_new(out)
    share = parsed_rank(rank)
    assert share is not None
    hush()
    from inlay.operations.extract import extract as take_out

    screen = console(to_stderr=as_json)
    try:
        with counting(screen, "comparing weights", 1000) as advance:
            shown = 0

            def progress(done: int, total: int) -> None:
                nonlocal shown
                advance(1000 * done // total - shown)
                shown = 1000 * done // total

            found = take_out(base, tuned, share, retrain_others=retrain_others, progress=progress)
    except (ValueError, OSError) as error:
        raise InputError(f"{base}, {tuned}: {' '.join(str(error).split())}") from error
    write(out, found.tensors, found.config, None, _origin(found, base, tuned))
    size = sum(t.nbytes for t in found.tensors.values())
    if as_json:
        emit(
            {
                "out": str(out),
                "r": found.config.r,
                "bytes": size,
                "same": found.same,
                "layers": [asdict(layer) for layer in found.layers],
                "others": [asdict(other) for other in found.others],
            }
        )
        return
    _show(found, out, size, screen)


def _origin(found: Any, base: Path, tuned: Path) -> str:
    """For the card: what it is the difference of, and what it lacks."""
    from inlay.formats.card import table as markdown

    rows = [(f"`{layer.name}`", str(layer.rank), f"{layer.norm:.3g}", f"{layer.error:.1e}") for layer in found.layers]
    left = [other.name for other in found.others if not other.kept]
    text = f"What training changed from `{base.name}` to `{tuned.name}`, as LoRA. The error is what it lacks, relative to the change."
    return f"{text}\n\n{markdown(('layer', 'rank', 'norm', 'error'), rows)}" + (
        f"\n\nLeft out, since no product of two factors stands for it: {', '.join(f'`{name}`' for name in left)}." if left else ""
    )


def _show(found: Any, out: Path, size: int, screen: Any) -> None:
    made = table("layer", "rank", "norm", "error", right=("rank", "norm", "error"))
    for layer in found.layers:
        made.add_row(layer.name, str(layer.rank), f"{layer.norm:.3g}", f"{layer.error:.1e}")
    screen.print(made)
    screen.print("[dim]error: what LoRA lacks of the change, relative to its norm[/]")
    if found.others:
        rest = table("no matrix", "shape", "norm", "", right=("norm",))
        for other in found.others:
            rest.add_row(other.name, str(list(other.shape)), f"{other.norm:.3g}", "saved" if other.kept else "[yellow]left out[/]")
        screen.print(rest)
        if not all(other.kept for other in found.others):
            screen.print("[dim]--retrain-others brings along what was left out[/]")
    screen.print(f"[bold]{out}[/]: LoRA of {len(found.layers)} weights, {found.same} tensors are the same, {size / 1e6:,.1f} MB")
