"""Weights that compressed-tensors wrote with their codes in bytes: ``weight``, ``weight_scale``, perhaps ``weight_zero_point``.

Its other layouts have several codes in a number, or leave zeros out; such a file says so in its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..streaming import Checkpoint, Files
from .scaled import scaled
from .weight import Packed

CODES = (torch.int8, torch.float8_e4m3fn)
FORMATS = ("float-quantized", "int-quantized", "naive-quantized")


def find(checkpoint: Checkpoint, config: Mapping[str, Any], _: Files, dtype: torch.dtype) -> list[Packed]:
    """
    Raises:
        NotImplementedError: the layout is another, or the scales of a weight are missing.
    """
    groups = [g for g in (config.get("config_groups") or {}).values() if isinstance(g, dict)]
    layouts = {str(g.get("format") or config.get("format")) for g in groups} or {str(config.get("format"))}
    if unknown := sorted(layouts - set(FORMATS)):
        raise NotImplementedError(f"compressed-tensors, {unknown[0]}")
    if any((g.get("weights") or {}).get("actorder") for g in groups):
        raise NotImplementedError("compressed-tensors, with its columns in another order")
    tensors, found = checkpoint.tensors, []
    for key, codes in tensors.items():
        if not key.endswith(".weight") or codes.torch_dtype not in CODES:
            continue
        parts = {"codes": codes, "scale": tensors.get(f"{key}_scale"), "zero": tensors.get(f"{key}_zero_point")}
        if parts["scale"] is None:
            raise NotImplementedError(f"compressed-tensors, and nothing says the scale of {key!r}")
        owner = key.removesuffix(".weight")
        parts |= {name: tensors.get(f"{owner}.{name}") for name in ("input_scale", "input_zero_point", "weight_g_idx")}
        levels = (-128, 127) if codes.torch_dtype == torch.int8 else None
        kind = "compressed-tensors " + ("fp8" if levels is None else "int8")
        found.append(scaled(key, parts, dtype, kind, levels=levels))
    return found
