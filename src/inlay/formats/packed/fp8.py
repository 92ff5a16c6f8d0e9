"""Eight-bit floating point as transformers writes it: ``weight`` and ``weight_scale_inv``, a scale for each block of the weight (or
for all of it, or for each row), which the codes are multiplied by. Stacks of experts have ``<name>_scale_inv``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..streaming import Checkpoint, Files
from .scaled import scaled
from .weight import Packed

CODES = (torch.float8_e4m3fn, torch.float8_e5m2)


def find(checkpoint: Checkpoint, config: Mapping[str, Any], _: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: the scales of a weight are missing, or do not fit it.
    """
    tensors, found = checkpoint.tensors, []
    for key, codes in tensors.items():
        if codes.torch_dtype not in CODES:
            continue
        owner = key.removesuffix(".weight")
        # Some of the first such models have other names.
        names = [f"{key}_scale_inv", f"{key}_scale", *((f"{owner}.scale", f"{owner}.qscale_weight") if owner != key else ())]
        scale = next((tensors[n] for n in names if n in tensors), None)
        if scale is None:
            raise NotImplementedError(f"fp8, and nothing says the scale of {key!r}")
        parts = {"codes": codes, "scale": scale}
        for name in (f"{owner}.activation_scale", f"{key}_activation_scale"):
            if name in tensors:
                parts["inputs"] = tensors[name]
        found.append(scaled(key, parts, dtype, "fp8", config.get("weight_block_size")))
    return found
