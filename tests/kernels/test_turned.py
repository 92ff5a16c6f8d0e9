"""Kernels of rotations, shards, blocks and passing weights give the numbers and derivatives of their formulas."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from inlay.kernels import blocks, core, lowrank, pairs, passing, turned

IN, OUT, SCALE = 12, 8, 0.7
Run = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path also where the formula would be chosen because the input is small, as it is in all tests."""
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)


def butterfly(i: int, number: int, size: int) -> Tensor:
    """The permutation of factor ``i`` as a matrix, written out: of each group of half blocks the even ones, then the odd ones."""
    taken = []
    for start in range(0, number * size, size * 2**i):
        halves = [list(range(at, at + size // 2)) for at in range(start, start + size * 2**i, size // 2)]
        taken += [place for half in halves[::2] + halves[1::2] for place in half]
    return torch.eye(number * size, dtype=torch.float64)[taken]


def chain(x: Tensor, w: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
    matrix = torch.eye(IN, dtype=x.dtype)
    for i, factor in zip(range(len(factors) - 1, -1, -1), factors, strict=True):
        p = butterfly(i, *factor.shape[:2]) if i else torch.eye(IN, dtype=x.dtype)
        matrix = matrix @ p @ torch.block_diag(*factor) @ p.T
    return F.linear(x @ matrix, w, bias)


def turned_by(x: Tensor, w: Tensor, bias: Tensor, *factors: Tensor) -> Tensor:
    half = factors[0].shape[-1] // 2
    orders = [*((2**i, half) for i in range(len(factors) - 1, 0, -1)), None]
    return turned.linear_turned(x, w, bias, torch.stack(factors), orders)


def turned_and_scaled(x: Tensor, w: Tensor, bias: Tensor, gain: Tensor, *factors: Tensor) -> Tensor:
    half = factors[0].shape[-1] // 2
    orders = [*((2**i, half) for i in range(len(factors) - 1, 0, -1)), None]
    return turned.linear_turned(x, w, bias, torch.stack(factors), orders, gain)


def scaled_chain(x: Tensor, w: Tensor, bias: Tensor, gain: Tensor, *factors: Tensor) -> Tensor:
    return gain * chain(x, w, torch.zeros_like(bias), *factors) + bias


def reflected(x: Tensor, w: Tensor, bias: Tensor, u: Tensor, v: Tensor) -> Tensor:
    return F.linear(x @ (torch.eye(IN, dtype=x.dtype) - v @ u.T), w, bias)


def sharded(x: Tensor, w: Tensor, bias: Tensor, block: Tensor) -> Tensor:
    return F.linear(x, w + SCALE * torch.cat([block] * 3, 1)[:, :IN], bias)


def blockwise(x: Tensor, w: Tensor, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    k, part = len(a), a.shape[-1] // len(a)
    rows = []
    for j in range(k):
        own = [b[j, i * part : (i + 1) * part].T @ a[i, :, j * part : (j + 1) * part].T for i in range(k)]
        rows.append(torch.cat(own, 1))
    return F.linear(x, w + SCALE * torch.cat(rows), bias)


def scaled(w: Tensor, bias: Tensor | None, gain: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
    assert bias is not None
    return w * gain.unsqueeze(1), bias + w @ shift


def paired(y: Tensor, straight: Tensor, across: Tensor) -> Tensor:
    matrix = torch.diag(straight)
    for start in range(0, OUT, 4):
        for u, v in ((start, start + 2), (start + 1, start + 3)):
            matrix = matrix.index_put((torch.tensor([u, v]), torch.tensor([v, u])), torch.stack((-across[u], across[v])))
    return y @ matrix.T


# The kernel, its formula and the shapes of what is trained.
FROZEN = {name: torch.randn(shape, generator=torch.Generator().manual_seed(4), dtype=torch.float64) for name, shape in
          {"a": (3, IN), "b": (OUT, 3)}.items()}  # fmt: skip
KERNELS: dict[str, tuple[Run, Run, list[tuple[int, ...]]]] = {
    "blocks of 3": (turned_by, chain, [(4, 3, 3)]),
    "one block": (turned_by, chain, [(1, 12, 12)]),
    "butterfly": (turned_by, chain, [(6, 2, 2)] * 2),
    "scaled butterfly": (turned_and_scaled, scaled_chain, [(OUT,), *[(6, 2, 2)] * 2]),
    "reflections": (turned.linear_reflected, reflected, [(IN, 3), (IN, 3)]),
    "shards": (lambda x, w, b, e: passing.linear_plus_shards(x, w, b, e, SCALE), sharded, [(OUT, 5)]),
    "blocks of low rank": (lambda x, w, b, p, q: blocks.linear_plus_blocks(x, w, b, p, q, SCALE), blockwise, [(2, 6, 4), (2, 4, 4)]),
    "core": (
        lambda x, w, b, c: core.linear_plus_core(x, None, w, b, FROZEN["a"], c, FROZEN["b"], SCALE),
        lambda x, w, b, c: F.linear(x, w + SCALE * FROZEN["b"] @ c @ FROZEN["a"], b),
        [(3, 3)],
    ),
    "core and B": (
        lambda x, w, b, c, left: core.linear_plus_core(x, None, w, b, FROZEN["a"].to(c.dtype), c, left, SCALE),
        lambda x, w, b, c, left: F.linear(x, w + SCALE * left @ c @ FROZEN["a"], b),
        [(2, 3), (OUT, 2)],
    ),
    "any fold": (
        lambda x, w, b, *q: passing.linear_through(x, w, b, scaled, *q),
        lambda x, w, b, *q: F.linear(x, *scaled(w, b, *q)),
        [(OUT,), (IN,)],
    ),
    "pairs": (
        lambda x, w, b, s, c: pairs.turn_pairs(F.linear(x, w, b), s, c, 4),
        lambda x, w, b, *q: paired(F.linear(x, w, b), *q),
        [(OUT,), (OUT,)],
    ),
}


def tensors(name: str, rows: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    shapes = [(rows, 1, IN), (OUT, IN), (OUT,), *KERNELS[name][2]]
    found = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return (*(q.requires_grad_() if i not in (1, 2) else q for i, q in enumerate(found)),)


@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("name", KERNELS)
def test_output_and_gradients(name: str, rows: int, wide: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not wide:
        monkeypatch.setattr(turned, "WIDE", 1)
        monkeypatch.setattr(turned, "WIDEST", 0)
    run, formula, _ = KERNELS[name]
    given = tensors(name, rows)
    trained = [q for q in given if q.requires_grad]
    y, wanted = run(*given), formula(*given)
    torch.testing.assert_close(y, wanted)
    weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    found, expected = (torch.autograd.grad((out * weight).sum(), trained) for out in (y, wanted))
    for mine, right in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, right)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), wanted)


@pytest.mark.parametrize("name", KERNELS)
def test_derivatives(name: str) -> None:
    run, _, _ = KERNELS[name]
    x, w, bias, *trained = tensors(name, 3)
    assert torch.autograd.gradcheck(lambda x, *q: run(x, w, bias, *q), (x, *trained))
    assert torch.autograd.gradgradcheck(lambda x, *q: run(x, w, bias, *q), (x, *trained))


@pytest.mark.parametrize("name", KERNELS)
def test_only_what_is_asked_for(name: str) -> None:
    """Without a gradient of the input, as in the first layer, those of the parameters are the same."""
    run, _, _ = KERNELS[name]
    x, w, bias, *trained = tensors(name, 5)
    both = torch.autograd.grad(run(x, w, bias, *trained).square().sum(), trained)
    alone = torch.autograd.grad(run(x.detach(), w, bias, *trained).square().sum(), trained)
    for one, other in zip(both, alone, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", [n for n in KERNELS if n not in ("pairs", "any fold")])
def test_a_host_in_half_precision(name: str) -> None:
    """What is computed in single precision is rounded once to the host's."""
    run, formula, _ = KERNELS[name]
    if name == "core":
        frozen = {k: v.float() for k, v in FROZEN.items()}
        run = lambda x, w, b, c: core.linear_plus_core(x, None, w, b, frozen["a"], c, frozen["b"], SCALE)  # noqa: E731
    x, w, bias, *trained = tensors(name, 5)
    x, w, bias = (q.detach().bfloat16() for q in (x, w, bias))
    trained = [q.detach().float().requires_grad_() for q in trained]
    y = run(x, w, bias, *trained)
    wanted = formula(x.double(), w.double(), bias.double(), *(q.double() for q in trained))
    assert y.dtype == torch.bfloat16
    assert (y.double() - wanted).norm() / wanted.norm() < 0.02
    y.float().square().sum().backward()
    assert all(q.grad is not None and q.grad.dtype == torch.float32 for q in trained)


@pytest.mark.parametrize(
    ("name", "most"), [("blocks of 3", 1.3), ("reflections", 1.8), ("shards", 1.0), ("core", 1.0), ("core and B", 1.0), ("pairs", 1.0)]
)
def test_what_is_kept(name: str, most: float) -> None:
    """Beside the frozen weight no more than the input, or what stands for it."""
    run, _, _ = KERNELS[name]
    given = tensors(name, 400)
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() != given[1].untyped_storage().data_ptr():
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run(*given)
    assert sum(kept.values()) < most * 8 * given[0].numel()
