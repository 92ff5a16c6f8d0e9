"""Quantised weights in files: the tensors that make up one weight are seen as that weight, and written as those again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ..streaming import Checkpoint, Entry, Files
from . import awq, bitsandbytes, compressed_tensors, fp8, gptq, hqq, torchao
from .weight import Packed, Packing, slices

__all__ = ["READABLE", "Packed", "Packing", "packed", "quantised", "slices"]

# What finds a folder's quantised weights, by what its config.json calls the library that wrote it.
Find = Callable[[Checkpoint, Mapping[str, Any], Files, torch.dtype], list[Packed]]
FORMATS: dict[str, Find] = {
    "bitsandbytes": bitsandbytes.find,
    "inlay": bitsandbytes.find,
    "gptq": gptq.find,
    "awq": awq.find,
    "hqq": hqq.find,
    "torchao": torchao.find,
    "fp8": fp8.find,
    "fbgemm_fp8": fp8.find,
    "compressed-tensors": compressed_tensors.find,
}
READABLE = tuple(FORMATS)


def packed(checkpoint: Checkpoint, config: Mapping[str, Any], files: Files, dtype: torch.dtype) -> Checkpoint:
    """The same files with one entry for each quantised weight.

    Args:
        config: how they are quantised, as config.json says it.
        dtype: of weights whose file does not say it.

    Raises:
        ValueError: they are quantised in a way that cannot be read.
    """
    try:
        weights = FORMATS[str(config["quant_method"])](checkpoint, config, files, dtype)
    except NotImplementedError as error:
        raise ValueError(quantised(checkpoint.folder, str(error))) from error
    first = {next(iter(w.parts.values())).key: w for w in weights}
    within = {e.key for w in weights for e in w.parts.values()}
    made: dict[str, Entry] = {}
    for key, entry in checkpoint.tensors.items():
        if key in first:
            made[first[key].key] = first[key]
        elif key not in within:
            made[key] = entry
    return replace(checkpoint, tensors=made)


def quantised(folder: Path, why: str) -> str:
    """What to do about a base that is quantised in a way that cannot be read."""
    return (
        f"{folder} is quantised ({why}), and these files cannot be read without the library that wrote them. Give the folder of the "
        "original, dense weights (--base-dtype original --original FOLDER; the adapter fits them, and what it learned is kept in "
        "full), or load the model and use `merge_and_unload(base='dequantized')`."
    )
