"""Triton's kernels for several adapters on one batch; without a GPU by Triton's interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.kernels import mixed, segmented_triton
from inlay.kernels.mixed import add_segments
from inlay.kernels.segmented_triton import COLUMNS, MOST_RANK, add, disjoint, fits

from .segments import CASES, TOLERANCE, expected, factors_for

WHERE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def by_triton(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Segments go by Triton here, and each use is counted."""
    uses: list[int] = []
    kernel = segmented_triton.add
    monkeypatch.setattr(mixed, "by_triton", fits)
    monkeypatch.setattr(segmented_triton, "add", lambda *args: uses.append(1) or kernel(*args))
    return uses


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("times", [1, 20])
@pytest.mark.parametrize(("ranks", "rows"), CASES)
def test_as_a_product_for_each(ranks: tuple[int, ...], rows: Any, times: int, dtype: torch.dtype) -> None:
    """Factors of a base in half precision are in single precision."""
    factors = factors_for(ranks, torch.float32 if dtype == torch.bfloat16 else dtype)
    count = 1 + max(r for mine in rows for r in mine)
    x, y = (torch.randn(count * times, n, dtype=torch.float64).to(dtype) for n in (7, 70))
    flat = [t.to(WHERE) for a, b, _ in factors for t in (a, b)]
    found = add(y.clone().to(WHERE), x.to(WHERE), rows, times, [s for *_, s in factors], flat).cpu()
    torch.testing.assert_close(found, expected(y, x, rows, times, factors), **TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("ranks", "rows"), CASES)
def test_gradients_are_those_of_the_segments(
    ranks: tuple[int, ...], rows: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors, count = factors_for(ranks, dtype, inp=COLUMNS + 3, out=9), 1 + max(r for mine in rows for r in mine)
    x, y, g = (torch.randn(count * 3, n, dtype=dtype, device=WHERE) for n in (COLUMNS + 3, 9, 9))

    def gradients() -> list[Tensor]:
        inputs = [t.clone().to(WHERE).requires_grad_() for t in (y, x, *(t for a, b, _ in factors for t in (a, b)))]
        update = list(zip(inputs[2::2], inputs[3::2], [s for *_, s in factors], strict=True))
        found = add_segments(inputs[0].clone(), inputs[1], rows, 3, update)
        return list(torch.autograd.grad((found * g).sum(), inputs))

    monkeypatch.setattr(mixed, "by_triton", lambda *_: False)
    wanted = gradients()
    monkeypatch.setattr(mixed, "by_triton", fits)
    for one, other in zip(gradients(), wanted, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE[dtype])


def test_only_what_is_asked_for_is_made(by_triton: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """A frozen B asks for no gradient, and an input that came from data neither."""
    (a, b, scale), *_ = factors_for((4,), torch.float32)
    a, x = a.to(WHERE).requires_grad_(), torch.randn(2, 7, device=WHERE)
    found = add_segments(torch.zeros(2, 70, device=WHERE), x, ((0, 1),), 1, [(a, b.to(WHERE), scale)])
    made, outer = [], segmented_triton._Group.outer
    monkeypatch.setattr(segmented_triton._Group, "outer", lambda *args: made.append(args[-1]) or outer(*args))
    found.sum().backward()
    assert (len(by_triton), made) == (1, [False])
    torch.testing.assert_close(a.grad, scale * b.sum(0).unsqueeze(1).to(WHERE) * x.sum(0))


def test_what_the_kernels_leave_to_torch() -> None:
    a, b, _ = factors_for((4,), torch.float32)[0]
    x = torch.randn(2, 7)
    assert fits(x, [a, b])
    assert not fits(x, [a, b.double()])
    assert not fits(x, [a, b.T.contiguous().T])
    assert not fits(x, [torch.zeros(MOST_RANK + 1, 300), torch.zeros(300, MOST_RANK + 1)])
    assert disjoint(((0, 1), (1, 2), (2,), ())) == [[0, 2, 3], [1]]


@pytest.mark.parametrize("training", [False, True])
def test_a_model_by_rows(by_triton: list[int], training: bool) -> None:
    torch.manual_seed(0)
    host = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3)).to(WHERE)
    options = {"target_modules": ["0", "2"], "init_lora_weights": False}
    model: Any = inlay.get_peft_model(host, inlay.LoraConfig(r=2, seed=1, **options), "a")
    model.add_adapter("b", inlay.LoraConfig(r=5, seed=2, **options))
    model.set_adapter(["a", "b"])
    x, rows = torch.randn(5, 4, 6, device=WHERE), ["a", "b", "__base__", "b", ("a", "b")]
    with torch.set_grad_enabled(training):
        together = model(x, adapter_names=rows)
        assert len(by_triton) == 2
        for i, row in enumerate(rows):
            with model.use_adapters(*(() if row == "__base__" else (row,) if isinstance(row, str) else row)):
                torch.testing.assert_close(together[i], model(x[i : i + 1])[0], rtol=1e-5, atol=1e-5)
    if training:
        mine = [q for q in model.parameters() if q.requires_grad]
        found = torch.autograd.grad(together.square().sum(), mine)
        alone = [torch.zeros_like(q) for q in mine]
        for i, row in enumerate(rows):
            with model.use_adapters(*(() if row == "__base__" else (row,) if isinstance(row, str) else row)):
                loss = model(x[i : i + 1]).square().sum()
            for total, g in zip(alone, torch.autograd.grad(loss, mine, allow_unused=True) if loss.requires_grad else [], strict=False):
                total += 0 if g is None else g
        for one, other in zip(found, alone, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
