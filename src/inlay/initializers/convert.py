"""A trained adapter that started from factors A0, B0 as plain LoRA of twice the rank: ``s (B A - B0 A0) = s [B, -B0] [A; A0]``.

Such a file needs neither the data nor the decomposition that the adapter started from, and any reader of LoRA takes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .loftq import Loftq
from .offset import Offset


@torch.no_grad()
def as_plain_lora(
    base: nn.Module, name: str, config: Any, tensors: Mapping[str, Tensor], initial: str | Path
) -> tuple[dict[str, Tensor], Any]:
    """The tensors and the configuration of a file.

    Args:
        base: the model that the adapter is in.
        name: the adapter.
        config: its configuration.
        tensors: as its own file would have them; all but the factors are kept.
        initial: the folder of the adapter as it was before training; read only for layers that do not know their start.

    Raises:
        ValueError: the adapter is no LoRA, or starts from a rounded weight; or the folder is needed and does not fit.
    """
    from ..core.adapter import Adapter
    from ..core.inlaid import places
    from ..core.place import Place
    from ..core.targets import tied_paths
    from ..formats.folder import read_tensors, weight_files
    from ..formats.slots import PREFIX, key_in_file, slots
    from ..methods.lora import LoraConfig

    if not isinstance(config, LoraConfig):
        raise ValueError(f"`path_initial_model_for_weight_conversion` converts LoRA adapters, and {name!r} is {config.peft_type}.")
    alpha = 2**0.5 if config.use_rslora else 2
    wide = replace(
        config,
        r=2 * config.r,
        lora_alpha=alpha * config.lora_alpha,
        rank_pattern={k: 2 * v for k, v in (config.rank_pattern or {}).items()},
        alpha_pattern={k: alpha * v for k, v in (config.alpha_pattern or {}).items()},
        overrides={k: _wider(v, alpha) for k, v in (config.overrides or {}).items()} or None,
        init_lora_weights=True,
        **dict.fromkeys(("corda_config", "lora_ga_config", "eva_config")),
        loftq_config={},
    )
    found, before = dict(tensors), None
    for place in places(base):
        p = place.adapters.get(name)
        if not isinstance(place, Place) or not isinstance(p, Adapter) or not isinstance(p.method, LoraConfig):
            continue
        if isinstance(p.method, Loftq):
            raise ValueError("An adapter over a rounded weight (LoftQ) has no counterpart on the base as it is; save it as it is.")
        of = {slot.name: slot for slot in slots(place.path, place.in_file, place.name, p, name)}
        names = p.method.names(p.site)
        declared = wide.at(p.path).params(p.site)
        for factor, kept, sign, axis in zip(names, ("lora_A_start", "lora_B_start"), (1, -1), (-2, -1), strict=True):
            slot = of[factor]
            key = next(k for k in (key_in_file(slot), slot.key) if k in tensors)
            if isinstance(p.method, Offset):
                start = getattr(p, kept)
                for own in (kept,) if kept in of else ():
                    found.pop(key_in_file(of[own]), None)
                    found.pop(of[own].key, None)
            else:
                before = read_tensors(weight_files(initial)) if before is None else before
                if key_in_file(slot) not in before:
                    raise ValueError(f"{initial} is no earlier state of the adapter {name!r}: it lacks {key_in_file(slot)!r}.")
                start = slot.from_file(before[key_in_file(slot)])
            now = slot.from_file(tensors[key])
            both = torch.cat((now, sign * start.to(now)), axis)
            found[key] = declared[factor].to_file(p.site, both)
    for end, source in tied_paths(base).items():
        # A tied head repeats the factors of its embedding.
        for leaf, of in (("lora_A.weight", "lora_embedding_B"), ("lora_B.weight", "lora_embedding_A")):
            if f"{PREFIX}{end}.{leaf}" in found and f"{PREFIX}{source}.{of}" in found:
                found[f"{PREFIX}{end}.{leaf}"] = found[f"{PREFIX}{source}.{of}"].mT
    return found, wide


def _wider(fields: Mapping[str, Any], alpha: float) -> dict[str, Any]:
    by = {"r": 2, "lora_alpha": alpha}
    return {k: v * by.get(k, 1) if k in by else v for k, v in fields.items() if k != "init_lora_weights"}
