"""How much of an adapter acts, for every method on every layout: between the base and the adapter, and beyond."""

from __future__ import annotations

import torch
from torch import nn

from .layouts import Layout
from .support import acting, adapted, adapter_places, adapters, close, every_pair, over


def change(model: nn.Module, strength: float) -> list[torch.Tensor]:
    """What the adapter changes in weights and biases."""
    found = []
    for p in adapters(model, "a"):
        p.strength = strength
    for place in adapter_places(model):
        w, b = place.fold(("a",))
        w0, b0 = place.fold(())
        found.append(w - w0)
        # A retrained bias that the method changes once more is of the second order.
        twice = any(p.trained_bias is not None and not p.method.scales_itself for p in place.adapters.values())
        if b is not None and not twice:
            found.append(b - (0 if b0 is None else b0))
    return found


@every_pair
def test_strength_is_a_factor_of_what_the_adapter_changes(case: str, layout: Layout) -> None:
    model = adapted(case, layout)
    once = change(model, 1.0)
    for strength in (0.0, 0.5, 2.0, -1.0):
        for found, one in zip(change(model, strength), once, strict=True):
            close(found, strength * one, 1e-8)


@over(acting("linear", "conv2d", "embedding", "experts", once=True))
def test_the_way_through_the_layer_follows_and_so_does_a_merge(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout), layout.example()
    for place in adapter_places(model):
        place.set_strength("a", 2.0)
    doubled = model(*example)
    for place in adapter_places(model):
        place.merge(("a",))
    close(model(*example), doubled)
    for place in adapter_places(model):
        place.set_strength("a", 0.5)
        assert place.merged == ("a",)
    merged = model(*example)
    for place in adapter_places(model):
        place.unmerge()
    close(model(*example), merged)
