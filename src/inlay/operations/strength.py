"""How much of an adapter acts: set for a whole model, and written into its configuration."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.config import PeftConfig
from ..core.inlaid import adapters_of, places
from ..core.method import Method, matches
from ..core.place import Place
from ..core.session import Session
from ..core.tied import Tied
from ..methods.lora import LoraConfig
from .merge import tie_again


def set_strength(model: nn.Module, session: Session, name: str, strength: float | Mapping[str, float]) -> None:
    """Set the strength of an adapter; where it is merged, the weights follow.

    Args:
        strength: for all layers, or by pattern of module names, of which the first that fits counts.

    Raises:
        ValueError: there is no such adapter, a number is not finite, or a pattern names no layer of it. Nothing is changed.
    """
    session.check((name,))
    found = [p for p in places(model) if isinstance(p, Place) and name in p.adapters]
    by_pattern = strength if isinstance(strength, Mapping) else {".*": strength}
    for pattern, value in by_pattern.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"The strength of an adapter is a finite number, not {value!r}.")
        if not any(matches(pattern, p.adapters[name].path) for p in found):
            raise ValueError(f"The pattern {pattern!r} names no layer that {name!r} adapts.")
    for place in found:
        values = [v for pattern, v in by_pattern.items() if matches(pattern, place.adapters[name].path)]
        if values:
            place.set_strength(name, values[0])
    if any(name in place.merged for place in found):
        tie_again(model)


def with_strength(model: nn.Module, name: str, config: PeftConfig) -> PeftConfig:
    """The configuration of an adapter with the strengths that its layers have now.

    In the alphas, where the adapter is plain LoRA: they say the same to every reader. Else in the fields ``strength`` and
    ``strength_pattern``, which are read here alone.
    """
    found = [p for p in adapters_of(model, name) if not isinstance(p.method, Tied)]
    if not isinstance(config, Method) or not found:
        return config
    bare = replace(config, strength=1.0, strength_pattern=None, overrides=_without(config.overrides, "strength"))
    if all(p.strength == 1 for p in found):
        return bare
    if isinstance(bare, LoraConfig) and all(_alpha_says_it(p) for p in found):
        return _in_alphas(bare, found)
    strengths = {p.path: p.strength for p in found}
    usual = _most_common(strengths)
    own = {f"^{re.escape(path)}": s for path, s in strengths.items() if s != usual}
    return replace(bare, strength=usual, strength_pattern=own or None)


def _alpha_says_it(p: Adapter) -> bool:
    """Whether the strength is a factor of alpha and of nothing else: no other start, no retrained bias, no variant."""
    return p.strength == 1 or (type(p.method) is LoraConfig and p.trained_bias is None)


def _in_alphas(config: LoraConfig, found: list[Adapter]) -> PeftConfig:
    strengths = {p.strength for p in found}
    if len(strengths) == 1:
        by = strengths.pop()
        given = config.overrides or {}
        overrides = {k: {n: v * by if n == "lora_alpha" else v for n, v in fields.items()} for k, fields in given.items()}
        patterns = {k: v * by for k, v in (config.alpha_pattern or {}).items()}
        return replace(config, lora_alpha=config.lora_alpha * by, alpha_pattern=patterns, overrides=overrides or None)
    alphas = {p.path: p.method.lora_alpha * p.strength for p in found if isinstance(p.method, LoraConfig)}
    usual = _most_common(alphas)
    return replace(
        config,
        lora_alpha=usual,
        alpha_pattern={f"^{re.escape(path)}": alpha for path, alpha in alphas.items() if alpha != usual},
        overrides=_without(config.overrides, "lora_alpha"),
    )


def _most_common(values: Mapping[str, float]) -> float:
    counted = list(values.values())
    return max(dict.fromkeys(counted), key=counted.count)


def _without(overrides: Mapping[str, Mapping[str, Any]] | None, field: str) -> dict[str, dict[str, Any]] | None:
    kept = {pattern: {n: v for n, v in fields.items() if n != field} for pattern, fields in (overrides or {}).items()}
    return {pattern: fields for pattern, fields in kept.items() if fields} or None
