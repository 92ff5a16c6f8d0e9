"""What the tests of the law have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inlay import LoraConfig
from inlay.core.adapter import Adapter
from inlay.core.attach import attach
from inlay.core.inlaid import places, session_of
from inlay.core.method import Method
from inlay.core.place import Place
from inlay.core.session import BASE
from inlay.core.targets import explain_targets

from .cases import CASES, METHOD_CASES, SELECTED
from .layouts import LAYOUTS, Layout

BY_NAME = {layout.name: layout for layout in LAYOUTS}


def config_of(case: str, layout: Layout, **more: Any) -> Method:
    cls, options = CASES[case]
    return cls(**{**layout.targets, **options, **more})


def refusal(case: str, layout: Layout) -> str | None:
    """The mathematical reason why a method does not act on a layout."""
    return next(iter(explain_targets(layout.model(), config_of(case, layout)).refused.values()), None)


ALL_PAIRS = [(case, layout) for case in SELECTED for layout in LAYOUTS]
REFUSED = {(case, layout.name): reason for case, layout in ALL_PAIRS if (reason := refusal(case, layout)) is not None}
PAIRS = [(case, layout) for case, layout in ALL_PAIRS if (case, layout.name) not in REFUSED]


# One layout of each kind. Further sets of options run on these by `make test`, and on all by `make test-all`.
KINDS = ("linear", "conv2d-groups", "embedding", "layer-norm", "experts")


def each(pair: tuple[str, Layout]) -> Any:
    """A pair as a parameter of a test."""
    case, layout = pair
    further = case not in METHOD_CASES and layout.name not in KINDS
    return pytest.param(case, layout, id=f"{case}/{layout.name}", marks=[pytest.mark.slow] if further else [])


def acting(*layouts: str, once: bool = False) -> list[tuple[str, Layout]]:
    """The pairs on these layouts (on all, if none is named); ``once`` takes one set of options a method."""
    return [(c, x) for c, x in PAIRS if (not layouts or x.name in layouts) and (not once or c in METHOD_CASES)]


def over(pairs: Sequence[tuple[str, Layout]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("case", "layout"), [each(pair) for pair in pairs])


every_pair = over(PAIRS)


def adapters(model: nn.Module, name: str | None = None) -> Iterator[Adapter]:
    for place in places(model):
        for key, p in place.adapters.items():
            if name in (None, key):
                assert isinstance(p, Adapter)
                yield p


def adapted(case: str, layout: Layout, dtype: torch.dtype = torch.float64, name: str = "a", **more: Any) -> nn.Module:
    """A model with an adapter whose parameters are no longer where they start."""
    model = layout.model(dtype)
    add(model, case, layout, name, **more)
    return model.eval()


def add(model: nn.Module, case: str, layout: Layout, name: str, **more: Any) -> None:
    attach(model, config_of(case, layout, **more), name)
    jitter(model, name)
    model.eval()


def jitter(model: nn.Module, name: str, by: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    for p in adapters(model, name):
        for q in p.parameters():
            q.data += by * torch.randn(q.shape, generator=generator).to(q)


ROWS = ["b", BASE, "a", "b"]


def of_each_row(model: nn.Module, x: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """With two LoRAs on the host: what each of them, and the base, gives for a batch alone, and what its rows get by `ROWS`."""
    for name in "ab":
        attach(model, LoraConfig(target_modules=["host"], r=4, seed=ord(name)), name)
        jitter(model, name)
    session = session_of(model.eval())
    assert session is not None
    alone = {}
    for name in ("a", "b", BASE):
        with session.local(() if name == BASE else (name,)):
            alone[name] = model(x)
    with session.local(rows=ROWS):
        return alone, model(x)


def adapter_places(model: nn.Module) -> list[Place]:
    return [p for p in places(model) if isinstance(p, Place)]


def folded_tensors(model: nn.Module, *names: str) -> dict[str, Tensor]:
    """Every weight and bias that adapters touch, as `fold` has them, under their names in the base model."""
    found = {}
    for place in adapter_places(model):
        w, b = place.fold(names)
        found[f"{place.path}.{place.site.name}"] = place.site.raw(w)
        if b is not None and place.site.bias_name is not None:
            found[f"{place.path}.{place.site.bias_name}"] = b
    return found


def by_fold(model: nn.Module, layout: Layout, example: Sequence[Tensor], *names: str) -> Tensor:
    """What the bare model gives when its weights are those of `fold`."""
    plain = layout.model(example[0].dtype if example[0].is_floating_point() else torch.float64)
    return torch.func.functional_call(plain, folded_tensors(model, *names), tuple(example), tie_weights=False)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def differs(one: Tensor, other: Tensor) -> bool:
    return not torch.allclose(one, other, rtol=1e-6, atol=1e-6)
