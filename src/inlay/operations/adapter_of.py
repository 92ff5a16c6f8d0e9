"""One adapter that does what an effect says."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import PeftConfig
from ..core.inlaid import places
from ..core.method import Method, full
from ..core.plan import Part, materialise
from ..core.retrained import Retrained
from ..core.site import AnyConv, Embedding, Site, Stack
from ..core.targets import explain_targets, tied_paths
from ..core.tied import Tied
from ..methods.full import FullConfig
from ..methods.lora import LoraConfig
from ..methods.trainable_tokens import TrainableTokensConfig
from .effects import Effect, Update, own_tensors
from .slicing import Sliced


def rank_field(site: Site, rank: int) -> int:
    """LoRA's ``r`` for a rank in each matrix: the groups of a convolution share it."""
    return max(rank, 1) * (site.module.groups if isinstance(site, AnyConv) else 1)


def config_for(base: nn.Module, effect: Effect, sources: Sequence[PeftConfig], r: int | None = None) -> Method:
    """The configuration of an adapter that does this: LoRA where all updates have factors, else trained matrices.

    Args:
        sources: the configurations of the adapters that the effect is of.
        r: LoRA's rank where a layer does not need another; the most frequent one where None.
    """
    first = sources[0]
    changed = {key for key, u in effect.weights.items() if u.bias is not None}
    homeless = {key for key in changed if effect.weights[key].site.bias() is None}
    low_rank = homeless or all(u.dense is None for u in effect.weights.values())
    common: dict[str, Any] = {name: getattr(first, name) for name in ("task_type", "base_model_name_or_path", "revision")}
    common |= {"auto_mapping": copy.deepcopy(first.auto_mapping), "modules_to_save": _common_modules(effect, sources)}
    common |= {"ensure_weight_tying": effect.ties}
    if effect.tokens:
        common["trainable_token_indices"] = {path: tokens.indices for path, tokens in effect.tokens.items()}
    prefix = "lora" if low_rank else "diff"
    trained = effect.biases or any(getattr(c, "bias", "none") != "none" for c in sources)
    if trained and not homeless and (changed or effect.biases):
        common["bias"] = "all" if effect.biases else f"{prefix}_only"
    if not low_rank:
        return _targeted(base, FullConfig(train_bias=bool(changed) and not trained, **common), effect, sources)
    if changed and common.get("bias", "none") == "none":
        refusing = {key for key, u in effect.weights.items() if isinstance(u.site, Embedding) or (u.site.reads and u.site.bias() is None)}
        if not refusing:
            common["lora_bias"] = True
        else:
            common["overrides"] = {re.escape(effect.weights[k].name): {"lora_bias": True} for k in changed - refusing}
    ranks = {u.name: rank_field(u.site, u.rank if u.rank is not None else min(u.site.shape[-2:])) for u in effect.weights.values()}
    r = r or (max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0] if ranks else 8)
    # The first pattern that matches holds, and a name may be the end of a longer one.
    others = {name: rank for name, rank in sorted(ranks.items(), key=lambda item: -len(item[0])) if rank != r}
    same_invocation = {tuple(getattr(c, "alora_invocation_tokens", None) or ()) for c in sources}
    if same_invocation != {()}:
        if len(same_invocation) > 1:
            raise ValueError("Activated LoRAs with different `alora_invocation_tokens` act on different tokens; they have no sum.")
        common["alora_invocation_tokens"] = list(same_invocation.pop())
    if all(isinstance(c, LoraConfig) for c in sources):
        common["lora_dropout"] = first.lora_dropout  # type: ignore[attr-defined]
    config = LoraConfig(r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others), **common)
    return _targeted(base, config, effect, sources)


def _common_modules(effect: Effect, sources: Sequence[PeftConfig]) -> list[str] | None:
    """Names of the retrained modules; as the sources have them where those agree."""
    if not effect.modules:
        return None
    said = [getattr(c, "modules_to_save", None) for c in sources]
    same = all(s == said[0] for s in said) and said[0]
    return list(said[0]) if same else sorted(effect.modules)  # type: ignore[arg-type]


_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


