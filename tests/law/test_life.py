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
from .support import BY_NAME, acting, adapted, adapters, add, close, config_of, differs, every_pair, jitter, over


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
