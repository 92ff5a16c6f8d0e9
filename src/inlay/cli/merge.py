"""``inlay merge``: base and adapters become one ordinary model folder, tensor by tensor, without the model ever being loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .combine import parsed_weights, weights_by_layer
from .output import Json, console, emit, hush, table
from .tuned import Device, base_of, check_adapters, check_new

if TYPE_CHECKING:
    from inlay.operations.stream_merge import StreamMerge

PROMPTS = (
    "The quick brown fox jumps over the lazy dog. 0123456789 kubectl get pods -A",
    "Write a function that returns the largest of three numbers.",
    "Ein Satz in einer anderen Sprache, und noch einer.",
)
# Largest difference of a logit, relative to the largest logit, that rounding explains.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
BASE_DTYPES = ("original", "dequantized", "requantized")


def merge(
    base: Annotated[str | None, typer.Argument(help="Folder or hub id of the base; the one the adapter names when not given.")] = None,
    adapter: Annotated[list[Path] | None, typer.Option("--adapter", help="Adapter folder; several act in this order.")] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of the merged model; must not exist yet.")] = None,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Numbers, such as 0.7 0.3, or JSON lists by module pattern; else 1.")
    ] = None,
    how: Annotated[str | None, typer.Option("--combine", help="Make one change of several adapters; the ways are listed below.")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of numbers that stays, for ways that prune (0.5).")] = None,
    majority: Annotated[str, typer.Option("--majority-sign-method", help="total or frequency, for ways that elect signs.")] = "total",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of what is drawn.")] = None,
    out_dtype: Annotated[str | None, typer.Option("--out-dtype", help="bf16, fp16 or fp32; as in the base when not given.")] = None,
    base_dtype: Annotated[
        str | None, typer.Option("--base-dtype", help="What a quantised base becomes: dequantized, requantized or original.")
    ] = None,
    original: Annotated[str | None, typer.Option("--original", help="Folder or hub id of the weights from before quantising.")] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load both models and compare their logits on a few prompts.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and write nothing.")] = False,
    model: Annotated[str | None, typer.Option("--model", help="The base, by a flag.", hidden=True)] = None,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Merge adapters of any method into a base and write an ordinary model folder.

    Weights are read, changed and written one by one, some rows at a time. The folder appears whole. After an
    interruption, the same command goes on where it was.
    """
    from inlay.training.errors import InputError, near_miss

    hush()
    if base is not None and model is not None:
        raise InputError("BASE and --model are the same thing; give one of them.")
    if not adapter:
        raise InputError("--adapter is missing: name at least one adapter folder.")
    check_adapters(*adapter, flag="--adapter ")
    if out is None and not dry_run:
        raise InputError("--out is missing: name a new folder for the merged model.")
    if out is not None:
        check_new(out)
    if base_dtype is not None and base_dtype not in BASE_DTYPES:
        raise InputError(f"--base-dtype {base_dtype}: give {', '.join(BASE_DTYPES)}.{near_miss(base_dtype, list(BASE_DTYPES))}")
    if original is not None and base_dtype != "original":
        raise InputError("--original: only --base-dtype original takes other weights than BASE's.")
    if base_dtype == "original" and original is None:
        raise InputError("--original is missing: name the folder or hub id of the weights from before quantising.")
    if out_dtype is not None and out_dtype not in (*DTYPES, *DTYPES.values()):
        raise InputError(f"--out-dtype {out_dtype}: give {', '.join(DTYPES)}.")
    if how is None and (density is not None or seed is not None or majority != "total"):
        raise InputError("--density, --majority-sign-method and --seed are of a way to combine adapters; name it with --combine.")
    numbers = weights_by_layer(weights) or parsed_weights(weights, len(adapter))
    folder = _folder(base_of(base if base is not None else model, adapter[0]))
    import torch

    from inlay.operations.stream_merge import StreamMerge

    dtype = None if out_dtype is None else getattr(torch, DTYPES.get(out_dtype, out_dtype))
    screen = console(to_stderr=as_json)
    try:
        with _working(screen, "reading what there is to merge"):
            planned = StreamMerge(
                folder,
                adapter,
                numbers,
                dtype,
                base_dtype=base_dtype,
                original=None if original is None else _folder(original),
                combine=how,
                density=density,
                majority_sign_method=majority,
                seed=seed,
            )
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    facts = _facts(planned, out)
    if dry_run or out is None:
        if as_json:
            emit(facts)
        else:
            _show(planned, facts, screen)
        return
    errors: dict[str, float] = {}
    try:
        with _bar(screen, sum(shard.size - len(shard.header) for shard in planned.shards.values())) as (progress, hide):

            def examine(written: Path) -> None:
                hide()
                if verify:
                    with _working(screen, "comparing with the adapted model"):
                        errors["error"] = compared(planned, written, device)

            planned.run(out, progress, examine)
    except (ValueError, TypeError, OSError) as error:
        raise InputError(" ".join(str(error).split())) from error
    except KeyboardInterrupt:
        screen.print("What is finished is kept: the same command goes on from there.")
        raise
    facts |= errors
    if planned.rounding:
        facts["rounding"] = _rounding(planned)
    if as_json:
        emit(facts)
        return
    kind = facts.get("quantised", facts["dtype"])
    screen.print(f"[bold]{out}[/]: merged model, {kind}, {facts['bytes'] / 1e6:,.1f} MB, {len(planned.changes)} weights changed")
    if planned.rounding:
        _show_rounding(facts["rounding"], screen)
    if errors:
        screen.print(f"largest error of a logit, relative to the largest one: {errors['error']:.1e}")


