"""What the user sees: tables and bars for people, one JSON object for programs, one red line for errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

UNEXPECTED = 1
USAGE = 2
INTERRUPTED = 130  # what shells give for Ctrl-C

Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything for people goes to stderr.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries below say.", hidden=True)]


def is_main_process() -> bool:
    """Whether this process is the one that speaks, under ``accelerate launch`` or torchrun."""
    return os.environ.get("RANK", "0") == "0"


def console(to_stderr: bool = False) -> Console:
    """Where human-readable output goes; silent in all processes but the first."""
    return Console(stderr=to_stderr, quiet=not is_main_process(), highlight=False, soft_wrap=False)


def fail(message: str, code: int) -> int:
    """Print the one red line and hand back the exit code."""
    line = " ".join(message.split())
    Console(stderr=True, highlight=False, soft_wrap=True).print(f"[bold red]error:[/] [red]{escape(line)}[/]")
    return code


def emit(result: dict[str, Any]) -> None:
    """The machine-readable result."""
    json.dump(result, sys.stdout, ensure_ascii=False, indent=2, default=str)
    sys.stdout.write("\n")
    sys.stdout.flush()


def prepare(debug: bool) -> None:
    """Before any library is imported: the environment in which they stay quiet, unless the user debugs."""
    if not debug:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("ACCELERATE_LOG_LEVEL", "ERROR")
        os.environ.setdefault("PYTHONWARNINGS", "ignore")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # Threads that spin while they wait make a small model sixteen times slower as soon as another program wants a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")


def hush() -> None:
    """Silence warnings and the logs below error level in this process, unless --debug was given."""
    if "--debug" in sys.argv:
        return
    import logging
    import warnings

    warnings.filterwarnings("ignore")
    for name in ("transformers", "trl", "accelerate", "datasets", "huggingface_hub", "torch", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def counting(screen: Console, what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar over ``total`` rows, on a terminal; the function it gives is called with the rows done."""
    if not screen.is_terminal or screen.quiet or total == 0:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task(what, total=total)
        yield lambda rows: progress.advance(task, rows)


def table(*columns: str, title: str | None = None, right: tuple[str, ...] = ()) -> Table:
    """A plain table; the columns named in ``right`` hold numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        made.add_column(column, justify="right" if column in right else "left", overflow="fold")
    return made


def short(text: str, width: int = 160) -> str:
    """At most ``width`` characters on one line, with markup signs taken literally."""
    line = " ".join(text.split())
    return escape(line if len(line) <= width else line[: width - 1] + "…")
