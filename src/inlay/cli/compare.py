"""``inlay compare``: base and tuned answers side by side, and how much of the difference is more than chance."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, console, counting, emit, short, table
from .tuned import Adapter, Device, Dtype, Model, Quantization, load

SHOWN = 10  # exchanges on the screen; --json and the report have all
MAX_LENGTH = 4096  # tokens of a row; longer ones are cut


def compare(
    adapter: Adapter,
    model: Model = None,
    data: Annotated[Path | None, typer.Option("--data", help="Held-out rows with reference answers.")] = None,
    prompt: Annotated[list[str] | None, typer.Option("--prompt", help="A question of your own; may be repeated.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 128,
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use the first so many rows of --data only.")] = None,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Json = False,
) -> None:
    """Compare base and tuned: answers, perplexity, token accuracy, exact matches, with paired bootstrap intervals.

    The base is the same model with the adapter switched off, so both see exactly the same weights and prompts.
    """
    from inlay.training.errors import InputError

    if data is None and not prompt:
        raise InputError("nothing to compare on: give --data held_out.jsonl, or --prompt 'a question'.")
    screen = console(to_stderr=as_json)
    from inlay.training import data as files
    from inlay.training.data import Sample

    samples = files.read(data, "--data").samples[:limit] if data is not None else []
    tuned = load(model, adapter, dtype, device, quantization)

    from inlay.training.evaluate import Comparison
    from inlay.training.evaluate import compare as measure
    from inlay.training.masking import Encoder
    from inlay.training.models import positions

    encoder = Encoder(tuned.tokenizer)
    encoded = encoder.encode_all(samples, min(MAX_LENGTH, positions(tuned.model.config)))
    asked = [Sample("--prompt", [{"role": "user", "content": text}, {"role": "assistant", "content": ""}]) for text in prompt or []]
    stop = encoder.stop_tokens(encoded.rows)
    with counting(screen, "comparing base and tuned", 4 * len(encoded.rows) + 2 * len(asked)) as advance:
        measured = measure(tuned.model, tuned.tokenizer, encoded.kept, encoded.rows, stop, None, max_new_tokens, advance)
        free = measure(tuned.model, tuned.tokenizer, asked, [], stop, None, max_new_tokens, advance)
    own = [_without_reference(exchange) for exchange in free.exchanges]
    result = Comparison(measured.rows, measured.metrics, [*measured.exchanges, *own])
    if as_json:
        facts = {"model": tuned.base, "quantization": tuned.quantization, "adapter": str(adapter), "cut_rows": encoded.cut}
        emit(facts | result.as_dict())
        return
    if tuned.quantization != "none":
        screen.print(f"[dim]base in {tuned.quantization}, for both[/]")
    show(result, screen)


def _without_reference(exchange: Any) -> Any:
    from dataclasses import replace

    return replace(exchange, reference=None, base_exact=None, tuned_exact=None)


def show(result: Any, screen: Any) -> None:
    """Metrics and the first answers, for people."""
    facts = result.as_dict()
    if facts["answers"]:
        made = table("prompt", *(["reference"] if result.rows else []), "base", "tuned")
        made.padding = (0, 2, 1, 0)  # a blank line between the rows
        for row in facts["answers"][-SHOWN:] if not result.rows else facts["answers"][:SHOWN]:
            cells = [short(row["prompt"]), *([short(row["reference"] or "–")] if result.rows else [])]
            for answer, hit in ((row["base"], row["base_exact"]), (row["tuned"], row["tuned_exact"])):
                cells.append(f"[green]{short(answer)}[/]" if hit else short(answer) or "[dim](nothing)[/]")
            made.add_row(*cells)
        screen.print(made)
        if len(facts["answers"]) > SHOWN:
            screen.print(f"[dim]{len(facts['answers']) - SHOWN} more answers with --json[/]")
    if facts["metrics"]:
        screen.print()
        screen.print(f"{result.rows} rows, the same for both; intervals by paired bootstrap, 95 %")
        screen.print(metric_table(facts["metrics"]))


def metric_table(metrics: dict[str, dict[str, Any]]) -> Any:
    """The lines of ``Comparison.as_dict()["metrics"]`` as a table."""
    from inlay.training.report import change, figure

    made = table("measure", "base", "tuned", "difference", "95 % interval", "verdict", right=("base", "tuned", "difference"))
    for name, line in metrics.items():
        interval = line["interval_95"]
        bounds = f"{change(interval['low'], name)} … {change(interval['high'], name)}" if interval else "–"
        colour = {"better": "green", "worse": "red"}.get(line["verdict"], "dim")
        made.add_row(
            name,
            figure(line["base"], name),
            figure(line["tuned"], name),
            change(line["tuned"] - line["base"], name),
            bounds,
            f"[{colour}]{line['verdict']}[/]",
        )
    return made
