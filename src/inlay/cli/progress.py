"""The training run as seen on a terminal: what was read, a bar with loss, speed and time left, the validations."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from inlay.training.events import Listener

from .output import counting

LINES_WITHOUT_TERMINAL = 10  # how often a run reports into a log file
SHOWN_SAMPLE = 1200  # characters


class Screen(Listener):
    """Draws the events of a run."""

    def __init__(self, screen: Console) -> None:
        self.screen = screen
        self.bar: Progress | None = None
        self.task: TaskID | None = None
        self.first = self.last = 0

    def note(self, message: str) -> None:
        self.screen.print(escape(message), style="yellow")

    def data_ready(self, facts: dict[str, Any]) -> None:
        train, validation = facts["train"], facts["validation"]
        self.screen.print(f"[bold]{escape(str(facts['path']))}[/]: {facts['schema']} rows; chat template: {escape(facts['chat_template'])}")
        share = train["masked_tokens"] / max(1, train["tokens"])
        self.screen.print(
            f"{train['rows']:,} rows to train on: {train['tokens']:,} tokens, of them {train['masked_tokens']:,} masked ({share:.0%}), "
            f"{train['trained_tokens']:,} carry the loss; every mask verified"
        )
        if validation["rows"]:
            how = "kept aside" if facts["kept_aside"] else "from --val"
            self.screen.print(f"{validation['rows']:,} rows {how} for validation")
        else:
            self.screen.print("no validation: all rows are trained on (--val-fraction or --val sets some aside)")
        for name, part in (("training", train), ("validation", validation)):
            if part["cut_rows"]:
                self.note(f"{part['cut_rows']:,} {name} rows are longer than {facts['max_length']:,} tokens and were cut")
            if part["dropped_rows"]:
                self.note(f"{part['dropped_rows']:,} {name} rows were left out: their answer starts beyond {facts['max_length']:,} tokens")
        self.screen.print("[dim]the first sample, with what is trained on in green:[/]")
        sample = Text()
        for text, trained in facts["sample"]:
            sample.append(text, style="green" if trained else "dim")
        self.screen.print(sample[:SHOWN_SAMPLE] if len(sample) > SHOWN_SAMPLE else sample)
        self.screen.print()

    def training_started(self, first_step: int, last_step: int) -> None:
        self.first, self.last = first_step, last_step
        if first_step:
            self.screen.print(f"resuming after step {first_step}")
        if self.screen.is_terminal and not self.screen.quiet:
            self.bar = Progress(
                TextColumn("[bold]training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TextColumn("{task.fields[speed]} tokens/s"),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                console=self.screen,
            )
            self.bar.start()
            self.task = self.bar.add_task("training", total=last_step, completed=first_step, loss="–", speed="–")

    def stepped(self, line: dict[str, Any]) -> None:
        loss, speed, step = f"{line['loss']:.3f}", f"{line['tokens_per_second']:,.0f}", line["step"]
        if self.bar is not None and self.task is not None:
            self.bar.update(self.task, completed=step, loss=loss, speed=speed)
            return
        every = max(1, (self.last - self.first) // LINES_WITHOUT_TERMINAL)
        if (step - self.first) % every == 0 or step == self.last:
            self.screen.print(f"step {step}/{self.last}  loss {loss}  {speed} tokens/s")

    def validated(self, line: dict[str, Any]) -> None:
        accuracy = f", token accuracy {line['val_token_accuracy']:.1%}" if "val_token_accuracy" in line else ""
        self.screen.print(f"step {line['step']}: validation loss {line['val_loss']:.4f}{accuracy}")

    def training_ended(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def counting(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        return counting(self.screen, what, total)