def _folder(base: str) -> Path:
    """The base on this disk: a folder, or a copy of what is on the hub."""
    from inlay.training.errors import InputError
    from inlay.training.models import locate

    found = Path(locate(base))
    if found.is_dir():
        return found
    from huggingface_hub import snapshot_download

    wanted = ["*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.md"]
    try:
        return Path(snapshot_download(base, allow_patterns=wanted))
    except Exception as error:
        raise InputError(f"{base}: no such folder here, and from the hub: {' '.join(str(error).split())}") from error


def _facts(planned: StreamMerge, out: Path | None) -> dict[str, Any]:
    from collections import Counter

    from inlay.formats.packed import Packed

    dtypes = Counter[str]()
    for entry in planned.checkpoint.tensors.values():
        dtypes[str(entry.torch_dtype)] += entry.nbytes
    dtype = dtypes.most_common(1)[0][0] if planned.out_dtype is None else str(planned.out_dtype)
    stay = [e for e in planned.checkpoint.tensors.values() if isinstance(e, Packed) and planned.keeps(e)]
    kept = stay[0].kind if stay else None
    return {
        "out": None if out is None else str(out),
        "base": str(planned.folder),
        "dtype": dtype.removeprefix("torch."),
        **({} if kept is None else {"quantised": kept}),
        "bytes": planned.size,
        "shards": len(planned.shards),
        "tensors": len(planned.where),
        "changes": [{"name": c.name, "shape": list(c.shape), "how": c.how} for c in planned.changes],
        "config": planned.config_changes,
    }


def _show(planned: StreamMerge, facts: dict[str, Any], screen: Any) -> None:
    """What would change, weights that differ by their block's number in one row."""
    from rich.markup import escape

    rows: dict[tuple[str, str, str], int] = {}
    for change in planned.changes:
        key = re.sub(r"(?<=\.)\d+(?=\.)", "*", change.name), "x".join(map(str, change.shape)), change.how
        rows[key] = rows.get(key, 0) + 1
    made = table("weights", "shape", "count", "what happens", right=("count",))
    for (name, shape, how), count in rows.items():
        made.add_row(escape(name), shape, str(count), escape(how))
    screen.print(made)
    for name, value in planned.config_changes.items():
        screen.print(f"config.json: {name} " + ("goes" if value is None else f"becomes {value}"))
    screen.print(
        f"{len(planned.changes)} of {facts['tensors']} tensors change; {facts['bytes'] / 1e6:,.1f} MB in {facts['shards']} files would be "
        f"written, {facts['dtype']}. Nothing was."
    )


def _rounding(planned: StreamMerge) -> dict[str, Any]:
    """What quantising the merged weights again lost, of each and of all."""
    from inlay.operations.stream_merge import Rounding

    def shares(r: Rounding) -> dict[str, float]:
        return {"of_weight": r.of_weight, "of_change": r.of_change}

    layers = {name: shares(r) for name, r in planned.rounding.items()}
    return {"layers": layers, "all": shares(Rounding.total(planned.rounding.values()))}


def _show_rounding(rounding: dict[str, Any], screen: Any) -> None:
    from rich.markup import escape

    made = table("quantised again", "error, of the weight", "of what changed", right=("error, of the weight", "of what changed"))
    for name, share in rounding["layers"].items():
        made.add_row(escape(name), f"{share['of_weight']:.2%}", f"{share['of_change']:.1%}")
    share = rounding["all"]
    made.add_row("[bold]all[/]", f"[bold]{share['of_weight']:.2%}[/]", f"[bold]{share['of_change']:.1%}[/]")
    screen.print(made)
    if share["of_change"] > 0.5:
        screen.print("Rounding takes much of what the adapters changed; --base-dtype dequantized keeps all of it.")


