"""The law on the layers of real quantisation backends: every method on each of them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay import LoraConfig
from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.core.place import Place
from inlay.core.targets import explain_targets

from .backends import BACKENDS, SETTINGS, loss, state
from .cases import METHOD_CASES
from .layouts import Model
from .support import BY_NAME, ROWS, acting, adapter_places, adapters, config_of, differs, jitter, of_each_row

LINEAR = sorted({case for case, _ in acting("linear")})
ALL = BACKENDS | SETTINGS


def dense() -> nn.Linear:
    torch.manual_seed(1)
    layer = nn.Linear(128, 64)
    nn.init.normal_(layer.weight, std=0.1)
    return layer.requires_grad_(False)


def quantised(backend: str) -> nn.Module:
    return Model(ALL[backend](dense())).requires_grad_(False)


def pairs() -> list[Any]:
    found = [pytest.param(c, b, id=f"{c}/{b}", marks=[] if c in METHOD_CASES else [pytest.mark.slow]) for c in LINEAR for b in BACKENDS]
    return found + [pytest.param("LORA", b, id=f"LORA/{b}") for b in SETTINGS]


def close(actual: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def adapted(case: str, backend: str) -> tuple[nn.Module, Place] | None:
    model = quantised(backend)
    config = config_of(case, BY_NAME["linear"])
    refused = explain_targets(model, config).refused
    if refused:
        assert "quantised" in refused["host"]
        return None
    attach(model, config, "a")
    jitter(model, "a", 0.05)
    (place,) = adapter_places(model.eval())
    return model, place


def exactness(backend: str) -> float:
    """Layers that round their inputs too (bitsandbytes' does so out of training) are no exact products with their weight."""
    return 0.1 if backend in ROUND_INPUTS else 2e-4


ROUND_INPUTS = ("torchao-int8-dynamic", "bitsandbytes-int8")


def is_product(y: Tensor, backend: str, x: Tensor, w: Tensor, b: Tensor | None) -> None:
    """A layer's output is the product with its weight, up to what rounding its inputs can do to that.

    An input is rounded to one of 127 steps up to the largest of its row, and to half precision before, so it is off by half a step
    and ``2^-11`` of itself at most. The output is off by the sum of those, each times the weight's entry, so the bound grows with the
    weight that was merged: QA-LoRA's change, one number for a whole group of inputs, has six times the norm of the layer's own here.
    """
    expected = F.linear(x, w, b)
    allowed = 2e-4 * (1 + expected.abs())
    if backend in ROUND_INPUTS:
        off = x.abs().amax(-1, keepdim=True) / 127 / 2 + 2**-11 * x.abs()
        allowed = allowed + F.linear(off, w.abs())
    assert ((y - expected).abs() <= allowed).all()


@pytest.mark.parametrize(("case", "backend"), pairs())
def test_forward_gradients_merge_and_restore(case: str, backend: str) -> None:
    made = adapted(case, backend)
    if made is None:
        return
    model, place = made
    ones = torch.ones(1, 128)
    base = quantised(backend)(ones)
    # Few rows and many: formulas and kernels.
    for rows in (3, 40):
        x = torch.randn(rows, 128, requires_grad=True)
        w, b = place.fold(("a",))
        after, by_fold = model(x), F.linear(x, w, b)
        close(after, by_fold, exactness(backend))
        wanted = [x, *(q for p in adapters(model) for q in p.parameters())]
        assert {id(q) for q in model.parameters() if q.requires_grad} == {id(q) for q in wanted[1:]}
        along = torch.randn_like(after)
        ours = torch.autograd.grad((after * along).sum(), wanted)
        theirs = torch.autograd.grad((by_fold * along).sum(), wanted)
        for one, other in zip(ours, theirs, strict=True):
            close(one / (1 + other.abs().max()), other / (1 + other.abs().max()), exactness(backend))
    x = x.detach()
    after, own = model(x), state(place.site.module)
    assert differs(after, F.linear(x, *place.site.read()))
    place.merge(("a",))
    # A weight that is left as it is (BEFT's) is not rounded again.
    assert (place.rounding is None) == torch.equal(w, place.site.read()[0].to(w.dtype))
    assert place.rounding is None or place.rounding[0] < loss(backend)
    merged = place.site.matrix(place.site.store.read(place.site.module, "weight")).detach().float()
    is_product(model(x).detach(), backend, x, merged, None if b is None else b.detach())
    session = session_of(model)
    assert session is not None
    with session.local(()):
        is_product(model(ones).detach(), backend, ones, *place.site.read())
        is_product(base, backend, ones, *place.site.read())
    place.unmerge()
    back = state(place.site.module)
    assert own.keys() == back.keys()
    assert all(torch.equal(own[k], back[k]) for k in own)
    assert torch.equal(model(x), after)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", sorted({c for c in METHOD_CASES if c in LINEAR}))
def test_no_restored_weight_is_kept(case: str, backend: str) -> None:
    """Between the two ways nothing is held that is as large as the weight, but what was there before."""
    made = adapted(case, backend)
    if made is None:
        return
    model, _ = made
    model.train()
    there = {t.data_ptr() for t in (*model.parameters(), *model.buffers()) if type(t) in (Tensor, nn.Parameter)}
    kept: list[tuple[int, ...]] = []

    def pack(t: Tensor) -> Tensor:
        if t.is_floating_point() and t.numel() >= 64 * 128 and type(t) is Tensor and t.data_ptr() not in there:
            kept.append(tuple(t.shape))
        return t

    x = torch.randn(40, 128, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = model(x)
    y.square().sum().backward()
    assert kept == []
    assert x.grad is not None
    assert all(q.grad is not None for p in adapters(model) for q in p.parameters())


@pytest.mark.parametrize("backend", ALL)
def test_mixed_batches_and_switching(backend: str) -> None:
    model = quantised(backend)
    x = torch.randn(4, 128)
    alone, together = of_each_row(model, x)
    close(together, torch.stack([alone[n][i] for i, n in enumerate(ROWS)]), exactness(backend))
    assert differs(alone["a"], alone["b"])


@pytest.mark.parametrize("backend", ALL)
def test_a_thousand_and_one_merges_are_one(backend: str) -> None:
    made = adapted("LORA", backend)
    assert made is not None
    model, place = made
    x, before = torch.randn(4, 128), state(place.site.module)
    place.merge(("a",))
    once = model(x)
    for _ in range(10):
        place.unmerge()
        place.merge(("a",))
    assert torch.equal(model(x), once)
    place.unmerge()
    assert all(torch.equal(t, before[k]) for k, t in state(place.site.module).items())


def test_bitsandbytes_passes_gradients_after_inference() -> None:
    """The library packs its weight in the first call for inference on some CPUs, and from then on passes no gradient."""
    model = quantised("bitsandbytes-nf4")
    with torch.no_grad():
        model.eval()(torch.randn(2, 128))
    attach(model, LoraConfig(target_modules=["host"]), "a")
    x = torch.randn(2, 128, requires_grad=True)
    (place,) = adapter_places(model)
    for _ in range(2):
        model.train()(x).sum().backward()
        close(x.grad, place.fold(("a",))[0].sum(0).expand(2, -1), 1e-2)  # type: ignore[arg-type]
        x.grad = None
        with torch.no_grad():
            model.eval()(x)


def test_copies_are_independent() -> None:
    made = adapted("LORA", "bitsandbytes-nf4")
    assert made is not None
    model, _ = made
    x = torch.randn(2, 128)
    other = copy.deepcopy(model)
    assert torch.equal(other(x), model(x))
    (place,) = adapter_places(other)
    place.merge(("a",))
    assert differs(other(x), model(x))
