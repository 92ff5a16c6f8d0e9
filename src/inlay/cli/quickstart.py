"""``inlay quickstart``: a whole run on the small model and the data inside the package, in a few minutes on a laptop."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from .output import INTERRUPTED, Json, console, counting, emit, hush

EPOCHS = 6
BATCH_SIZE = 16
LEARNING_RATE = 3e-3
RANK = 16
ALPHA = 32
TARGETS = "all-linear"
MAX_LENGTH = 256
ANSWER_TOKENS = 64  # the longest reference is well below


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder of the run.")] = Path("runs/quickstart"),
    quantization: Annotated[str, typer.Option("--quantization", help="Of the base: none, nf4, fp4, int4 or int8.")] = "none",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier quickstart in the same folder.")] = False,
    as_json: Json = False,
) -> None:
    """Train the bundled base on the bundled shell and kubectl questions, and compare base and tuned on 60 held-out ones."""
    hush()
    screen = console(to_stderr=as_json)
    from inlay.training.models import bundled_data, choose_quantization
    from inlay.training.settings import RunSettings
    from inlay.training.sft import RECORD, REPORT, train, write_json

    from .compare import show
    from .progress import Screen

    screen.print("Training an adapter on the small bundled model: questions about shell and kubectl commands, and their answers.")
    settings = RunSettings(
        quantization=choose_quantization(quantization),  # pyright: ignore[reportArgumentType]
        data=bundled_data("commands"),
        output=out,
        epochs=EPOCHS,
        batch_size=BATCH_SIZE,
        lr=LEARNING_RATE,
        max_length=MAX_LENGTH,
        samples=0,  # the held-out rows are compared below
        overwrite=overwrite,
        adapter={"r": RANK, "lora_alpha": ALPHA, "target_modules": TARGETS},
    )
    result = train(settings, Screen(screen), command=["inlay", *sys.argv[1:]])
    if result.interrupted:
        from .train import show as show_run

        show_run(result, screen)
        raise typer.Exit(INTERRUPTED)

    from inlay.training import data
    from inlay.training.evaluate import compare
    from inlay.training.masking import Encoder
    from inlay.training.report import duration, write_report

    from .tuned import load

    tuned = load(settings.model, out)  # from the files, as everyone else will
    encoder = Encoder(tuned.tokenizer)
    held_out = encoder.encode_all(data.read(bundled_data("commands_heldout")).samples, MAX_LENGTH)
    with counting(screen, "60 held-out questions, base and tuned", 4 * len(held_out.rows)) as advance:
        comparison = compare(
            tuned.model, tuned.tokenizer, held_out.kept, held_out.rows, encoder.stop_tokens(held_out.rows), None, ANSWER_TOKENS, advance
        )
    record = result.record | {"comparison": comparison.as_dict()}
    write_json(out / RECORD, record)
    write_report(out / REPORT, record, result.metrics, comparison)
    if as_json:
        emit({"output": str(out), "report": str(out / REPORT), "results": record["results"], **comparison.as_dict()})
        return
    show(comparison, screen)
    screen.print(f"\n[bold]Done[/]: {result.record['results']['steps']} steps in {duration(record['results']['training_seconds'])}. Next:")
    screen.print(f"  open {out / REPORT}")
    screen.print(f"  inlay chat --adapter {out}")
    screen.print(f"  inlay inspect {out}")
    screen.print("  inlay train YOUR_DATA.jsonl --model YOUR_MODEL")
