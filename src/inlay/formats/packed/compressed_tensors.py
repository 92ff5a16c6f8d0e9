"""Weights that compressed-tensors wrote with their codes in bytes: ``weight``, ``weight_scale``, perhaps ``weight_zero_point``.

Its other layouts have several codes in a number, or leave zeros out; such a file says so in its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..streaming import Checkpoint, Entry, Files
from .scaled import Scaled, scaled
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
    bits = {int((g.get("weights") or {}).get("num_bits", 8)) for g in groups} or {8}
    tensors, found = checkpoint.tensors, []
    for key, codes in tensors.items():
        if not key.endswith(".weight") or codes.torch_dtype not in CODES:
            continue
        if len(bits) > 1:
            raise NotImplementedError(f"compressed-tensors, with {' and '.join(map(str, sorted(bits)))} bits")
        parts = {"codes": codes, "scale": tensors.get(f"{key}_scale"), "zero": tensors.get(f"{key}_zero_point")}
        if parts["scale"] is None:
            raise NotImplementedError(f"compressed-tensors, and nothing says the scale of {key!r}")
        owner = key.removesuffix(".weight")
        parts |= {name: tensors.get(f"{owner}.{name}") for name in ("input_scale", "input_zero_point", "weight_g_idx")}
        found.append(weight(key, parts, dtype, *bits))
    return found


def weight(key: str, parts: Mapping[str, Entry | None], dtype: torch.dtype, bits: int) -> Scaled:
    """
    Args:
        parts: None where there is none.
        bits: of a code, which has a byte of its own all the same.

    Raises:
        NotImplementedError: the codes are others, or codes and scales do not fit each other.
    """
    codes = parts["codes"]
    if codes is None or codes.torch_dtype not in CODES or bits > 8:
        raise NotImplementedError(f"compressed-tensors, with other codes for {key!r}")
    levels = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if codes.torch_dtype == torch.int8 else None
    return scaled(key, parts, dtype, "compressed-tensors " + ("fp8" if levels is None else f"int{bits}"), levels=levels)
