"""``inlay train``: its flags are the fields of RunSettings and, beside them, the fields of the method's own config."""

from __future__ import annotations

import inspect as introspection
import sys
from collections.abc import Callable
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from typer.core import TyperCommand

from inlay.training.settings import RunSettings, read_config, resolve, unknown_name

from .output import INTERRUPTED, console, emit, hush, is_main_process, table

ADAPTER_FIELDS = "adapter fields"  # where the parsed flags of the method wait in the context


class MethodCommand(TyperCommand):
    """Takes the flags that belong to the adapter's config out of the line before typer reads the rest."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        known = {spelling for parameter in self.params for spelling in (*parameter.opts, *parameter.secondary_opts)}
        help_flags = set(self.get_help_option_names(ctx))
        known |= help_flags
        if help_flags & set(args):
            return super().parse_args(ctx, args)
        unknown = [word for word in args if word.startswith("--") and word != "--" and word.split("=")[0] not in known]
        ctx.meta[ADAPTER_FIELDS], rest = take_adapter_flags(args, known, _method_in(args)) if unknown else ({}, args)
        return super().parse_args(ctx, rest)


def take_adapter_flags(words: list[str], known: set[str], method: str) -> tuple[dict[str, Any], list[str]]:
    """Split a line into (fields of the method's config, all other words).

    ``--name value`` and ``--name=value``; a yes-or-no field also as ``--name`` and ``--no-name``; a repeated flag makes a list.

    Raises:
        InputError: a flag that nobody knows, with the nearest known one, or one without its value.
    """
    from inlay.training import adapters
    from inlay.training.errors import InputError

    fields = set(adapters.config_fields(method))
    found: dict[str, Any] = {}
    rest: list[str] = []
    position = 0
    while position < len(words):
        word = words[position]
        position += 1
        flag, equals, value = word.partition("=")
        if word == "--":
            rest += words[position - 1 :]
            break
        if not word.startswith("--") or flag in known:
            rest.append(word)
            continue
        name = flag[2:].replace("-", "_")
        if name not in fields and name.startswith("no_") and adapters.is_switch(method, name[3:]):
            found[name[3:]] = False
            continue
        if name not in fields:
            raise InputError(unknown_name(name, fields, method, flag, {flag.lstrip("-").replace("-", "_") for flag in known}))
        following = words[position] if position < len(words) else None
        if equals:
            given: Any = value
        elif adapters.is_switch(method, name) and (following is None or following.lower() not in ("true", "false", "yes", "no")):
            given = True
        elif following is None or following.startswith("--"):
            raise InputError(f"{flag}: needs a value, for example {flag}=...")
        else:
            given = following
            position += 1
        found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), given] if name in found else given
    return found, rest


def _method_in(words: list[str]) -> str:
    """The method that the line, or its config file, names."""
    values = {"--method": "", "--config": ""}
    for number, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag in values:
            values[flag] = value if equals else next(iter(words[number + 1 : number + 2]), "")
    if values["--method"]:
        return values["--method"]
    return str(read_config(Path(values["--config"])).get("method", "lora")) if values["--config"] else "lora"


def flags_from_settings(function: Callable[..., None]) -> Callable[..., None]:
    """Give the function one flag for every field of RunSettings."""
    hints = get_type_hints(function, include_extras=True)
    parameters = [
        parameter.replace(annotation=hints[parameter.name])
        for parameter in introspection.signature(function).parameters.values()
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    for name, field in RunSettings.model_fields.items():
        if name in ("adapter", "data"):
            continue
        kind, choices = _flag_type(field.annotation)
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        option = typer.Option(
            f"--{name.replace('_', '-')}",
            help=field.description,
            rich_help_panel=str(extra.get("panel", "Options")),
            show_default=field.default not in (None, False),
            metavar="|".join(choices) or None,
        )
        annotation = Annotated[kind | None, option]
        parameters.append(
            introspection.Parameter(name, introspection.Parameter.POSITIONAL_OR_KEYWORD, default=field.default, annotation=annotation)
        )
    function.__signature__ = introspection.Signature(parameters)  # type: ignore[attr-defined]
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


def _flag_type(annotation: Any) -> tuple[type, tuple[str, ...]]:
    """(what typer parses, the admitted words of a Literal, which RunSettings itself checks)."""
    if get_origin(annotation) is Literal:
        return str, get_args(annotation)
    if isinstance(annotation, UnionType):
        return next(part for part in get_args(annotation) if part is not NoneType), ()
    return annotation, ()


@flags_from_settings
def train(
    ctx: typer.Context,
    data: Annotated[
        Path | None,
        typer.Argument(
            help="Training rows: .jsonl, .json, .csv or .parquet with messages, conversations, prompt/completion, "
            "instruction/output, question/answer or text.",
            show_default=False,
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML with the same names; flags win. A run.json works too.")] = None,
    method_help: Annotated[bool, typer.Option("--method-help", help="List the fields of --method's config and stop.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what memory the run would need, and stop.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout; everything for people goes to stderr.")] = False,
    **flags: Any,
) -> None:
    """Fine-tune a model on your data with an adapter.

    Every field of the adapter's config is a flag as well: --r 16 --lora-alpha 32 --target-modules q_proj,v_proj --use-rslora.
    """
    hush()
    given = {name: value for name, value in flags.items() if _was_given(ctx, name)}
    if data is not None:
        given["data"] = data
    screen = console(to_stderr=as_json)
    if method_help:
        _show_method(given.get("method", "lora"), screen, as_json)
        return
    settings = settings_from(given, ctx.meta.get(ADAPTER_FIELDS, {}), config)
    if plan:
        from .plan import plan_run

        plan_run(settings, as_json)
        return

    from inlay.training.sft import train as run

    from .progress import Screen

    result = run(settings, Screen(screen), command=["inlay", *sys.argv[1:]])
    if is_main_process():
        if as_json:
            emit(summary(result))
        else:
            show(result, screen)
    if result.interrupted:
        raise typer.Exit(INTERRUPTED)


def _was_given(ctx: Any, name: str) -> bool:
    source = ctx.get_parameter_source(name)
    return source is not None and source.name != "DEFAULT"


def settings_from(flags: dict[str, Any], adapter: dict[str, Any], config: Path | None) -> RunSettings:
    """Flags over config file over, for --resume without data, the record of the run in --output.

    Raises:
        InputError: an unknown name or a value out of range.
    """
    from inlay.training.adapters import config_fields

    sources = []
    if flags.get("resume") and "data" not in flags and config is None and flags.get("output"):
        from inlay.training.sft import recorded_settings

        sources.append(recorded_settings(Path(flags["output"])) | {"overwrite": False})
    if config is not None:
        sources.append(read_config(config))
    return resolve([*sources, flags, {"adapter": adapter}], lambda method: set(config_fields(method)))


def summary(result: Any) -> dict[str, Any]:
    """What --json prints: where the files are, the figures, the comparison without its texts."""
    comparison = result.record.get("comparison", {})
    return {
        "output": str(result.folder),
        "status": result.record["status"],
        "report": str(result.folder / "report.html"),
        "results": result.record["results"],
        "parameters": {key: result.record["parameters"][key] for key in ("trainable", "total")},
        "data": {key: result.record["data"][key] for key in ("schema", "train", "validation")},
        "metrics": comparison.get("metrics", {}),
    }


def show(result: Any, screen: Any) -> None:
    """The end of a run, for people."""
    from inlay.training.report import duration

    record, results = result.record, result.record["results"]
    parameters = record["parameters"]
    share = 100 * parameters["trainable"] / parameters["total"]
    how = "Stopped" if result.interrupted else "Done"
    screen.print(f"\n[bold]{how}[/] after {results['steps']} steps in {duration(results['training_seconds'])}")
    screen.print(f"{parameters['trainable']:,} of {parameters['total']:,} parameters trained ({share:.2f} %)")
    if results["best_step"] is not None:
        screen.print(f"best validation loss {results['val_loss']:.4f} at step {results['best_step']}; that adapter is the one kept")
    metrics = record.get("comparison", {}).get("metrics", {})
    if metrics:
        from .compare import metric_table

        screen.print(metric_table(metrics))
    screen.print(f"adapter  {result.folder}")
    screen.print(f"report   {result.folder / 'report.html'}")
    if result.interrupted:
        screen.print(f"go on    inlay train --output {result.folder} --resume")


def _show_method(method: str, screen: Any, as_json: bool) -> None:
    from inlay.training import adapters

    rows = []
    for name, field in adapters.config_fields(method).items():
        rows.append({"field": name, "default": adapters.default_of(field), "help": " ".join(str(field.metadata.get("help", "")).split())})
    if as_json:
        emit({"method": method, "fields": rows, "methods": adapters.method_names()})
        return
    from .output import short

    made = table("flag", "default", "meaning", title=f"fields of {method}'s config")
    for row in rows:
        made.add_row(f"--{row['field'].replace('_', '-')}", short(repr(row["default"]), 24), short(row["help"]))
    screen.print(made)
    screen.print(f"[dim]methods: {', '.join(adapters.method_names())}[/]")
