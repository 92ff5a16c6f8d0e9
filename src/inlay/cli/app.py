"""The typer app: one binary, a file a verb. Nothing here imports torch; a verb does, once it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from .chat import chat
from .combine import CombineCommand, combine
from .compare import compare
from .convert import convert
from .diff import diff
from .extract import extract
from .inspect import inspect
from .merge import merge
from .methods import methods
from .output import INTERRUPTED, UNEXPECTED, USAGE, fail, prepare
from .plan import plan
from .quantize import quantize
from .quickstart import quickstart
from .train import MethodCommand, train

app = typer.Typer(
    name="inlay",
    help="Adapters set flush into a frozen model: plan, train, compare, talk, inspect, merge, combine, convert, diff, extract.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"inlay {version('inlay')}")
        raise typer.Exit


@app.callback()
def root(
    _: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks and what the libraries below say.")] = False,
) -> None:
    """Adapters set flush into a frozen model: plan, train, compare, talk, inspect, merge, combine, convert, diff, extract."""


app.command(cls=MethodCommand)(train)
app.command()(compare)
app.command()(chat)
app.command()(inspect)
app.command(cls=CombineCommand)(merge)
app.command(cls=CombineCommand)(combine)
app.command()(convert)
app.command()(diff)
app.command()(extract)
app.command()(methods)
app.command(cls=MethodCommand)(plan)
app.command()(quantize)
app.command()(quickstart)


def run(words: list[str]) -> int:
    """Carry out one command line; the exit code."""
    debug = "--debug" in words
    words = ["--debug", *(word for word in words if word != "--debug")] if debug else words  # welcome anywhere on the line
    prepare(debug)
    try:
        code = app(words, standalone_mode=False)
    except KeyboardInterrupt:
        return fail("interrupted.", INTERRUPTED)
    except Exception as error:
        if debug:
            raise
        return _explain(error)
    return code if isinstance(code, int) else 0


def _explain(error: Exception) -> int:
    """One line for the error, and the exit code."""
    from inlay.training.errors import InputError

    if hasattr(error, "format_message"):  # what typer raises on a flag or argument it cannot read
        return fail(_usage(error), USAGE)
    if isinstance(error, typer.Abort):
        return fail("interrupted.", INTERRUPTED)
    if isinstance(error, InputError):
        return fail(str(error), USAGE)
    if isinstance(error, ModuleNotFoundError):
        return fail(f"the package '{error.name}' is missing; install it with pip install 'inlay[train]'.", UNEXPECTED)
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, (FloatingPointError, RuntimeError, OSError, ValueError)) else f"{type(error).__name__}: "
    return fail(f"{kind}{text} (--debug shows where)", UNEXPECTED)


def _usage(error: Exception) -> str:
    message = str(error.format_message())  # type: ignore[attr-defined]
    context = getattr(error, "ctx", None)
    where = context.command_path if context is not None else "inlay"
    return f"{message if message.endswith('?') else message.rstrip('.') + '.'} `{where} --help` lists what it takes."
