"""Every method on a host that does not keep its weight in floating point, through nothing but the store's five methods."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.core.stores import STORES, Store
from inlay.core.targets import explain_targets

from .cases import SELECTED
from .layouts import Model
from .support import BY_NAME, REFUSED, acting, adapter_places, adapters, close, config_of, differs, jitter


class Rounded(nn.Linear):
    """A linear layer of whole numbers with one scale, which is kept on the tensor as quantisers do."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, dtype=torch.float64)
        self.weight = rounded(torch.randn(outputs, inputs, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, restored(self.weight), self.bias)


def rounded(w: Tensor) -> nn.Parameter:
    scale = w.abs().max() / 127
    q = nn.Parameter((w / scale).round().to(torch.int8), requires_grad=False)
    q.scale = scale  # type: ignore[attr-defined]
    return q


def restored(q: Tensor) -> Tensor:
    return q.double() * q.scale  # type: ignore[attr-defined]


class RoundedStore(Store):
    dense = False

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return torch.float64

    def read_tensor(self, stored: Tensor) -> Tensor:
        return restored(stored)

    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        module._parameters[name] = rounded(weight.detach())


@pytest.fixture
def _known() -> Iterator[None]:
    STORES["Rounded"] = RoundedStore()
    yield
    del STORES["Rounded"]


LINEAR = sorted({case for case, _ in acting("linear")})


@pytest.mark.usefixtures("_known")
@pytest.mark.parametrize("case", LINEAR)
def test_the_law_on_whole_numbers(case: str) -> None:
    torch.manual_seed(1)
    model = Model(Rounded(8, 6))
    x = BY_NAME["linear"].example()[0]
    base = model(x)
    refused = explain_targets(model, config_of(case, BY_NAME["linear"])).refused
    if refused:
        assert "quantised already" in refused["host"]
        return
    attach(model, config_of(case, BY_NAME["linear"]), "a")
    jitter(model, "a")
    model.eval()
    (place,) = adapter_places(model)
    own = place.site.module.weight
    w, b = place.fold(("a",))
    after = model(x)
    close(after, F.linear(x, w, b))
    assert differs(after, base)
    after.square().sum().backward()
    assert all(q.grad is not None for p in adapters(model) for q in p.parameters())

    place.merge(("a",))
    merged = place.site.module.weight
    assert merged.dtype == torch.int8
    close(restored(merged), w, (w.abs().max() / 254).item() * 1.01)
    session = session_of(model)
    assert session is not None
    with session.local(()):
        close(model(x), base)
    place.unmerge()
    assert place.site.module.weight is own
    assert torch.equal(model(x), after)


def test_all_cases_on_linear_layers_are_here() -> None:
    assert set(LINEAR) == {case for case in SELECTED if (case, "linear") not in REFUSED}