@contextmanager
def _working(screen: Any, what: str) -> Iterator[None]:
    """Within, a terminal shows that something is going on."""
    if not screen.is_terminal or screen.quiet:
        yield
        return
    with screen.status(what):
        yield


@contextmanager
def _bar(screen: Any, total: int) -> Iterator[tuple[Callable[[int], object], Callable[[], object]]]:
    """Bytes done, their speed and the time left, on a terminal: what to call with numbers of bytes, and what takes the bar away."""
    if not screen.is_terminal or screen.quiet:
        yield lambda _: None, lambda: None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("merging"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True) as progress:
        task = progress.add_task("merging", total=total)
        yield lambda done: progress.advance(task, done), progress.stop


# ---- --verify -------------------------------------------------------------------------------------------------------------
def compared(planned: StreamMerge, written: Path, device: str) -> float:
    """The largest difference of a logit between the adapted and the merged model, over the largest logit.

    Raises:
        RuntimeError: it is more than rounding explains.
    """
    from inlay.training.models import choose_device

    where = choose_device(device)
    prompts = _token_ids(written, planned.base.model.get_input_embeddings().weight.shape[0])
    wanted = _logits(_adapted(planned).to(where).eval(), prompts)
    merged = _opened(planned, written).to(where).eval()
    error = max(relative_error(one, other) for one, other in zip(wanted, _logits(merged, prompts), strict=True))
    if planned.rounding:
        # How much quantising again may take is not ours to say.
        return error
    number_type = str(merged.dtype).removeprefix("torch.")
    if not error <= TOLERANCE.get(number_type, TOLERANCE["float32"]):
        raise RuntimeError(
            f"the merged model's logits are off by {error:.1e} of the largest one, more than {number_type} explains; nothing was written."
        )
    return error


def _opened(planned: StreamMerge, folder: Path) -> Any:
    """A folder's model in the numbers of the output; a quantised one without the library that wrote it."""
    import transformers

    from inlay import from_pretrained_quantized
    from inlay.formats.streaming import Files
    from inlay.operations.disk_base import base_on_disk, quantisation, read_config

    dtype, cls = planned.out_dtype or "auto", getattr(transformers, planned.model_class)
    how = quantisation(read_config(folder))
    if how is None:
        return cls.from_pretrained(str(folder), dtype=dtype)
    if how in ("bitsandbytes", "inlay"):
        return from_pretrained_quantized(str(folder), auto_class=cls, dtype=dtype)
    with Files() as files:
        base = base_on_disk(folder, files)
        values = {name: base.fetch(name) for name in base.group_of}
    config: Any = transformers.AutoConfig.from_pretrained(str(folder))
    del config.quantization_config
    return cls.from_pretrained(None, config=config, state_dict=values, dtype=dtype)


def _adapted(planned: StreamMerge) -> Any:
    """The base with the adapters in it, as it would be used without merging."""
    from inlay import PeftModel

    base = _opened(planned, planned.folder)
    rows = planned.config_changes.get("vocab_size")
    if rows is not None:
        base.resize_token_embeddings(rows)
    tuned = PeftModel.from_pretrained(base, planned.adapters[0].source, planned.adapters[0].name)
    for adapter in planned.adapters[1:]:
        tuned.load_adapter(adapter.source, adapter.name)
    names = [adapter.name for adapter in planned.adapters]
    by = planned.combining
    if by is not None:
        # All of it, where the way to combine would cut it to a rank.
        share = 1 - 1e-9 if by.chosen.fixed_rank else None
        options = {"density": by.options.density if by.chosen.prunes else None, "majority_sign_method": by.options.majority_sign_method}
        tuned.add_weighted_adapter(names, by.weights, "combined", by.chosen.name, svd_rank=share, seed=by.seed, **options)
        names = ["combined"]
    else:
        for adapter in planned.adapters:
            if adapter.weight != 1:
                tuned.set_scale(adapter.name, adapter.weight)
    tuned.set_adapter(names)
    return tuned


def _token_ids(folder: Path, vocabulary: int) -> list[Any]:
    import torch
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder))
        found = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in PROMPTS]
        if all(ids.numel() and int(ids.max()) < vocabulary for ids in found):
            return found
    except (OSError, ValueError, KeyError, TypeError):
        pass
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (1, 32), generator=generator) for _ in PROMPTS]


def _logits(model: Any, prompts: list[Any]) -> list[Any]:
    import torch

    with torch.inference_mode():
        return [model(input_ids=ids.to(model.device)).logits.float().cpu() for ids in prompts]


def relative_error(wanted: Any, found: Any) -> float:
    """max |wanted - found| / max |wanted|."""
    return float((wanted - found).abs().max() / wanted.abs().max().clamp(min=1e-12))
