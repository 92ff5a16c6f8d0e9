"""The law in the numbers that people train with: half precision, autocast, checkpointing, dropout, the compiler."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.core.session import BASE

from .layouts import Layout
from .support import BY_NAME, acting, adapted, adapter_places, adapters, add, close, config_of, differs, every_pair, over


def relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


@every_pair
def test_bfloat16_host(case: str, layout: Layout) -> None:
    """Adapters of a bfloat16 host are kept in float32, and the result is that of full precision, rounded."""
    exact = adapted(case, layout)
    model = adapted(case, layout, torch.bfloat16)
    for p in adapters(model):
        assert all(q.dtype == torch.float32 for q in p.parameters())
    state = exact.state_dict()
    for name, value in model.state_dict().items():
        # The same numbers on both sides, so that only the computation differs.
        state[name] = value.double() if value.is_floating_point() else value
    exact.load_state_dict(state)
    for p in adapters(exact):
        p.method.derive(p)
    example = layout.example(torch.bfloat16)
    expected = exact(*(t.double() if t.is_floating_point() else t for t in example))
    actual = model(*example)
    assert actual.dtype == torch.bfloat16
    assert relative(actual, expected) < 0.02
    session = session_of(model)
    assert session is not None
    for place in adapter_places(model):
        place.merge(("a",))
    assert relative(model(*example), expected) < 0.02


@over(acting("linear", "conv2d", "embedding", once=True))
def test_adapter_in_half_precision(case: str, layout: Layout) -> None:
    model = layout.model(torch.bfloat16)
    attach(model, config_of(case, layout), "a", autocast_adapter_dtype=False)
    assert all(q.dtype == torch.bfloat16 for p in adapters(model) for q in p.parameters())
    after = model(*layout.example(torch.bfloat16))
    after.float().sum().backward()
    assert after.dtype == torch.bfloat16


@over(acting("linear", "conv1d-gpt2", "conv2d", "embedding", "attention", "experts", "tied"))
def test_autocast(case: str, layout: Layout) -> None:
    model = adapted(case, layout, torch.float32).train()
    example = layout.example(torch.float32)
    torch.manual_seed(5)
    expected = model(*example)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        actual = model(*example)
        bare = layout.model(torch.float32)(*example)
    assert actual.dtype == bare.dtype
    if "dropout" not in case:
        assert relative(actual, expected) < 0.03
    actual.float().square().sum().backward()
    for p in adapters(model):
        assert all(q.grad is not None and q.grad.dtype == torch.float32 and q.grad.isfinite().all() for q in p.parameters())


@over(acting("linear", "conv2d", "embedding", "attention", "experts", "tied"))
def test_gradient_checkpointing(case: str, layout: Layout) -> None:
    """Recomputing the layer gives the same gradients, also where something is drawn at random."""

    def gradients(through: bool) -> list[Tensor]:
        model, example = adapted(case, layout).train(), layout.example()
        torch.manual_seed(11)
        y = checkpoint(model, *example, use_reentrant=False) if through else model(*example)
        y.square().sum().backward()
        return [q.grad for p in adapters(model) for q in p.parameters() if q.grad is not None]

    direct, again = gradients(False), gradients(True)
    assert direct
    assert len(direct) == len(again)
    for one, other in zip(direct, again, strict=True):
        close(one, other, 1e-12)


DROPPING = [pair for pair in acting("linear", "conv2d", "conv1d-gpt2") if "dropout" in pair[0]]


@over(DROPPING)
def test_dropout_only_in_training(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout), layout.example()
    still = model(*example)
    assert torch.equal(model(*example), still)
    model.train()
    assert any(differs(model(*example), model(*example)) for _ in range(20))
    model.eval()
    assert torch.equal(model(*example), still)


@over([pair for pair in DROPPING if pair[0].startswith(("LORA-dropout", "VERA"))])
def test_dropout_is_right_on_average(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout), layout.example()
    still = model(*example)
    model.train()
    torch.manual_seed(3)
    with torch.no_grad():
        mean = torch.stack([model(*example) for _ in range(3000)]).mean(0)
    close(mean, still, 0.1)


# Every method once and every layout once; the products are slow.
OTHERS = [x for case, x in acting() if case == "LORA" and x.name != "linear" and not x.no_graph]


@over([*acting("linear", once=True), *(("LORA", layout) for layout in OTHERS)])
def test_compiles_as_one_graph(case: str, layout: Layout) -> None:
    torch._dynamo.reset()
    model, example = adapted(case, layout), layout.example()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    close(compiled(*example), model(*example))
    session = session_of(model)
    assert session is not None
    with session.local(()):
        close(compiled(*example), layout.model()(*example))
    close(compiled(*example), model(*example))


@pytest.mark.slow
@over([pair for pair in acting() if not pair[1].no_graph])
def test_compiles_everywhere(case: str, layout: Layout) -> None:
    torch._dynamo.reset()
    model, example = adapted(case, layout), layout.example()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    after = compiled(*example)
    close(after, model(*example))
    after.square().sum().backward()
    assert all(q.grad is not None for p in adapters(model) for q in p.parameters())


@over([pair for pair in acting() if pair[0] == "LORA" and pair[1].no_graph])
def test_hosts_without_a_graph_have_none_of_their_own(case: str, layout: Layout) -> None:
    torch._dynamo.reset()
    with pytest.raises(Exception, match="data-dependent"):
        torch.compile(layout.model(), backend="eager", fullgraph=True)(*layout.example())
    model, example = adapted(case, layout), layout.example()
    torch._dynamo.reset()
    close(torch.compile(model, backend="eager")(*example), model(*example))


@over([("LORA", BY_NAME[name]) for name in ("linear", "conv2d", "layer-norm", "attention", "experts")])
def test_mixed_batch_compiles_as_one_graph(case: str, layout: Layout) -> None:
    torch._dynamo.reset()
    model, example = adapted(case, layout), layout.example()
    add(model, "LORA", layout, "b")
    session = session_of(model)
    assert session is not None
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for rows in (["a", BASE, "b", "a"], ["b", "b", BASE, "a"]):
        with session.local(rows=rows):
            expected = model(*example)
            close(compiled(*example), expected)
        assert differs(expected, model(*example))


def test_two_adapters_train_at_once() -> None:
    """Adapters that act one on the other each get their own gradients."""
    layout = BY_NAME["linear"]
    model = adapted("LORA", layout)
    add(model, "HRA", layout, "b")
    session = session_of(model)
    assert session is not None
    session.active = ("a", "b")
    for p in adapters(model):
        p.requires_grad_()
    model(*layout.example()).square().sum().backward()
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for p in adapters(model) for q in p.parameters())


def test_the_padding_row_stays_put() -> None:
    """A token that the base never trains is not trained by an adapter either."""
    layout = BY_NAME["embedding"]
    model = adapted("LORA", layout)
    assert isinstance(model.host, nn.Embedding)
    pad = model.host.padding_idx
    assert pad is not None
    model(torch.tensor([[0, pad, 2]])).sum().backward()
    gradient = model.host.adapters["a"].lora_embedding_A.grad
    assert gradient[:, pad].abs().sum() == 0
    assert gradient[:, 2].abs().sum() > 0
