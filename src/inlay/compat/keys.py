"""From the name of a tensor in an adapter's file to its name in the model."""

from __future__ import annotations

from typing import Any

from ..core.method import METHODS
from ..core.views import TunerLayer
from ..formats.slots import PREFIX, slots


def live_name(key: str, adapter_name: str, prefixes: tuple[str, ...]) -> str:
    """The rule that holds for a method's own tensors: ``q_proj.lora_A.weight`` is ``q_proj.adapters.<name>.lora_A``.

    Args:
        key: in a file; keys of the base, which may be there too, lose HF's prefix and the wrapper's name.
        adapter_name: what the adapter is called in the model.
        prefixes: what the methods' tensors begin with.
    """
    parts = [part for part in key.removeprefix(PREFIX).split(".") if part != "token_adapter"]
    at = next((i for i, part in enumerate(parts) if part.startswith(prefixes)), None)
    if at is None or "adapters" in parts[:at]:
        return ".".join(part for part in parts if part != "base_layer")
    end = "_".join(parts[at:]).removesuffix("_weight")
    return ".".join([*parts[:at], "adapters", adapter_name, end])


def prefixes_of(config: Any) -> tuple[str, ...]:
    """What the tensors of a configuration's method begin with, and those of tokens beside it; of all methods where it is not known."""
    own = getattr(config, "prefix", "")
    return (own, "trainable_tokens_") if own else tuple(cls.prefix for cls in METHODS.values() if cls.prefix)


def load_map(layer: Any, adapter_name: str) -> dict[str, str]:
    """The tensors of a layer for which `live_name` is wrong: its answer to the right name, both from the layer on."""
    found: dict[str, str] = {}
    for place in layer._inlay.values():
        adapter = place.adapters.get(adapter_name)
        # A file may call the host something that does not begin with its own name; that cannot be said from the layer on.
        if adapter is None or not place.in_file.startswith(place.path):
            continue
        prefixes = prefixes_of(place.session.configs.get(adapter_name))
        inside = place.in_file.removeprefix(place.path).lstrip(".")
        for slot in slots("", inside, place.name, adapter, adapter_name):
            guess = live_name(slot.key, adapter_name, prefixes)
            # What is shared by all layers belongs to the model, and follows from the configuration.
            if guess != slot.live and not slot.key.startswith("base_model."):
                found[guess] = slot.live
    return found


# HF's name for it, on every adapted layer.
TunerLayer.adapter_state_dict_load_map = load_map  # type: ignore[attr-defined]
