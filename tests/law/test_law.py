"""forward == fold, for every method on every layout; and what follows from it: merging, stacking, mixed batches, gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from inlay.core.attach import activate, attach
from inlay.core.inlaid import session_of
from inlay.core.param import Param
from inlay.core.session import BASE
from inlay.core.targets import find_targets

from .cases import METHOD_CASES
from .layouts import BATCH, Layout
from .support import (
    BY_NAME,
    PAIRS,
    REFUSED,
    acting,
    adapted,
    adapter_places,
    adapters,
    add,
    by_fold,
    close,
    config_of,
    differs,
    every_pair,
    folded_tensors,
    jitter,
    over,
)  # fmt: skip


@every_pair
def test_identity_at_init(case: str, layout: Layout) -> None:
    model, example = layout.model(), layout.example()
    base = model(*example)
    config = config_of(case, layout)
    attach(model, config, "a")
    after = model.eval()(*example)
    if config.never_identity:
        assert differs(after, base)
    else:
        close(after, base, 1e-6)  # initial values are drawn in float32


@every_pair
def test_the_law(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout), layout.example()
    base = layout.model()(*example)
    for strength in (1.0, 0.5, 0.0):
        for p in adapters(model):
            p.strength = strength
        after = model(*example)
        close(after, by_fold(model, layout, example, "a"))
        assert differs(after, base) == (strength != 0)


@every_pair
def test_gradients(case: str, layout: Layout) -> None:
    """Only the adapter is trained, all of it, and its gradients are those of the folded weight."""
    model, example = adapted(case, layout), layout.example()
    trained = {n: q for n, q in model.named_parameters() if q.requires_grad}
    assert set(map(id, trained.values())) == {id(q) for p in adapters(model) for q in p.parameters()}
    inputs = [t.requires_grad_() if t.is_floating_point() else t for t in example]
    wanted = [*trained.values(), *(t for t in inputs if t.requires_grad)]
    direct, folded = model(*inputs), by_fold(model, layout, inputs, "a")
    weight = torch.randn(direct.shape, dtype=direct.dtype)
    ours = torch.autograd.grad((direct * weight).sum(), wanted, allow_unused=True)
    theirs = torch.autograd.grad((folded * weight).sum(), wanted, allow_unused=True)
    for name, one, other in zip([*trained, *(f"input {i}" for i, _ in enumerate(inputs))], ours, theirs, strict=False):
        assert one is not None, f"{name} gets no gradient"
        assert other is not None
        close(one, other, 1e-8)


@every_pair
def test_merge_and_exact_unmerge(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout), layout.example()
    session, before = session_of(model), model(*example)
    assert session is not None
    own = {n: (q, q.detach().clone()) for n, q in layout_parameters(model)}
    folded = folded_tensors(model, "a")
    for place in adapter_places(model):
        place.merge(("a",), check=True)
    close(model(*example), before)
    with session.local(()):
        close(model(*example), layout.model()(*example), 1e-12)
    held = dict(model.named_parameters(remove_duplicate=False))
    for name, value in folded.items():
        assert torch.equal(held[name], value.to(held[name].dtype))
    for place in adapter_places(model):
        place.unmerge()
    after = dict(layout_parameters(model))
    assert after.keys() == own.keys()
    for name, (tensor, value) in own.items():
        assert after[name] is tensor
        assert torch.equal(tensor, value)
    assert torch.equal(model(*example), before)


def layout_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, q) for n, q in model.named_parameters(remove_duplicate=False) if ".adapters." not in n]


def test_a_thousand_merges_in_bfloat16() -> None:
    layout = BY_NAME["linear"]
    model = adapted("LORA", layout, torch.bfloat16)
    (place,) = adapter_places(model)
    before = place.site.module.weight.detach().clone()
    merged = None
    for _ in range(1000):
        place.merge(("a",))
        now = place.site.module.weight.detach().clone()
        assert merged is None or torch.equal(now, merged)
        merged = now
        place.unmerge()
    assert torch.equal(place.site.module.weight, before)
    assert not torch.equal(merged, before)


# A method of each family: one that adds, one that scales, one that turns, one that looks at the weight, and one that gives a bias.
FAMILIES = {"LORA", "IA3", "HRA", "DELORA", "BEFT"}


@pytest.mark.parametrize("others", ["families", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("layout", ["linear", "linear-no-bias", "conv2d", "embedding", "experts", "layer-norm"])
@pytest.mark.parametrize("first", METHOD_CASES)
def test_stacked_pairs(first: str, layout: str, others: str) -> None:
    """Two adapters act one after the other, in the order in which they are active."""
    on = BY_NAME[layout]
    here = [case for case, x in acting(layout, once=True)]
    if first not in here:
        assert REFUSED[first, layout]
        return
    for second in here if others == "all" else [case for case in here if case in FAMILIES | {first}]:
        model, example = on.model(), on.example()
        add(model, first, on, "a")
        add(model, second, on, "b")
        session = session_of(model)
        assert session is not None
        for names in (("a", "b"), ("b", "a")):
            activate(session, names, model)
            close(model(*example), by_fold(model, on, example, *names))


@over(acting(once=True))
def test_mixed_batch(case: str, layout: Layout) -> None:
    """Each row of a batch has its own adapter, or none."""
    model, example = adapted(case, layout), layout.example()
    partner = case if case.startswith("TRAINABLE") or layout.name == "tied" else "LORA"
    if (partner, layout.name) in REFUSED:
        partner = case
    add(model, partner, layout, "b")
    session = session_of(model)
    assert session is not None
    rows = ["b", BASE, "a", "b"]
    with session.local(rows=rows):
        together = model(*example)
    per_row = len(example[0]) // BATCH
    for i, row in enumerate(rows):
        with session.local(() if row == BASE else (row,)):
            alone = model(*(t[i * per_row : (i + 1) * per_row] for t in example))
        close(together[i * per_row : (i + 1) * per_row], alone)
    # The choice ended with the block.
    close(model(*example), by_fold(model, layout, example, *session.active))


@every_pair
def test_file_round_trip(case: str, layout: Layout) -> None:
    """What a parameter looks like in a file leads back to the parameter."""
    model = adapted(case, layout)
    for p in adapters(model):
        for name, param in p.declared.items():
            tensor = getattr(p, name).detach()
            stored = param.to_file(p.site, tensor)
            assert tuple(stored.shape) == param.shape_in_file(p.site)
            assert torch.equal(param.from_file(p.site, stored.clone().contiguous()), tensor)
            assert stored.numel() == tensor.numel()


@pytest.mark.parametrize("pair", sorted(REFUSED), ids="/".join)
def test_refusals_give_a_reason(pair: tuple[str, str]) -> None:
    case, layout = pair[0], BY_NAME[pair[1]]
    model = layout.model()
    with pytest.raises(ValueError, match="cannot act on") as caught:
        find_targets(model, config_of(case, layout))
    assert REFUSED[pair] in str(caught.value)
    before = dict(vars(model.host))
    with pytest.raises(ValueError, match="cannot act on"):
        attach(model, config_of(case, layout), "a")
    assert dict(vars(model.host)) == before
    assert not list(adapters(model))


def test_every_method_acts_somewhere() -> None:
    assert {c for c, _ in PAIRS} >= set(METHOD_CASES)


@over(acting("linear", "conv2d", "experts"))
def test_seeds(case: str, layout: Layout) -> None:
    """Initial values depend on the seed and the names, on nothing that ran before."""

    def start(seed: int, disturbed: bool) -> list[tuple[Param, Tensor]]:
        model = layout.model()
        if disturbed:
            torch.manual_seed(99)
            torch.rand(7)
        state = torch.random.get_rng_state()
        attach(model, config_of(case, layout, seed=seed), "a")
        assert torch.equal(torch.random.get_rng_state(), state), "the global generator was used"
        return [(param, getattr(p, name).detach()) for p in adapters(model) for name, param in p.declared.items()]

    for (param, one), (_, again), (_, other) in zip(start(3, False), start(3, True), start(4, False), strict=True):
        assert torch.equal(one, again)
        assert torch.equal(one, other) != is_drawn(param, one)


def is_drawn(param: Param, like: Tensor) -> bool:
    one, other = torch.zeros(like.shape), torch.zeros(like.shape)
    param.init(one, torch.Generator().manual_seed(1))
    param.init(other, torch.Generator().manual_seed(2))
    return not torch.equal(one, other)


def test_order_of_modules_does_not_matter() -> None:
    def build(names: str) -> nn.Module:
        model = nn.ModuleDict({n: nn.Linear(8, 6) for n in names})
        attach(model, config_of("LORA", BY_NAME["linear"], target_modules=list(names), init_lora_weights="gaussian"), "a")
        return model

    one, other = build("xy"), build("yx")
    for n in "xy":
        assert torch.equal(one[n].adapters["a"].lora_A, other[n].adapters["a"].lora_A)
    assert not torch.equal(one["x"].adapters["a"].lora_A, one["y"].adapters["a"].lora_A)


def test_strength_of_one_adapter_leaves_others_alone() -> None:
    layout = BY_NAME["linear"]
    model, example = adapted("LORA", layout), layout.example()
    add(model, "IA3", layout, "b")
    session = session_of(model)
    assert session is not None
    activate(session, ("a", "b"), model)
    for p in adapters(model, "a"):
        p.strength = 0.0
    together = model(*example)
    with session.local(("b",)):
        close(together, model(*example))
    jitter(model, "a")
    close(model(*example), together)
