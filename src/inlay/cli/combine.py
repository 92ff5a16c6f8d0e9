"""``inlay combine``: several adapter folders become one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from .output import Json, console, emit, table
from .tuned import Device, Dtype, base_of, check_adapters, check_new, hush

Base = Annotated[str | None, typer.Option("--base", "--model", help="Folder or hub id of the base; the one the adapter names if needed.")]
Out = Annotated[Path, typer.Option("--out", help="Folder of the new adapter; must not exist yet.")]


class CombineCommand(TyperCommand):
    """Lets numbers follow ``--weights`` as they come, and lists the ways to combine in the help."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, gathered(args))

    def format_help(self, ctx: Any, formatter: Any) -> None:
        super().format_help(ctx, formatter)
        typer.echo(epilog())


def gathered(words: list[str]) -> list[str]:
    """``--weights 0.7 -0.3`` as one word, ``--weights=0.7,-0.3``."""
    if "--weights" not in words:
        return words
    at = words.index("--weights")
    end = at + 1
    while end < len(words) and _is_number(words[end]):
        end += 1
    # A list of numbers, or pairs by pattern, may come as one word.
    return words if end == at + 1 else [*words[:at], f"--weights={','.join(words[at + 1 : end])}", *words[end:]]


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def epilog() -> str:
    """The ways to combine, from the registry."""
    from inlay.operations.arithmetic import COMBINATIONS

    width = max(map(len, COMBINATIONS))
    lines = [f"  {c.name.ljust(width)}  {c.summary}{f' arXiv {c.paper}.' if c.paper else ''}" for c in COMBINATIONS.values()]
    return "\n".join(["Ways to combine (--combine):", *lines])


