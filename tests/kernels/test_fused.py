"""Fused layers give the numbers of their formulas, in every situation that a layer meets."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from inlay.kernels import decomposed, lowrank
from inlay.kernels.decomposed import linear_decomposed, row_squares
from inlay.kernels.dropout import draw_bits, factors
from inlay.kernels.gained import linear_plus_gained
from inlay.kernels.lowrank import linear_plus_low_rank

from .cases import KERNELS, SCALE, SHAPES, Kernel, gradients, low_rank_formula, tensors


@pytest.fixture(params=KERNELS)
def kernel(request: pytest.FixtureRequest) -> Kernel:
    return KERNELS[request.param]


@pytest.fixture(autouse=True)
def however_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fused path also where the formula would be chosen because the input is small, as it is in all tests."""
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)


def assert_same(kernel: Kernel, given: list[Tensor | None], **tolerance: float) -> None:
    y, found = gradients(kernel.run, given)
    wanted_y, wanted = gradients(kernel.formula, given)
    assert y.dtype == wanted_y.dtype
    torch.testing.assert_close(y, wanted_y, **tolerance)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, right, **tolerance)


# ---- numbers --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_output_and_gradients(kernel: Kernel, shape: tuple[int, ...], bias: bool) -> None:
    assert_same(kernel, tensors(kernel, shape, bias))


@pytest.mark.parametrize("r", [1, 7, 11])
@pytest.mark.parametrize("rows", [4, 50])
def test_any_rank(kernel: Kernel, r: int, rows: int) -> None:
    assert_same(kernel, tensors(kernel, (rows,), r=r))


