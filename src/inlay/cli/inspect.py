"""``inlay inspect``: what is in an adapter or model folder, from its files alone; no model is loaded."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import Json, console, emit, short, table

LISTED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "bias", "rank_pattern", "alpha_pattern", "modules_to_save",
          "trainable_token_indices", "layers_to_transform", "target_parameters")  # fmt: skip
NORMS = ("mean norm", "max norm")
COLOURS = {"reads": "green", "check": "yellow", "wrong": "red", "refuses": "red"}


def inspect(
    path: Annotated[Path, typer.Argument(help="Adapter folder or model folder.", show_default=False)],
    as_json: Json = False,
) -> None:
    """Show what an adapter or model folder holds, and who would read it, refuse it or get it silently wrong."""
    from inlay.training.errors import InputError, near_miss

    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise InputError(f"{path}: {'a file, expected a folder' if path.exists() else 'no such folder'}.{near_miss(path.name, siblings)}")
    if (path / "adapter_config.json").is_file():
        facts = adapter_facts(path)
    elif (path / "config.json").is_file():
        facts = model_facts(path)
    else:
        raise InputError(f"{path}: neither adapter_config.json nor config.json in there, so it is no adapter and no model.")
    if as_json:
        emit(facts)
    else:
        (show_adapter if facts["kind"] == "adapter" else show_model)(facts, console())


def adapter_facts(path: Path) -> dict[str, Any]:
    """Everything about an adapter folder.

    Raises:
        InputError: a file is missing or damaged.
    """
    from inlay.training.errors import InputError

    from .consumers import AdapterFacts, verdicts

    config = _read_json(path / "adapter_config.json")
    files = sorted(path.glob("adapter_model*.safetensors"))
    if not files:
        pickled = " There is an adapter_model.bin: load it once and save it again." if (path / "adapter_model.bin").is_file() else ""
        raise InputError(f"{path}: no adapter_model.safetensors in there.{pickled}")
    headers = _headers(files)
    shapes = {name: shape for name, (shape, _) in headers.items()}
    return {
        "kind": "adapter",
        "path": str(path),
        "method": str(config.get("peft_type", "unknown")).lower(),
        "base_model": config.get("base_model_name_or_path"),
        "task": config.get("task_type"),
        "targets": _kinds(config.get("target_modules")),
        "settings": {key: config[key] for key in LISTED if config.get(key) not in (None, {}, [], False)},
        "parameters": sum(math.prod(shape) for shape in shapes.values()),
        "tensors": len(shapes),
        "dtypes": dict(Counter(kind for _, kind in headers.values())),
        "bytes": sum(file.stat().st_size for file in files),
        "groups": adapter_groups(files, config),
        "consumers": verdicts(AdapterFacts(config, shapes)),
    }


def _kinds(targets: Any) -> Any:
    """A list of modules without the numbers of their layers; a regular expression as it stands."""
    from inlay.training.adapters import group_of

    return sorted({group_of(target) for target in targets}) if isinstance(targets, list) else targets


def adapter_groups(files: list[Path], config: dict[str, Any]) -> list[dict[str, Any]]:
    """One entry per kind of layer: layers, ranks, parameters, and the norm of what the adapter adds to a weight.

    For LoRA that is the Frobenius norm of scale * B A, from the small Gram matrices; for other methods, of the tensors themselves.
    """
    from safetensors import safe_open

    from inlay.training.adapters import group_of

    groups: dict[str, dict[str, Any]] = {}
    norms: dict[str, list[float]] = defaultdict(list)
    for file in files:
        with safe_open(str(file), framework="pt") as tensors:
            names = list(tensors.keys())
            for name in names:
                group = groups.setdefault(group_of(name), {"layers": set(), "ranks": set(), "parameters": 0})
                tensor = tensors.get_tensor(name)
                group["layers"].add(re.split(r"\.(?:lora_|hada_|lokr_|ia3_|oft_|hra_|vera_)", name)[0])
                group["parameters"] += tensor.numel()
                partner = name.replace("lora_A.weight", "lora_B.weight").replace("lora_embedding_A", "lora_embedding_B")
                if partner != name and partner in names:
                    rank = min(tensor.shape[0], tensors.get_tensor(partner).shape[1])
                    group["ranks"].add(rank)
                    norms[group_of(name)].append(_scale(config, name, rank) * _product_norm(tensor, tensors.get_tensor(partner)))
                elif not re.search(r"lora_(A|B|embedding_A|embedding_B)", name):
                    norms[group_of(name)].append(float(tensor.double().norm()))
    return [
        {
            "group": name,
            "layers": len(group["layers"]),
            "ranks": sorted(group["ranks"]),
            "parameters": group["parameters"],
            "norm_mean": sum(norms[name]) / len(norms[name]) if norms[name] else None,
            "norm_max": max(norms[name], default=None),
        }
        for name, group in sorted(groups.items())
    ]


def _product_norm(a: Any, b: Any) -> float:
    """|B A| of A (r, ...) and B (..., r) without building the product: |BA|^2 = sum((B^T B) * (A A^T))."""
    a, b = a.double().flatten(1), b.double()
    b = b.reshape(b.shape[0], b.shape[1], -1).mean(-1) if b.dim() > 2 else b
    return float(((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt())


def _scale(config: dict[str, Any], name: str, rank: int) -> float:
    alpha = config.get("lora_alpha", rank)
    module = re.split(r"\.lora_", name)[0]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = value
    return alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank


def model_facts(path: Path) -> dict[str, Any]:
    """Everything about a model folder that config.json and the headers of its files say.

    Raises:
        InputError: a file is missing or damaged.
    """
    from inlay.training.errors import InputError

    config = _read_json(path / "config.json")
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise InputError(f"{path}: no .safetensors file in there.")
    headers = _headers(files)
    groups: dict[str, list[tuple[int, ...]]] = defaultdict(list)
    for name, (shape, _) in headers.items():
        groups[re.sub(r"\.(weight|bias)$", "", re.split(r"\.\d+\.", name)[-1])].append(shape)
    text = config.get("text_config") or config
    return {
        "kind": "model",
        "path": str(path),
        "architecture": (config.get("architectures") or [config.get("model_type", "unknown")])[0],
        "layers": text.get("num_hidden_layers"),
        "hidden_size": text.get("hidden_size"),
        "vocabulary": text.get("vocab_size"),
        "tied_embeddings": bool(config.get("tie_word_embeddings", False)),
        "quantization": (config.get("quantization_config") or {}).get("quant_method"),
        "parameters": sum(math.prod(shape) for shape, _ in headers.values()),
        "tensors": len(headers),
        "dtypes": dict(Counter(kind for _, kind in headers.values())),
        "bytes": sum(file.stat().st_size for file in files),
        "tokenizer": (path / "tokenizer_config.json").is_file(),
        "chat_template": _has_chat_template(path),
        "groups": [
            {
                "group": name,
                "tensors": len(shapes),
                "shapes": sorted({"x".join(map(str, shape)) for shape in shapes}),
                "parameters": sum(map(math.prod, shapes)),
            }
            for name, shapes in sorted(groups.items())
        ],
    }


def _has_chat_template(path: Path) -> bool:
    if (path / "chat_template.jinja").is_file():
        return True
    config = path / "tokenizer_config.json"
    return config.is_file() and bool(_read_json(config).get("chat_template"))


def _headers(files: list[Path]) -> dict[str, tuple[tuple[int, ...], str]]:
    """(shape, dtype) of every tensor, from the headers."""
    from safetensors import SafetensorError, safe_open

    from inlay.training.errors import InputError

    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in files:
        try:
            with safe_open(str(file), framework="np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - the handle is no dict
                    part = tensors.get_slice(name)
                    found[name] = (tuple(part.get_shape()), str(part.get_dtype()).lower())
        except SafetensorError as error:
            raise InputError(f"{file}: damaged or cut off ({error}); fetch or save it again.") from None
    return found


def _read_json(path: Path) -> dict[str, Any]:
    from inlay.training.errors import InputError

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from None
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a JSON object.")
    return content


def show_adapter(facts: dict[str, Any], screen: Any) -> None:
    """For people."""
    screen.print(f"[bold]{facts['path']}[/]: {facts['method']} adapter, {_size(facts)}")
    targets = facts["targets"]
    screen.print(f"base     {short(str(facts['base_model'] or 'not named'))}")
    screen.print(f"targets  {short(', '.join(targets) if isinstance(targets, list) else str(targets))}")
    screen.print(f"config   {short(', '.join(f'{key}={value}' for key, value in facts['settings'].items()), 400)}")
    made = table("layer", "count", "rank", "parameters", *NORMS, right=("count", "rank", "parameters", *NORMS))
    for row in facts["groups"]:
        ranks = row["ranks"]
        rank = "–" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]}–{ranks[-1]}"
        norms = ("–" if row[key] is None else f"{row[key]:.3g}" for key in ("norm_mean", "norm_max"))
        made.add_row(row["group"], f"{row['layers']}", rank, f"{row['parameters']:,}", *norms)
    screen.print()
    screen.print(made)
    screen.print()
    who = table("read by", "", "why")
    for row in facts["consumers"]:
        who.add_row(row["consumer"], f"[{COLOURS[row['verdict']]}]{row['verdict']}[/]", row["why"])
    screen.print(who)


def _size(facts: dict[str, Any]) -> str:
    kinds = ", ".join(f"{kind} x {count}" for kind, count in facts["dtypes"].items())
    return f"{facts['parameters']:,} parameters, {facts['bytes'] / 1e6:,.2f} MB ({kinds})"


def show_model(facts: dict[str, Any], screen: Any) -> None:
    """For people."""
    screen.print(f"[bold]{facts['path']}[/]: {facts['architecture']}, {_size(facts)}")
    screen.print(
        f"{facts['layers']} layers, hidden size {facts['hidden_size']}, vocabulary {facts['vocabulary']}, "
        f"embeddings {'tied' if facts['tied_embeddings'] else 'not tied'}"
        + (f", quantised by {facts['quantization']}" if facts["quantization"] else "")
    )
    template = "with a chat template" if facts["chat_template"] else "without a chat template"
    screen.print(f"tokenizer {template}" if facts["tokenizer"] else "no tokenizer in this folder")
    made = table("layer", "tensors", "shapes", "parameters", right=("tensors", "parameters"))
    for row in facts["groups"]:
        made.add_row(row["group"], str(row["tensors"]), ", ".join(row["shapes"]), f"{row['parameters']:,}")
    screen.print()
    screen.print(made)
