"""Which base a merge goes into, and the model that its adapters make of it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...auto import AUTO_CLASSES
from ...core.config import nearest
from ...core.targets import end_of
from ...formats.packed import READABLE
from ...formats.streaming import Checkpoint, Entry, Files
from ..dequantize import BASES
from ..disk_base import DiskBase, open_checkpoint, quantisation, quantised, read_config
from ..replicate import blocks_of, replicated
from .adapters import AdapterFile


@dataclass
class Opened:
    """A base that is ready for its adapters.

    Attributes:
        model_class: what transformers calls the model's class.
        resized: embeddings and heads that have another number of rows than in the files.
        config: the content of config.json.
        config_changes: fields of it that change.
    """

    base: DiskBase
    checkpoint: Checkpoint
    model_class: str
    resized: set[str]
    config: dict[str, Any]
    config_changes: dict[str, Any]


def chosen_folder(named: Path, base_dtype: str | None, original: str | Path | None) -> Path:
    """The folder whose weights are taken.

    Raises:
        ValueError: which that is does not follow from what is asked for, or its weights cannot be read.
    """
    if base_dtype not in (None, *BASES):
        ways = ", ".join(map(repr, BASES))
        raise ValueError(f"base_dtype={base_dtype!r} is not one of {ways}.{nearest(str(base_dtype), BASES)}")
    how = quantisation(read_config(named))
    if how is None and base_dtype is not None:
        raise ValueError(f"{named} is not quantised, so there is nothing to choose; leave {base_dtype!r} out.")
    if original is not None and base_dtype != "original":
        raise ValueError("Another folder's weights are taken only if the base's dtype is 'original'.")
    if how is None:
        return named
    if how not in READABLE and base_dtype != "original":
        raise ValueError(quantised(named, how))
    if base_dtype is None:
        raise ValueError(
            f"{named} is quantised ({how}). Say what to merge into (--base-dtype): 'dequantized' writes dense weights, "
            "'requantized' rounds changed weights again, 'original' takes the weights from before (--original)."
        )
    if base_dtype != "original":
        return named
    if original is None:
        raise ValueError(f"Which weights {named} was made of is not known; name their folder (--original).")
    if quantisation(read_config(Path(original))) is not None:
        raise ValueError(f"{original} is quantised as well; name the folder of the dense weights.")
    return Path(original)


def open_base(folder: Path, adapters: Sequence[AdapterFile], files: Files) -> Opened:
    """The model that the adapters fit: of their task's class, with as many labels, words and blocks as they have.

    Raises:
        ValueError: the folder cannot be read, or the adapters do not fit each other.
    """
    as_read, changes = read_config(folder), dict[str, Any]()
    checkpoint, ranges = Checkpoint.open(folder), _replication(adapters)
    own = (as_read.get("architectures") or [""])[0]
    configs = [a.config for a in adapters]
    task = next((str(c.task_type) for c in configs if c.task_type is not None), None)
    mapping = next((c.auto_mapping for c in configs if c.auto_mapping), None) or {}
    named = str(mapping.get("base_model_class")) if str(mapping.get("parent_library")).startswith("transformers") else own
    if task is not None:
        named = own if task == "CAUSAL_LM" else AUTO_CLASSES[task]
    if not ranges:
        checkpoint = open_checkpoint(checkpoint, as_read, files)
    import transformers
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its config.json cannot be read: {' '.join(str(error).split())}") from error
    cls: Any = getattr(transformers, named, None)
    cls = cls or (transformers.AutoModelForCausalLM if task == "CAUSAL_LM" else transformers.AutoModel)
    fitting = getattr(cls, "config_class", None)
    if fitting is not None and not isinstance(config, fitting):
        made_for = f"was made for a {named}, and {folder} holds a {own or type(config).__name__}"
        raise ValueError(f"{adapters[0].source} {made_for}; merge it into the base that it was trained on.")
    labels = _rows_of(adapters, ("score", "classifier"))
    if labels is not None and labels != config.num_labels and task in ("SEQ_CLS", "TOKEN_CLS"):
        config.num_labels = labels

    def build() -> nn.Module:
        return cls.from_config(config) if cls.__name__.startswith("Auto") else cls._from_config(config)

    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model: Any = build()
    if ranges:
        blocks = blocks_of(model)
        changes |= replicated(model, ranges)
        checkpoint = open_checkpoint(again(checkpoint, blocks, ranges), as_read, files)
        with torch.device("meta"):
            model = build()
    ends = [end_of(model, g) for g in ("get_input_embeddings", "get_output_embeddings")]
    paths = [p for p, m in model.named_modules() if any(m is e for e in ends)]
    rows, text = _rows_of(adapters, paths), config.get_text_config()
    resized: list[str] = []
    if rows is not None and rows != text.vocab_size:
        # Tokens were added to the base before the adapter was made; the adapter brought their rows along.
        text.vocab_size = changes["vocab_size"] = rows
        resized = [f"{p}.{leaf}" for p in paths for leaf in ("weight", "bias")]
        with torch.device("meta"):
            model = build()
    base = DiskBase(checkpoint, model, files, resized)
    name = type(model).__name__
    if name != own and task not in (None, "FEATURE_EXTRACTION"):
        changes["architectures"] = [name]
        if task in ("SEQ_CLS", "TOKEN_CLS"):
            changes |= {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}
    return Opened(base, checkpoint, cls.__name__, set(resized), as_read, changes)


def _replication(adapters: Sequence[AdapterFile]) -> list[list[int]]:
    """The ranges of blocks in which the first adapter runs through the base."""
    found = [getattr(a.config, "layer_replication", None) for a in adapters]
    late = next((a for a, ranges in zip(adapters[1:], found[1:], strict=True) if ranges), None)
    if late is not None:
        raise ValueError(f"{late.source} repeats blocks of the base (layer_replication); only the first adapter can, so name it first.")
    if found[0]:
        # The files are read as those of the larger model.
        adapters[0].config.layer_replication = None  # type: ignore[attr-defined]
    return found[0] or []


def _rows_of(adapters: Sequence[AdapterFile], paths: Sequence[str]) -> int | None:
    """The number of rows of a weight that adapters bring: of the modules with these names, or ends of names."""
    for adapter in adapters:
        for key in adapter.keys:
            path, _, leaf = key.replace(".base_layer", "").removeprefix("base_model.model.").rpartition(".")
            if leaf == "weight" and any(path == p or path.endswith(f".{p}") for p in paths):
                return adapter.shape(key)[0]
    return None


def again(checkpoint: Checkpoint, blocks: str, ranges: Sequence[Sequence[int]]) -> Checkpoint:
    """The files as if they had the blocks of these ranges, one after another.

    Args:
        blocks: the path of the list of blocks; files may lack its first words.
    """
    words = blocks.split(".")
    starts = "|".join(re.escape(".".join(words[i:])) for i in range(len(words)))
    order = [i for start, end in ranges for i in range(start, end)]
    found: dict[str, Entry] = {}
    for key, entry in checkpoint.tensors.items():
        hit = re.match(rf"((?:{starts})\.)(\d+)(\..*)", key)
        copies = [key] if hit is None else [f"{hit[1]}{at}{hit[3]}" for at, i in enumerate(order) if i == int(hit[2])]
        found |= {k: replace(entry, key=k) for k in copies}
    return replace(checkpoint, tensors=found)