def combine(
    adapters: Annotated[list[Path], typer.Argument(help="Adapter folders.", show_default=False)],
    out: Out,
    weights: Annotated[
        str | None, typer.Option("--weights", help="Numbers, such as 0.7 0.3, or JSON lists by module pattern; else 1.")
    ] = None,
    how: Annotated[str, typer.Option("--combine", help="The way to combine; listed below.")] = "svd",
    rank: Annotated[str | None, typer.Option("--rank", help="LoRA of this rank, or of the share that is to stay (0.95).")] = None,
    density: Annotated[float | None, typer.Option("--density", help="Share of numbers that stays, for ways that prune (0.5).")] = None,
    majority: Annotated[str, typer.Option("--majority-sign-method", help="total or frequency, for ways that elect signs.")] = "total",
    seed: Annotated[int | None, typer.Option("--seed", help="Seed of what is drawn.")] = None,
    base: Base = None,
    dtype: Dtype = "auto",
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Make one adapter of several: of any method, of different methods and ranks.

    LoRA is combined from the files alone; what depends on the base's weights needs --base, or an adapter that names it.
    """
    from inlay.training.errors import InputError

    check_adapters(*adapters)
    check_new(out)
    numbers = weights_by_layer(weights) or parsed_weights(weights, len(adapters))
    share = parsed_rank(rank)
    hush()
    from inlay.operations.arithmetic import combination
    from inlay.state_dict import get_peft_model_state_dict

    try:
        combination(how)
    except ValueError as error:
        raise InputError(f"--combine {how}: {error}") from error
    model, alone = adapted(adapters, base, dtype, device)
    names = [f"source_{i}" for i in range(len(adapters))]
    try:
        model.add_weighted_adapter(
            names, numbers, "default", how, svd_rank=share, density=density, majority_sign_method=majority, seed=seed
        )
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    config = model.peft_config["default"]
    config.inference_mode = True
    tensors = get_peft_model_state_dict(model, adapter_name="default")
    named = [folder.name for folder in adapters]
    write(out, tensors, config, model, _origin(named, numbers, how, share, density, majority, seed), ("merge",))
    facts = {
        "out": str(out), "combine": how, "weights": numbers, "peft_type": str(config.peft_type), "r": getattr(config, "r", None),
        "tensors": len(tensors), "bytes": sum(t.nbytes for t in tensors.values()), "base_read": not alone,
    }  # fmt: skip
    if as_json:
        emit(facts)
        return
    screen = console()
    made = table("adapter", "weight", right=("weight",))
    for i, folder in enumerate(adapters):
        made.add_row(str(folder), _of_adapter(numbers, i))
    screen.print(made)
    kind = f"{str(config.peft_type).lower()}{f' of rank {config.r}' if facts['r'] else ''}"
    screen.print(f"[bold]{out}[/]: {how} of these, {kind}, {facts['bytes'] / 1e6:,.1f} MB{' (from the files alone)' if alone else ''}")


def weights_by_layer(text: str | None) -> dict[str, list[float]] | None:
    """Lists of weights by pattern of module names, from JSON; None where the text is something else.

    Raises:
        InputError: it starts like JSON and is none, or not of that kind.
    """
    from inlay.training.errors import InputError

    if text is None or not text.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(text)
        return {str(pattern): [float(number) for number in numbers] for pattern, numbers in found.items()}
    except (ValueError, TypeError) as error:
        example = '{"layers.0.*": [1, 0], ".*": [0.5, 0.5]}'
        raise InputError(f"--weights {text}: give lists of numbers by pattern, such as '{example}'.") from error


def _of_adapter(weights: list[float] | dict[str, list[float]], i: int) -> str:
    if isinstance(weights, dict):
        return ", ".join(f"{numbers[i]:g} at {pattern}" for pattern, numbers in weights.items())
    return f"{weights[i]:g}"


def parsed_weights(text: str | None, count: int) -> list[float]:
    """
    Raises:
        InputError: these are no numbers, or not one an adapter.
    """
    from inlay.training.errors import InputError

    if text is None:
        return [1.0] * count
    words = text.replace(",", " ").split()
    if not all(map(_is_number, words)):
        raise InputError(f"--weights {text}: give numbers, such as --weights 0.7 0.3.")
    if len(words) != count:
        raise InputError(f"--weights {text}: {len(words)} numbers for {count} adapters; give one a piece.")
    return [float(word) for word in words]


def parsed_rank(text: str | None) -> float | None:
    """A rank, or a share of the squared norm.

    Raises:
        InputError: it is neither.
    """
    from inlay.training.errors import InputError

    if text is None:
        return None
    if text.isdigit() and int(text) > 0:
        return int(text)
    if _is_number(text) and 0 < float(text) <= 1:
        return float(text)
    raise InputError(f"--rank {text}: give a positive integer, or a share in (0, 1] such as 0.95.")


def adapted(folders: list[Path], base: str | None, dtype: str, device: str) -> tuple[Any, bool]:
    """A model with the adapters in it, named ``source_0``, ``source_1``, ...; and whether it was made from the files alone.

    Raises:
        InputError: a file is damaged, or the base is needed and not known.
    """
    from inlay import PeftConfig, PeftModel, load_peft_weights
    from inlay.operations.skeleton import needs_base, skeleton
    from inlay.training.errors import InputError

    try:
        files = [load_peft_weights(str(folder)) for folder in folders]
        reasons = [needs_base(PeftConfig.from_pretrained(folder), file) for folder, file in zip(folders, files, strict=True)]
        alone = base is None and not any(reasons)
        if alone:
            model: Any = skeleton(*files)
        else:
            from inlay.training.models import load_model

            known = next((folder for folder, why in zip(folders, reasons, strict=True) if why), folders[0])
            try:
                where = base_of(base, known)
            except InputError as error:
                raise InputError(f"{known}: {next(filter(None, reasons))}, so the base is needed; give it with --base.") from error
            model = load_model(where, dtype, device)
        for i, folder in enumerate(folders):
            if i == 0:
                model = PeftModel.from_pretrained(model, folder, "source_0")
            else:
                model.load_adapter(folder, f"source_{i}")
    except InputError:
        raise
    except (ValueError, TypeError) as error:
        raise InputError(" ".join(str(error).split())) from error
    return model, alone


def _origin(
    names: list[str],
    weights: list[float] | dict[str, list[float]],
    how: str,
    rank: float | None,
    density: float | None,
    majority: str,
    seed: int | None,
) -> str:
    """For the card: what was combined, and how."""
    from inlay.formats.card import table as markdown
    from inlay.operations.arithmetic import combination, density_of

    chosen = combination(how)
    options = {"rank": rank, "density": density_of(chosen, density), "majority sign": majority if chosen.elects else None, "seed": seed}
    said = "".join(f", {name} {value}" for name, value in options.items() if value is not None)
    paper = f" (arXiv [{chosen.paper}](https://arxiv.org/abs/{chosen.paper}))" if chosen.paper else ""
    rows = [(f"`{name}`", _of_adapter(weights, i)) for i, name in enumerate(names)]
    return f"Combined from other adapters by `{how}`{paper}{said}.\n\n{markdown(('adapter', 'weight'), rows)}"


def write(out: Path, tensors: dict[str, Any], config: Any, model: Any, origin: str, tags: tuple[str, ...] = ()) -> None:
    """The new adapter's folder, with a card that says how it was made.

    Args:
        model: the one that it is for, where that was read.
    """
    from inlay.formats.card import write_card
    from inlay.formats.folder import write_adapter

    write_adapter(out, tensors, config.to_file())
    write_card(out, model, config, origin, tags)
