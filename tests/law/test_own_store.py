"""Every method on weights of our own formats: forward == fold, gradients, merging with one rounding, exact unmerging."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.core.targets import explain_targets
from inlay.kernels.quantised_tensor import QuantizedTensor
from inlay.quantize import quantize_

from .layouts import Layout
from .support import acting, adapter_places, adapters, by_fold, close, config_of, differs, jitter, over

BLOCK = 16
# The layouts whose weights are quantised, and how far from a value the nearest level is: half the widest gap, and the scale's own error.
HOSTS = ("linear", "conv1d-gpt2", "embedding", "experts")


def own(model: torch.nn.Module) -> dict[str, Tensor]:
    return {n: q for n, q in model.named_parameters(remove_duplicate=False) if isinstance(q, QuantizedTensor)}


@over([pair for to in HOSTS for pair in acting(to, once=to != "linear")])
@pytest.mark.parametrize("to", ["nf4", "int8"])
def test_the_law(case: str, layout: Layout, to: str) -> None:
    model: Any = quantize_(layout.model(), to, skip=[], block=BLOCK)
    assert own(model)
    example = layout.example()
    base = model(*example)
    config = config_of(case, layout)
    refused = explain_targets(model, config).refused
    if refused:
        # LoftQ and its like start from a weight that is not quantised yet.
        assert all("quantised" in reason for reason in refused.values())
        return
    attach(model, config, "a")
    jitter(model, "a")
    model.eval()
    after = model(*example)
    close(after, by_fold(model, layout, example, "a"), 1e-6)
    assert differs(after, base)
    after.square().sum().backward()
    assert all(q.grad is not None for p in adapters(model) for q in p.parameters())

    before = own(model)
    for place in adapter_places(model):
        wanted, _ = place.fold(("a",))
        place.merge(("a",))
        merged = place.site.module._parameters[place.site.name]
        if isinstance(merged, QuantizedTensor):
            assert merged.to_format == to
            lost = (place.site.matrix(merged.dequantize()) - wanted).norm() / wanted.norm()
            assert lost < (0.2 if to == "nf4" else 0.01)
    session = session_of(model)
    assert session is not None
    with session.local(()):
        close(model(*example), base, 1e-6)
    for place in adapter_places(model):
        place.unmerge()
    assert all(now is before[name] for name, now in own(model).items())
    assert torch.equal(model(*example), after)
