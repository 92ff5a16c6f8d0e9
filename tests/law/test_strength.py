"""How much of an adapter acts, for every method on every layout: between the base and the adapter, and beyond."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import inlay

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


class Tokens(nn.Module):
    """What it gives is what its last layer does."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.table(ids))


@pytest.mark.parametrize(
    ("config", "call"),
    [
        (inlay.LilyConfig(r=3, target_modules=["last"], init_weights=False), {}),
        (inlay.PolyConfig(r=3, target_modules=["last"], init_weights=False), {}),
        (inlay.PolyConfig(r=2, n_tasks=3, target_modules=["last"], init_weights=False), {"task_ids": torch.tensor([1, 2])}),
        (inlay.LoraConfig(r=2, alora_invocation_tokens=[5], target_modules=["last"], init_lora_weights=False), {}),
    ],
    ids=["lily", "poly", "tasks", "activated"],
)
def test_what_is_no_function_of_the_weight_has_a_strength(config: Any, call: dict[str, Any]) -> None:
    torch.manual_seed(0)
    base = Tokens()
    ids = torch.tensor([[1, 5, 2, 7], [0, 4, 5, 1]])
    plain = base(ids)
    model: Any = inlay.get_peft_model(base, config, "a").eval()
    once = model(ids, **call) - plain
    assert once.abs().max() > 1e-3
    for strength in (0.0, 0.5, 2.0, -1.0):
        model.set_scale("a", strength)
        close(model(ids, **call) - plain, strength * once, 1e-6)
