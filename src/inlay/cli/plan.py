"""``inlay plan``: the memory of a training step before the run, item by item, and what would make it fit."""

from __future__ import annotations

import os
import re
from typing import Annotated, Any

import typer

from inlay.training.settings import RunSettings

from .output import Json, console, emit, hush, short, table
from .train import ADAPTER_FIELDS

UNITS = {"": 10**9, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
MEANING = {
    "weights": "of the base",
    "adapters": "and what else the method keeps",
    "gradients": "those that exist at the peak",
    "optimizer": "its state",
    "activations": "kept for the backward pass",
    "logits": "and what the loss makes of them",
    "workspace": "of the operations at the peak",
    "communication": "DDP's buckets",
    "gathered": "layers that FSDP has whole",
    "context": "CUDA and its libraries: an assumption",
}
WORDS = {
    "gradient_checkpointing": "gradient checkpointing",
    "batch_size": "batch size {}",
    "grad_accum": "accumulating {} times",
    "dtype": "{}",
    "quantization": "weights in {}",
    "loss": "the loss of a part of the logits at a time",
    "sharding": "sharded over the devices (FSDP)",
    "seq_length": "{} tokens",
}


def plan(
    ctx: typer.Context,
    model: Annotated[str, typer.Argument(help="Folder, config.json or hub id of the model; 'bundled' is the small one inside Inlay.")],
    method: Annotated[str, typer.Option("--method", help="Adapter method; every field of its config is a flag too.")] = "lora",
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Samples per device and forward pass.")] = 8,
    seq_length: Annotated[
        int | None, typer.Option("--seq-length", "--max-length", min=1, help="Tokens of a row; at most 1024 by itself.")
    ] = None,
    dtype: Annotated[str, typer.Option("--dtype", help="Of the weights: auto (bfloat16 on cuda), float32, bfloat16 or float16.")] = "auto",
    quantization: Annotated[str, typer.Option("--quantization", help="none, nf4, fp4, int4 or int8, as bitsandbytes has them.")] = "none",
    double: Annotated[bool, typer.Option(help="Quantise the scales of the blocks, too.")] = True,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations in the backward pass.")] = False,
    optimizer: Annotated[str, typer.Option("--optimizer", help="adamw, adamw_8bit, paged_adamw_8bit, sgd, adafactor, lion, ...")] = "adamw",
    grad_accum: Annotated[int, typer.Option("--grad-accum", min=1, help="Forward passes per optimizer step.")] = 1,
    devices: Annotated[int, typer.Option("--devices", min=1, help="How many take part.")] = 1,
    sharding: Annotated[str, typer.Option("--sharding", help="ddp: each device has all; fsdp: each has its share.")] = "ddp",
    device: Annotated[str, typer.Option("--device", help="cuda, cpu or mps: where it will run, not where this runs.")] = "cuda",
    loss: Annotated[str, typer.Option("--loss", help="model: its own, of all logits; chunked: as TRL makes it.")] = "model",
    padding: Annotated[bool, typer.Option(help="Rows of unequal length, so that attention takes a mask.")] = True,
    memory: Annotated[str | None, typer.Option("--memory", help="Of one device, such as 24GB (10^9 each) or 24GiB.")] = None,
    trust_remote_code: Annotated[bool, typer.Option("--trust-remote-code", help="Allow a model folder to bring its own code.")] = False,
    as_json: Json = False,
) -> None:
    """Say what memory a training step will need, without loading the model, and what would make it fit.

    The step runs on tensors that have sizes and no numbers, so that any model and any method can be planned.
    """
    hush()
    room = None if memory is None else bytes_in(memory)
    setting = {
        "batch_size": batch_size,
        "seq_length": seq_length,
        "dtype": ("bfloat16" if device == "cuda" else "float32") if dtype == "auto" else dtype,
        "quantization": quantization,
        "double": double,
        "gradient_checkpointing": gradient_checkpointing,
        "optimizer": optimizer,
        "grad_accum": grad_accum,
        "devices": devices,
        "sharding": sharding,
        "device": device,
        "loss": loss,
        "padding": padding,
    }
    _plan(model, method, ctx.meta.get(ADAPTER_FIELDS, {}), setting, 1024, room, trust_remote_code, as_json)


def plan_run(settings: RunSettings, as_json: bool) -> None:
    """What a run of ``inlay train`` would need."""
    from inlay.training.models import choose_device, choose_dtype

    device = choose_device(settings.device)
    setting = {
        "batch_size": settings.batch_size,
        "seq_length": None,
        "dtype": str(choose_dtype(settings.dtype, device)).removeprefix("torch."),
        "quantization": settings.quantization,
        "gradient_checkpointing": settings.gradient_checkpointing,
        "grad_accum": settings.grad_accum,
        "devices": int(os.environ.get("WORLD_SIZE", "1")),
        "device": device,
        "loss": "chunked",
    }
    _plan(settings.model, settings.method, settings.adapter, setting, settings.max_length, None, settings.trust_remote_code, as_json)


def _plan(
    model: str,
    method: str,
    fields: dict[str, Any],
    setting: dict[str, Any],
    longest: int,
    memory: int | None,
    trust_remote_code: bool,
    as_json: bool,
) -> None:
    """
    Args:
        longest: the tokens of a row where the setting has none, if the model takes so many.
    """
    from inlay.training import adapters
    from inlay.training.errors import InputError
    from inlay.training.models import load_config, positions

    if setting["loss"] == "chunked":
        adapters.serve_peft()
    config = load_config(model, trust_remote_code)
    setting = setting | {"seq_length": setting["seq_length"] or min(longest, positions(config))}
    adapter = adapters.build_config(method, fields)
    from inlay.planning import Setting, plan, remedies

    def planned(asked: Setting) -> Any:
        try:
            return plan(config, adapter, trust_remote_code=trust_remote_code, **vars(asked))
        except (ValueError, TypeError) as error:
            raise InputError(f"{method} on {model}: {' '.join(str(error).split())}") from error

    try:
        asked = Setting(**setting)
    except ValueError as error:
        raise InputError(f"--{str(error).replace('_', '-', 1)}") from None
    found = planned(asked)
    fits = None if memory is None else found.bytes <= memory
    helps = remedies(found, planned, memory) if memory is not None and not fits else []
    if as_json:
        result: dict[str, Any] = {"model": model, "method": method, **found.as_dict()}
        if memory is not None:
            steps = [{"change": each.change, "bytes": each.plan.bytes, "fits": each.fits} for each in helps]
            result |= {"memory": memory, "fits": fits, "remedies": steps}
        emit(result)
        return
    screen = console()
    _show(found, model, method, screen)
    if memory is not None:
        _show_room(found, memory, helps, screen)


def _show(found: Any, model: str, method: str, screen: Any) -> None:
    asked = found.setting
    made = table("", "bytes", "", right=("bytes",))
    for name, size in found.items.items():
        made.add_row(name, amount(size), f"[dim]{_note(name, found)}[/]")
    made.add_row(
        "[bold]at the peak[/]", f"[bold]{amount(found.bytes)}[/]", f"in the {found.during}{' of each device' * (asked.devices > 1)}"
    )
    form = asked.dtype if asked.quantization == "none" else f"{asked.dtype}, linear layers in {asked.quantization}"
    checkpointed = ", checkpointed" if asked.gradient_checkpointing else ""
    screen.print(f"[bold]{short(method)} on {short(model)}[/]  {asked.batch_size} x {asked.seq_length} tokens, {form}{checkpointed}")
    screen.print(made)
    screen.print(f"{found.trainable:,} numbers trained over {found.total:,} of the base")
    if found.host:
        screen.print(f"{amount(found.host)} in the host's memory: the state of a paged optimizer")


def _note(name: str, found: Any) -> str:
    if name == "weights":
        return f"{found.items[name] * (found.setting.devices if found.setting.sharding == 'fsdp' else 1) / found.total:.2f} bytes a number"
    return f"{found.setting.optimizer}: {MEANING[name]}" if name == "optimizer" else MEANING[name]


def _show_room(found: Any, memory: int, helps: list[Any], screen: Any) -> None:
    if found.bytes <= memory:
        screen.print(f"[green]fits[/] into {amount(memory)}, with {amount(memory - found.bytes)} to spare")
        return
    screen.print(f"[red]does not fit[/] into {amount(memory)}: {amount(found.bytes - memory)} too much")
    made = table("one after the other", "at the peak", "", right=("at the peak",))
    for each in helps:
        changes = ", ".join(WORDS[name].format(value) for name, value in each.change.items())
        made.add_row(changes, amount(each.plan.bytes), "[green]fits[/]" if each.fits else "")
    screen.print(made)
    if not helps or not helps[-1].fits:
        screen.print("not enough: a smaller model, or more devices with --sharding fsdp")


def amount(size: int) -> str:
    """``1,234.5 MB``, or gigabytes from ten of them on."""
    return f"{size / 1e9:,.2f} GB" if size >= 10**10 else f"{size / 1e6:,.1f} MB"


def bytes_in(text: str) -> int:
    """``24GB``, ``24 GiB``, ``24``.

    Raises:
        InputError: it says no amount.
    """
    from inlay.training.errors import InputError

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].upper() not in UNITS:
        raise InputError(f"--memory {text}: give an amount such as 24GB or 24GiB.")
    return int(float(found[1]) * UNITS[found[2].upper()])