def _targeted(base: nn.Module, config: Method, effect: Effect, sources: Sequence[PeftConfig]) -> Method:
    """The configuration, pointed at the weights of an effect: in the words of the sources where these hold, else by whole names."""
    wanted = set(effect.weights)
    said = [{name: copy.deepcopy(getattr(c, name, None)) for name in _TARGETING} for c in sources]
    candidates: list[dict[str, Any]] = []
    if all(s == said[0] for s in said):
        candidates.append(said[0])
    elif all(isinstance(s["target_modules"], set) and not any(s[n] for n in _TARGETING[1:4]) for s in said):
        parameters = sorted({p for s in said for p in s["target_parameters"] or ()})
        candidates.append({"target_modules": {t for s in said for t in s["target_modules"] or ()}, "target_parameters": parameters or None})
    raw = {key for key in wanted if isinstance(effect.weights[key].site, Stack)}
    parameters = sorted(f"{path}.{name}" for path, name in raw) or None
    # Whoever means an attention means what is behind it too.
    attentions = {path for path, name in wanted - raw if name not in ("weight", "whole")}
    names = {path for path, _ in wanted - raw if path.rpartition(".")[0] not in attentions}
    candidates.append({"target_modules": names, "target_parameters": parameters})
    candidates.append({"target_modules": "|".join(map(re.escape, sorted(names))), "target_parameters": parameters})
    if not wanted:
        return replace(config, target_modules=set())
    ends = tied_paths(base) if effect.ties else {}
    for fields in candidates:
        pointed = replace(config, **fields)
        found = explain_targets(base, pointed)
        hit = {(ends.get(t.path, t.path), t.site.name) for t in found.targets}
        if hit == wanted and not found.refused and not found.unmatched:
            return pointed
    raise ValueError(f"{type(config).__name__} cannot stand at all of {sorted(u.name for u in effect.weights.values())}.")


@torch.no_grad()
def put(parts: Sequence[Part], effect: Effect, base: nn.Module) -> None:
    """Give the parts of an adapter, still without values, those of an effect."""
    retrained = {p.path: p for p in places(base) if isinstance(p, Retrained)}
    for part in parts:
        p, key = part.adapter, (part.path, part.key)
        if not isinstance(p, Adapter):
            place = retrained.get(part.path)
            own = own_tensors(place) if place is not None else dict(part.module.state_dict(keep_vars=True))
            for name, change in effect.modules.get(part.path, {}).items():
                holder, _, leaf = name.rpartition(".")
                _set(p.get_submodule(holder), leaf, full(own[name]) + (change.whole() if isinstance(change, Sliced) else change))
        elif part.path in effect.tokens and isinstance(p.method, TrainableTokensConfig):
            tokens = effect.tokens[part.path]
            w = full(p.site.read()[0])
            own_rows = (w.mT if isinstance(p.site, Embedding) else w)[tokens.indices]
            _set(p, "trainable_tokens_delta", own_rows + tokens.rows)
        elif not isinstance(p.method, Tied):
            _put_update(p, effect.weights.get(key), effect.biases.get(key))
    for part in parts:
        materialise(part)


def _put_update(p: Adapter, update: Update | None, change: Tensor | None) -> None:
    if update is not None:
        change = update.bias
        if isinstance(p.method, LoraConfig):
            (a_name, b_name), (a, b) = p.method.names(p.site), update.factors()
            rank = p.declared[a_name].shape(p.site)[-2]
            _set(p, a_name, nn.functional.pad(a, (0, 0, 0, rank - a.shape[-2])))
            _set(p, b_name, nn.functional.pad(b, (0, rank - b.shape[-1])))
        else:
            _set(p, "diff", update.matrix())
    if p.trained_bias is not None:
        own = full(p.site.bias())  # type: ignore[arg-type]
        _set(p, "trained_bias", own if change is None else own + change)
        change = None
    for name in ("lora_B_bias", "diff_b"):
        if name in p.declared:
            shape = p.declared[name].shape(p.site)
            _set(p, name, torch.zeros(shape) if change is None else change.reshape(shape))


def _set(holder: nn.Module, name: str, value: Tensor) -> None:
    is_parameter = name in holder._parameters
    table: Any = holder._parameters if is_parameter else holder._buffers
    old = table[name]
    device = holder.site.device if isinstance(holder, Adapter) else value.device
    made = value.detach().to(device, old.dtype, copy=True).contiguous()
    table[name] = nn.Parameter(made, requires_grad=old.requires_grad) if is_parameter else made