@pytest.mark.parametrize("rows", [3, 40])
def test_single_precision(kernel: Kernel, rows: int) -> None:
    assert_same(kernel, tensors(kernel, (rows,), dtype=torch.float32), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rows", [3, 40])
def test_first_and_second_derivatives(kernel: Kernel, rows: int) -> None:
    x, w, bias, *trained = tensors(kernel, (rows,))
    assert torch.autograd.gradcheck(lambda x, *q: kernel.run(x, w, bias, *q), (x, *trained))
    assert torch.autograd.gradgradcheck(lambda x, *q: kernel.run(x, w, bias, *q), (x, *trained))


def test_derivatives_through_dropout() -> None:
    x, w, bias, a, b = tensors(KERNELS["low rank"], (4,))

    def run(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear_plus_low_rank(x, w, bias, a, b, SCALE, 0.4)

    assert torch.autograd.gradcheck(run, (x, a, b))
    assert torch.autograd.gradgradcheck(run, (x, a, b))


@pytest.mark.parametrize("rate", [0.0, 0.4])
@pytest.mark.parametrize("rows", [4, 40])
def test_derivatives_behind_a_frozen_factor(rows: int, rate: float) -> None:
    """The input is not kept, and differentiated twice all the same."""
    x, w, bias, a, b = tensors(KERNELS["low rank"], (rows,))

    def run(x: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return linear_plus_low_rank(x, w, bias, a.detach(), b, SCALE, rate)

    assert torch.autograd.gradcheck(run, (x, b))
    assert torch.autograd.gradgradcheck(run, (x, b), fast_mode=True)


@pytest.mark.parametrize("retain", [True, False])
def test_two_layers_of_one_input_go_backward_apart(retain: bool) -> None:
    x, w, bias, a, b = tensors(KERNELS["low rank"], (4,))
    hidden = x.sin()
    outs = [linear_plus_gained(hidden, w, bias, a.detach(), b.detach(), b[0], b[:, 0], SCALE, 0.0) for _ in range(2)]
    first, second = (torch.autograd.grad(y.sum(), hidden, retain_graph=retain)[0] for y in outs)
    torch.testing.assert_close(first, second)


def dropped_from_bits(bits: Tensor, rate: float, x: Tensor) -> Tensor:
    return factors(bits, rate, tuple(x.shape), x.dtype) * x


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(3,), (40,), (2, 3)])
def test_decomposed_with_dropout(shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers and gradients are those of the formula on the same mask, first and second ones."""
    x, w, bias_, a, b, gain = tensors(KERNELS["decomposed"], shape, bias)
    assert not any(t is None for t in (x, w))
    bits = draw_bits(x, 0.4)
    monkeypatch.setattr(decomposed, "draw_bits", lambda x, rate: bits)

    def run(x: Tensor, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
        return linear_decomposed(x, w, bias_, a, b, gain, SCALE, 0.4)

    def formula(x: Tensor, a: Tensor, b: Tensor, gain: Tensor) -> Tensor:
        dropped = dropped_from_bits(bits, 0.4, x)
        return F.linear(x, w, bias_) + (gain - 1) * F.linear(dropped, w) + gain * SCALE * F.linear(F.linear(dropped, a), b)

    given = (x, a, b, gain)
    y, wanted = run(*given), formula(*given)
    torch.testing.assert_close(y, wanted)
    with torch.no_grad():
        torch.testing.assert_close(run(*given), wanted)
    g = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
    for mine, right in zip(torch.autograd.grad(y, given, g), torch.autograd.grad(wanted, given, g), strict=True):
        torch.testing.assert_close(mine, right)
    if shape == (3,):
        assert torch.autograd.gradgradcheck(run, given)


@pytest.mark.parametrize("rows", [3, 400])
def test_decomposed_with_dropout_in_half_precision(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, bias, *trained = tensors(KERNELS["decomposed"], (rows,), dtype=torch.float32)
    assert not any(t is None for t in (x, w, bias))
    bits = draw_bits(x, 0.4)
    monkeypatch.setattr(decomposed, "draw_bits", lambda x, rate: bits)
    half = [t.detach().bfloat16() for t in (x, w, bias)]
    y = linear_decomposed(half[0].requires_grad_(), *half[1:], *trained, SCALE, 0.4)
    exact = linear_decomposed(*(t.detach().float() for t in half), *trained, SCALE, 0.4)
    assert y.dtype == torch.bfloat16
    assert (y.float() - exact).norm() / exact.norm() < 0.02
    y.float().square().sum().backward()
    assert all(q is not None and q.grad is not None and q.grad.dtype == torch.float32 for q in trained)


def test_dropout_leaves_the_base_alone() -> None:
    x, w, bias, a, b = tensors(KERNELS["low rank"], (500,))
    several = torch.stack([linear_plus_low_rank(x, w, bias, a, b, SCALE, 0.5).detach() for _ in range(600)])
    assert not torch.equal(several[0], several[1])
    error = (several.mean(0) - low_rank_formula(x, w, bias, a, b)).abs().mean()
    assert error < 3 * several.std(0).mean() / 600**0.5


def test_inputs_that_are_not_contiguous(kernel: Kernel) -> None:
    x, *rest = tensors(kernel, (5, 4))
    turned = torch.randn(4, 7, 5, dtype=torch.float64).permute(2, 0, 1).requires_grad_()
    assert_same(kernel, [turned, *rest])
    y, found = gradients(kernel.run, [x, *rest], torch.ones((), dtype=torch.float64).expand(5, 4, 6))
    wanted_y, wanted = gradients(kernel.formula, [x, *rest], torch.ones(5, 4, 6, dtype=torch.float64))
    torch.testing.assert_close([y, *found], [wanted_y, *wanted])


@pytest.mark.parametrize("rows", [3, 40])
def test_frozen_parts(kernel: Kernel, rows: int) -> None:
    trained = [i for i, t in enumerate(tensors(kernel, (rows,))) if t is not None and t.requires_grad]
    assert len(trained) >= 3
    for frozen in trained:
        given = tensors(kernel, (rows,))
        given[frozen].requires_grad_(False)  # type: ignore[union-attr]
        assert_same(kernel, given)


def test_only_the_input_requires_gradients(kernel: Kernel) -> None:
    x, w, bias, *trained = tensors(kernel, (4,))
    assert_same(kernel, [x, w, bias, *(t.detach() for t in trained)])


def test_without_gradients(kernel: Kernel) -> None:
    for shape in SHAPES.values():
        given = tensors(kernel, shape)
        with torch.no_grad():
            torch.testing.assert_close(kernel.run(*given), kernel.formula(*given))


@pytest.mark.parametrize("rows", [3, 40])
def test_writing_to_the_output(kernel: Kernel, rows: int) -> None:
    given = tensors(kernel, (rows, 2))
    y, found = gradients(lambda *q: kernel.run(*q).relu_(), given)
    wanted_y, wanted = gradients(lambda *q: kernel.formula(*q).relu(), given)
    torch.testing.assert_close([y, *found], [wanted_y, *wanted])


@pytest.mark.parametrize("rows", [3, 40])
def test_a_gain_of_zero(rows: int) -> None:
    *given, gain = tensors(KERNELS["decomposed"], (rows,))
    assert_same(KERNELS["decomposed"], [*given, (gain.detach() * torch.arange(6)).requires_grad_()])


def test_a_trained_base(kernel: Kernel) -> None:
    given = tensors(kernel, (4,))
    given[1].requires_grad_()  # type: ignore[union-attr]
    given[2].requires_grad_()  # type: ignore[union-attr]
    assert_same(kernel, given)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_few_rows(kernel: Kernel, shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", 1000)
    given = tensors(kernel, shape)
    assert_same(kernel, given)
    assert "Backward" not in kernel.run(*given).grad_fn.name().removesuffix("Backward0")


# ---- precision ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rows", [3, 40])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_base(kernel: Kernel, half: torch.dtype, rows: int) -> None:
    """Adapters of single precision over a base of half: the update is exact, and rounded with the sum."""
    x, w, _, *trained = tensors(kernel, (rows,), dtype=torch.float32)
    given = [x.detach().to(half).requires_grad_(), w.to(half), None, *trained]
    y, found = gradients(kernel.run, given)
    assert y.dtype == half
    exact, wanted = gradients(kernel.formula, [given[0].detach().float().requires_grad_(), w.to(half).float(), None, *trained])
    step = torch.finfo(half).eps
    torch.testing.assert_close(y.float(), exact, rtol=2 * step, atol=4 * step)
    for mine, right in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine.float(), right, rtol=4 * step, atol=16 * step)
    assert [t.dtype for t in found] == [half, *(torch.float32 for _ in trained)]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("adapter", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gained", [False, True])
def test_a_small_update_survives_half_precision(adapter: torch.dtype, autocast: bool, gained: bool) -> None:
    """It would be lost in the weight's rounding, but is not in the output's."""
    x, w = torch.ones(64, 8, dtype=torch.bfloat16), torch.ones(4, 8, dtype=torch.bfloat16)
    w[:, ::2] = -1
    a, b = torch.full((1, 8), 1e-3, dtype=adapter, requires_grad=True), torch.full((4, 1), 1e-3, dtype=adapter)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = linear_decomposed(x, w, None, a, b, torch.ones(4), 1.0) if gained else linear_plus_low_rank(x, w, None, a, b, 1.0, 0.0)
    torch.testing.assert_close(y.float(), torch.full((64, 4), 8e-6), rtol=2e-2, atol=0)


@pytest.mark.parametrize("few_rows", [-1, 1000])
@pytest.mark.parametrize("rows", [3, 40])
def test_autocast(kernel: Kernel, rows: int, few_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", few_rows)
    given = tensors(kernel, (rows,), dtype=torch.float32)

    def cast(run):
        def inside(*q: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return run(*q)

        return inside

    y, found = gradients(cast(kernel.run), given)
    wanted_y, wanted = gradients(kernel.formula, given)
    assert y.dtype == torch.bfloat16
    assert all(t.dtype == torch.float32 for t in found)
    for mine, right in zip([y.float(), *found], [wanted_y, *wanted], strict=True):
        assert (mine - right).norm() < 0.03 * right.norm()


# ---- what is saved --------------------------------------------------------------------------------------------------------
def saved(run, *inputs: Tensor | None) -> int:
    """Bytes kept for the backward pass beside the inputs' own."""
    own = {t.untyped_storage().data_ptr() for t in inputs if t is not None}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(t: Tensor) -> Tensor:
        if t.untyped_storage().data_ptr() not in own:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = run(*inputs)
    kept.pop(y.untyped_storage().data_ptr(), None)
    return sum(s.nbytes() for s in kept.values())


def test_bytes_saved_by_low_rank() -> None:
    n, r = 3, 3
    given = tensors(KERNELS["low rank"], (n,), dtype=torch.float32)
    assert saved(KERNELS["low rank"].run, *given) == 4 * n * r
    many = tensors(KERNELS["low rank"], (40,), dtype=torch.float32)
    assert saved(KERNELS["low rank"].run, *many) == 0


def test_bytes_saved_by_dropout() -> None:
    n, r, inp = 16, 3, 7
    given = tensors(KERNELS["low rank"], (n,), dtype=torch.float32)
    assert saved(lambda *q: linear_plus_low_rank(*q, SCALE, 0.1), *given) == 4 * n * r + n * inp // 8


def test_decomposed_saves_its_output_and_no_copy() -> None:
    for rows in (3, 40):
        given = tensors(KERNELS["decomposed"], (rows,), dtype=torch.float32)
        assert saved(KERNELS["decomposed"].run, *given) == 0


def test_frozen_down_projection_frees_the_input() -> None:
    for rows in (3, 40):
        x, w, bias, a, b = tensors(KERNELS["low rank"], (rows,), dtype=torch.float32)
        a.requires_grad_(False)
        y = linear_plus_low_rank(x, w, bias, a, b, SCALE, 0.0)
        assert all(t is None or t.data_ptr() != x.data_ptr() for t in y.grad_fn.saved_tensors)


# ---- how it is run --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_draws_the_same_mask(reentrant: bool) -> None:
    x, w, bias, a, b = tensors(KERNELS["low rank"], (5,))

    def block(x: Tensor) -> Tensor:
        return linear_plus_low_rank(x, w, bias, a, b, SCALE, 0.5).sin()

    found = []
    for run in (block, lambda x: checkpoint(block, x, use_reentrant=reentrant)):
        torch.manual_seed(3)
        y = run(x)
        y.backward(torch.ones_like(y))
        found.append([y.detach(), *(t.grad for t in (x, a, b))])
        for t in (x, a, b):
            t.grad = None
    torch.testing.assert_close(*found, rtol=0, atol=0)


def test_checkpointing_recomputes_what_was_written_to() -> None:
    kernel = KERNELS["decomposed"]
    given = tensors(kernel, (5,))
    y, found = gradients(lambda *q: checkpoint(lambda *q: kernel.run(*q).relu_().sin(), *q, use_reentrant=False), given)
    wanted_y, wanted = gradients(lambda *q: kernel.formula(*q).relu().sin(), given)
    torch.testing.assert_close([y, *found], [wanted_y, *wanted])


def test_function_transforms(kernel: Kernel) -> None:
    x, w, bias, *trained = tensors(kernel, (5,))
    trained = [t.detach() for t in trained]
    per_sample = vmap(grad(lambda a, row: kernel.run(row, w, bias, a, *trained[1:]).sin().sum()), (None, 0))(trained[0], x.detach())
    wanted = vmap(grad(lambda a, row: kernel.formula(row, w, bias, a, *trained[1:]).sin().sum()), (None, 0))(trained[0], x.detach())
    torch.testing.assert_close(per_sample, wanted)


def test_forward_derivatives(kernel: Kernel) -> None:
    x, *rest = tensors(kernel, (5,))
    tangent = torch.randn_like(x)
    found, wanted = (torch.func.jvp(lambda x, run=run: run(x, *rest), (x,), (tangent,))[1] for run in (kernel.run, kernel.formula))
    torch.testing.assert_close(found, wanted)


def test_compiled_without_a_break(kernel: Kernel) -> None:
    given = tensors(kernel, (5,))
    torch._dynamo.reset()
    y, found = gradients(torch.compile(kernel.run, fullgraph=True, backend="aot_eager"), given)
    wanted_y, wanted = gradients(kernel.formula, given)
    torch.testing.assert_close([y, *found], [wanted_y, *wanted])


def test_graph_is_freed_and_backward_twice_is_refused(kernel: Kernel) -> None:
    y = kernel.run(*tensors(kernel))
    y.sum().backward(retain_graph=True)
    y.sum().backward()
    with pytest.raises(RuntimeError, match="second time"):
        y.sum().backward()


# ---- |W|^2 ----------------------------------------------------------------------------------------------------------------
def test_squares_follow_the_weight() -> None:
    w = torch.nn.Parameter(torch.randn(4, 5), requires_grad=False)
    first = row_squares(w)
    assert row_squares(w) is first
    torch.testing.assert_close(first, w.square().sum(-1))
    with torch.no_grad():
        w.mul_(2)
    torch.testing.assert_close(row_squares(w), 4 * first)
    w.data = torch.ones(4, 5)
    torch.testing.assert_close(row_squares(w), torch.full((4,), 5.0))
    w.data = w.data.bfloat16()
    assert row_squares(w).dtype == torch.float32
    linear = torch.nn.Linear(5, 4)
    assert row_squares(linear.weight) is not row_squares(linear.weight)
    functional_call(linear, {"weight": w.float()}, torch.ones(5))
