"""The rest of a model's folder: its configuration, its tokenizer, its index; and the room for it on the disk."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...formats.folder import write_json
from ...formats.streaming import write_index
from .plan import Plan

# Left on the disk beside what is written.
SPARE = 64 * 2**20
# Files of a model's folder that are its weights in other forms.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


def working_folder(out: Path) -> Path:
    """Where a merge is written before it is complete."""
    return out.parent / f".{out.name}.merging"


def check_space(out: Path, size: int) -> None:
    """
    Args:
        size: of what is going to be written, in bytes.

    Raises:
        OSError: the output does not fit on the disk.
    """
    folder = working_folder(out)
    there = sum(f.stat().st_blocks * 512 for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0
    nearest = next(p for p in (out.parent, *out.absolute().parents) if p.is_dir())
    free = shutil.disk_usage(nearest).free + there
    if free < size + SPARE:
        raise OSError(
            f"{nearest} has {free / 1e9:,.2f} GB free and the merged model needs {size / 1e9:,.2f} GB; make room, or write it "
            "to another disk."
        )


def write_others(plan: Plan, folder: Path) -> None:
    """All but the weights: of the base, and the tokenizer of the last adapter that has one."""
    for path in plan.folder.iterdir():
        if path.is_file() and not path.name.startswith(".") and not path.name.endswith(OTHER_WEIGHTS):
            shutil.copyfile(path, folder / path.name)
    _write_config(plan, folder)
    with_tokenizer = (p for a in reversed(plan.adapters) if ((p := Path(a.source)) / "tokenizer_config.json").is_file())
    trained = next(with_tokenizer, None)
    if trained is not None:
        for name in TOKENIZER:
            (folder / name).unlink(missing_ok=True)
            if (trained / name).is_file():
                shutil.copyfile(trained / name, folder / name)
    if plan.checkpoint.index is not None:
        metadata = {k: v for k, v in (plan.checkpoint.index.get("metadata") or {}).items() if k != "total_parameters"}
        write_index(folder, plan.where, [s.size - len(s.header) for s in plan.shards.values()], metadata)


def _write_config(plan: Plan, folder: Path) -> None:
    changes = dict(plan.config_changes)
    if plan.out_dtype is not None:
        changes["dtype"] = str(plan.out_dtype).removeprefix("torch.")
    if not changes:
        return
    config = dict(plan.config)
    text = config.get("text_config")
    parts = [config, *(v for v in config.values() if isinstance(v, dict) and "hidden_size" in v)]
    if "dtype" in changes:
        dtype = changes.pop("dtype")
        for part in parts:
            for spelled in ("dtype", "torch_dtype"):
                if spelled in part or (part is config and spelled == "dtype" and "torch_dtype" not in part):
                    part[spelled] = dtype
    if "quantization_config" in changes:
        del changes["quantization_config"]
        for part in parts:
            part.pop("quantization_config", None)
    if isinstance(text, dict):
        if "tie_word_embeddings" in changes and "tie_word_embeddings" in text:
            text["tie_word_embeddings"] = False
        # What the language model has for itself is changed there.
        for name in [n for n in changes if n in text and n not in config]:
            text[name] = changes.pop(name)
    write_json(folder / "config.json", config | changes)
