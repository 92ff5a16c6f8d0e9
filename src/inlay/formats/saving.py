"""The tensors that the file of an adapter has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any, Literal

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.additive import LowRank
from ..core.config import nearest
from ..core.inlaid import host_of, places
from ..core.method import Method
from ..core.place import Place
from ..core.retrained import Retrained
from ..core.session import Session
from ..core.targets import base_modules, end_of
from ..core.tied import Tied
from ..methods.trainable_tokens import TrainableTokensConfig
from .slots import PREFIX, Slot, key_in_file, slots_of_model


def adapter_tensors(
    model: nn.Module,
    session: Session,
    name: str,
    *,
    prefix: str = PREFIX,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter as a file has them.

    Args:
        model: the bare model that holds the adapters.
        prefix: in front of the keys.
        state_dict: take the values from here (a gathered state dict of a sharded model), by live names with any prefix.
        save_embedding_layers: add the base's embeddings; ``"auto"`` does where they are adapted or were resized.

    Raises:
        ValueError: ``state_dict`` lacks a tensor of the adapter, or a tensor is empty, as the shards of a distributed model are that
            were not gathered.
    """
    session.check((name,))
    find = _finder(state_dict)
    own = [(s, find(s)) for s in slots_of_model(model, name)]
    empty = [s.live for s, t in own if t.numel() == 0 and (s.param is None or s.site is None or prod(s.param.shape(s.site)))]
    if empty:
        raise ValueError(f"{len(empty)} tensors to save are empty, such as {empty[0]!r}: gather the shards of the model before saving.")
    found = {key_in_file(s, prefix): s.to_file(t) for s, t in own}
    config = session.configs[name]
    if isinstance(config, Method):
        found = config.written(found)
    found |= {prefix + k: t for k, t in _of_tied_ends(model, name).items()}
    for path, module in _embeddings_to_save(model, session, name, save_embedding_layers):
        adapted = any(isinstance(p, Place) and host_of(p) is module and name in p.adapters for p in places(model))
        found[f"{prefix}{path}.{'base_layer.' if adapted else ''}weight"] = _own_weight(module)
    return {k: _whole(t) for k, t in found.items()}


def _own_weight(module: nn.Module) -> Tensor:
    """A module's weight, without what is merged into it."""
    here = list(module.__dict__.get("_inlay", {}).values())
    for place in here:
        if isinstance(place, Place) and place.merged:
            return place.site.raw(place.site.read()[0]).contiguous()
    replaced = next((place.own for place in here if isinstance(place, Retrained) and place.own is not None), module)
    return replaced._parameters["weight"]  # type: ignore[return-value]


def _of_tied_ends(model: nn.Module, name: str) -> dict[str, Tensor]:
    """HF writes the transposed factors of a tied head beside those of the embedding; readers of its files look for them."""
    found = {}
    for place in places(model):
        p = place.adapters.get(name)
        source = p.method.source if isinstance(p, Adapter) and isinstance(p.method, Tied) else None
        if source is None:
            continue
        if isinstance(source.method, LowRank) and "lora_embedding_A" in source.declared:
            a, b = source.lora_embedding_A, source.lora_embedding_B
            found |= {f"{place.path}.lora_A.weight": b.mT, f"{place.path}.lora_B.weight": a.mT}
        elif isinstance(source.method, TrainableTokensConfig) and not source.method.as_part:
            found[f"{place.path}.trainable_tokens_delta"] = source.trainable_tokens_delta
    return found


def _finder(state_dict: Mapping[str, Tensor] | None) -> Callable[[Slot], Tensor]:
    if state_dict is None:
        return lambda slot: slot.tensor
    clean = {_bare(k): t for k, t in state_dict.items()}

    def find(slot: Slot) -> Tensor:
        if slot.live not in clean:
            raise ValueError(
                f"The given state_dict lacks {slot.live!r}.{nearest(slot.live, clean)} Was it gathered from the adapted model?"
            )
        return clean[slot.live]

    return find


def _bare(key: str) -> str:
    """A live name without what wrappers put in front of it or into it."""
    key = key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    return key.removeprefix("module.").removeprefix(PREFIX)


def _whole(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def _embeddings_to_save(model: nn.Module, session: Session, name: str, wanted: bool | str) -> list[tuple[str, nn.Module]]:
    ends = [end_of(model, g) for g in ("get_input_embeddings", "get_output_embeddings")]
    named = [(p, m) for p, m in base_modules(model) if any(m is e for e in ends) and m._parameters.get("weight") is not None]
    config = session.configs[name]
    tokens = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None)
    if wanted != "auto":
        return named if wanted else []
    if not tokens:
        adapted = {id(host_of(p)) for p in places(model) if isinstance(p, Place) and p.adapters.get(name) is not None}
        adapted_embeddings = [(p, m) for p, m in named if id(m) in adapted]
        # The new rows of a vocabulary that grew are at both ends, also where an adapter is at one of them.
        if adapted_embeddings and not _resized(model, config):
            return adapted_embeddings
    return named if _resized(model, config) else []


def _resized(model: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base on disk. Only a local folder is looked at."""
    import json
    from pathlib import Path

    size = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if not size or not config.base_model_name_or_path or not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8")).get("vocab_size", size) != size
