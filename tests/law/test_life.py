"""Adapters come and go: copies, pickles and files of a model keep them; taking them out leaves no trace."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from inlay.core.attach import activate, attach, detach
from inlay.core.inlaid import Inlaid, session_of

from .layouts import Layout
from .support import BY_NAME, acting, adapted, adapter_places, adapters, add, close, config_of, differs, every_pair, jitter, over


def saved(model: nn.Module) -> nn.Module:
    memory = io.BytesIO()
    torch.save(model, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("how", COPIES)
@over([pair for pair in acting(once=True) if pair[1].call is None])
def test_copies(case: str, layout: Layout, how: str) -> None:
    model, example = adapted(case, layout), layout.example()
    before = model(*example)
    twin = COPIES[how](model)
    assert torch.equal(twin(*example), before)
    assert isinstance(twin.host, Inlaid)
    assert not {id(q) for q in model.parameters()} & {id(q) for q in twin.parameters()}
    mine, its = session_of(model), session_of(twin)
    assert mine is not its
    jitter(twin, "a", 0.5)
    assert differs(twin(*example), before)
    assert torch.equal(model(*example), before)
    assert its is not None
    activate(its, (), twin)
    close(twin(*example), layout.model()(*example))
    assert torch.equal(model(*example), before)


def trace(model: nn.Module) -> dict[str, Any]:
    """Everything that can be seen of a model."""
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "keys": list(model.state_dict()),
        "trained": {n: q.requires_grad for n, q in model.named_parameters()},
        "tensors": {n: id(q) for n, q in model.named_parameters(remove_duplicate=False)},
        "attributes": {n: sorted(vars(m)) for n, m in model.named_modules()},
    }


@every_pair
def test_detaching_leaves_no_trace(case: str, layout: Layout) -> None:
    model, example = layout.model(), layout.example()
    next(iter(model.parameters())).requires_grad_(False)
    before, output = trace(model), model(*example)
    attach(model, config_of(case, layout), "a")
    attach(model, config_of(case, layout), "b")
    jitter(model, "a")
    assert isinstance(model.host, type(layout.build())) or isinstance(layout.build(), type(model))
    assert set(before["keys"]) <= set(model.state_dict())
    detach(model, "a")
    assert list(adapters(model, "b"))
    detach(model, "b")
    assert trace(model) == before
    assert torch.equal(model(*example), output)
    assert session_of(model) is None


@over(acting("linear", once=True))
def test_a_hook_on_the_instance_keeps_running(case: str, layout: Layout) -> None:
    """Libraries put a forward of their own on a module (accelerate does); adapters go inside it and around it."""
    model, example = layout.model(), layout.example()
    own, calls = model.host.forward, []

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    model.host.forward = hooked
    expected = adapted(case, layout)(*example)
    add(model, case, layout, "a")
    close(model(*example), expected)
    assert calls
    detach(model, "a")
    assert model.host.forward is hooked


def test_a_computed_weight_is_adapted_and_not_merged() -> None:
    """A parametrization computes the weight from other tensors; there is no place to merge into."""
    layout = Layout("weight-norm", lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 6)), BY_NAME["linear"].inputs)
    model, example = adapted("LORA", layout), layout.example()
    (place,) = adapter_places(model)
    w, b = place.fold(("a",))
    close(model(*example), torch.nn.functional.linear(example[0], w, b))
    assert differs(model(*example), layout.model()(*example))
    with pytest.raises(TypeError, match="computed"):
        place.merge(("a",))
    close(model(*example), torch.nn.functional.linear(example[0], w, b))


def test_an_embedding_that_shortens_its_rows_is_refused() -> None:
    layout = Layout("max-norm", lambda: nn.Embedding(9, 8, max_norm=1.0), BY_NAME["embedding"].inputs)
    with pytest.raises(ValueError, match="max_norm"):
        adapted("LORA", layout)


def test_rows_need_the_batch_in_front() -> None:
    layout = Layout("behind", lambda: nn.MultiheadAttention(8, 2), lambda: (torch.randn(3, 4, 8),), BY_NAME["attention"].call)
    model, example = adapted("LORA", layout), layout.example()
    session = session_of(model)
    assert session is not None
    with session.local(rows=["a", "a", "a"]), pytest.raises(ValueError, match="batch in front"):
        model(*example)


def test_names_and_order_of_activation() -> None:
    layout = BY_NAME["linear"]
    model = adapted("LORA", layout)
    add(model, "IA3", layout, "b")
    session = session_of(model)
    assert session is not None
    assert session.active == ("b",)
    with pytest.raises(ValueError, match="not found"):
        activate(session, ("c",), model)
    with pytest.raises(ValueError, match="already"):
        attach(model, config_of("LORA", layout), "a")
    detach(model, "b")
    with pytest.raises(ValueError, match="not found"):
        detach(model, "b")
