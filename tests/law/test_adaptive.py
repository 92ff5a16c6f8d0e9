"""What the law cannot know of AdaLoRA, LN tuning, BEFT and OSF."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.inlaid import adapters_of


class Model(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(4)
        super().__init__(nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6))


def trained(config: Any, steps: int, by: type[torch.optim.Optimizer] = torch.optim.AdamW) -> Any:
    model = inlay.get_peft_model(Model(), config).train()
    optimizer = by([q for q in model.parameters() if q.requires_grad], lr=0.05)  # type: ignore[call-arg]
    x = torch.randn(16, 6, generator=torch.Generator().manual_seed(5))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - x.flip(-1)).square().mean().backward()
        optimizer.step()
    return model


def adalora(**more: Any) -> inlay.AdaLoraConfig:
    return inlay.AdaLoraConfig(**{"target_modules": ["0", "2"], "init_r": 4, "target_r": 1, "total_step": 10, **more})


def ranks(model: Any) -> list[int]:
    return [int((p.lora_E != 0).sum()) for p in adapters_of(model.get_base_model(), "default")]


@pytest.mark.parametrize("by", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_any_optimiser_spends_the_budget(by: type[torch.optim.Optimizer]) -> None:
    model = trained(adalora(tinit=2, tfinal=3), 10, by)
    assert sum(ranks(model)) == 2
    assert [sum(m) for m in model.peft_config["default"].rank_pattern.values()] == ranks(model)


# Of eight triplets at the start and two in the end: 2 + 6 (1 - t)^3, rounded down, at t = 1/5, ..., 5/5.
@pytest.mark.parametrize(("step", "expected"), [(3, 5), (4, 3), (5, 2), (6, 2), (7, 2)])
def test_the_budget_falls_as_a_cube(step: int, expected: int) -> None:
    model = trained(adalora(tinit=2, tfinal=3), 0)
    assert model.peft_config["default"].budget(step, adapters_of(model.get_base_model(), "default")) == expected


def test_the_first_ranks_stay_for_tinit_steps() -> None:
    assert trained(adalora(tinit=5), 5).peft_config["default"].rank_pattern is None
    assert sum(trained(adalora(tinit=5), 6).peft_config["default"].rank_pattern["0.lora_E"]) <= 4


def test_the_least_important_triplet_goes_first() -> None:
    """By hand: importance is |q dL/dq| of the value and the mean of its vectors, times how much that varies."""
    model = inlay.get_peft_model(Model(), adalora(target_modules=["0"], init_r=3, target_r=2, total_step=2))
    (p,) = adapters_of(model.get_base_model(), "default")
    for q, value in ((p.lora_A, 1.0), (p.lora_E, 2.0), (p.lora_B, 3.0)):
        q.data.fill_(value)
        q.grad = torch.ones_like(q)
    p.lora_E.grad[1] = 0.1
    p.lora_B.grad[:, 2] = 0.9
    model.base_model.update_and_allocate(2)
    assert p.lora_E.flatten().tolist() == [2, 2, 2], "nothing is known before the last step"
    model.base_model.update_and_allocate(1)
    model.base_model.update_and_allocate(2)
    # The mean is 0.15 of what the first step shows and its spread 0.15 * 0.85 of it; the scores are their products.
    assert p.lora_E.flatten().tolist() == [2, 0, 2]
    assert model.peft_config["default"].rank_pattern == {"0.lora_E": [True, False, True]}


def test_the_orthogonality_term() -> None:
    model = inlay.get_peft_model(Model(), adalora(target_modules=["0"], orth_reg_weight=0.7))
    (p,) = adapters_of(model.get_base_model(), "default")
    config = model.peft_config["default"]
    a, b, one = p.lora_A, p.lora_B, torch.eye(4)
    expected = 0.7 / 2 * ((a @ a.T - one).norm() + (b.T @ b - one).norm())
    torch.testing.assert_close(config.penalty([p]), expected)
    assert adalora(orth_reg_weight=0.0).penalty([p]) is None


def test_a_copied_model_goes_on_with_its_own_budget() -> None:
    model = trained(adalora(), 4)
    twin = copy.deepcopy(model)
    before = ranks(model)
    layers = adapters_of(twin.get_base_model(), "default")
    for p in layers:
        p.lora_E.data.fill_(0)
    assert ranks(model) == before
    assert layers[0].method.mask == adapters_of(model.get_base_model(), "default")[0].method.mask


@pytest.mark.parametrize("more", [6, 9])
def test_values_from_another_time_of_the_training(tmp_path: Path, more: int) -> None:
    """A training that was resumed, or returns to its best step, has another budget than the file."""
    early, x = trained(adalora(), 4), torch.randn(5, 6, generator=torch.Generator().manual_seed(6))
    early.save_pretrained(tmp_path)
    for live in (trained(adalora(), more), trained(adalora(), 0)):
        live.load_adapter(tmp_path, "default")
        torch.testing.assert_close(live.eval()(x), early.eval()(x))
        assert ranks(live) == ranks(early)
        assert live.peft_config["default"].rank_pattern == early.peft_config["default"].rank_pattern


def test_values_that_do_not_fit_leave_the_budget_as_it_was(tmp_path: Path) -> None:
    model, x = trained(adalora(), 6), torch.randn(5, 6)
    before, pattern = model.eval()(x), model.peft_config["default"].rank_pattern
    trained(adalora(init_r=3), 4).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="init_r=3, this adapter 4"):
        model.load_adapter(tmp_path, "default")
    assert torch.equal(model(x), before)
    assert model.peft_config["default"].rank_pattern == pattern


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"total_step": None}, "set `total_step`"),
        ({"total_step": 0}, "set `total_step`"),
        ({"tinit": 5, "tfinal": 5}, "leave no step of total_step=10"),
        ({"orth_reg_weight": -1.0}, "orth_reg_weight"),
        ({"beta1": 1.0}, "`beta1` lies between 0 and 1"),
        ({"loftq_config": {"loftq_bits": 4}}, "loftq_config"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        adalora(**options)
    with pytest.warns(UserWarning, match="does not read `r`"):
        adalora(r=4)


# ---- LN tuning, BEFT, OSF ---------------------------------------------------------------------------------------------------
def test_ln_tuning_trains_the_norm_itself() -> None:
    model = trained(inlay.LNTuningConfig(target_modules=["1"]), 5)
    assert sum(q.numel() for q in model.parameters() if q.requires_grad) == 16
    x = torch.randn(3, 6)
    after = model(x)
    assert not torch.allclose(after, Model()(x), atol=1e-3)
    torch.testing.assert_close(model.merge_and_unload()(x), after)
    with pytest.raises(ValueError, match="retrains the biases"):
        inlay.LNTuningConfig(bias="all")


def test_beft_merges_where_there_was_no_bias() -> None:
    base = nn.Sequential(nn.Linear(6, 4, bias=False))
    model = inlay.get_peft_model(copy.deepcopy(base), inlay.BeftConfig(target_modules=["0"], init_weights=False))
    x = torch.randn(3, 6)
    (p,) = adapters_of(model.get_base_model(), "default")
    torch.testing.assert_close(model(x), base(x) + p.beft_bias)
    merged = model.merge_and_unload()
    torch.testing.assert_close(merged[0].bias, p.beft_bias)
    with pytest.raises(ValueError, match="no bias that could be changed"):
        inlay.get_peft_model(nn.Sequential(nn.RMSNorm(6)), inlay.BeftConfig(target_modules=["0"]))


@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (7, 7)])
@pytest.mark.parametrize("kept", [2, 4])
def test_osf_steps_stay_orthogonal_to_what_is_kept(shape: tuple[int, int], kept: int) -> None:
    out, inner = shape
    base = nn.Sequential(nn.Linear(inner, out))
    model = inlay.get_peft_model(base, inlay.OSFConfig(target_modules=["0"], effective_rank=kept))
    u, s, v = torch.linalg.svd(base[0].weight, full_matrices=False)
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=0.1)
    x, y = torch.randn(16, inner), torch.randn(16, out)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    (p,) = adapters_of(base, "default")
    assert not torch.allclose(p.osf_U_low, u[:, kept:], atol=1e-4)
    for near, high in ((p.osf_U_low.T, u[:, :kept]), (p.osf_V_low, v[:kept].T)):
        torch.testing.assert_close(near @ high, torch.zeros(len(near), kept), rtol=0, atol=1e-5)
    new = u[:, :kept] * s[:kept] @ v[:kept] + p.osf_U_low * p.osf_S_low @ p.osf_V_low
    torch.testing.assert_close(model(x), x @ new.T + base[0].bias)


@pytest.mark.parametrize(
    ("rank", "says"), [(0, "positive"), (-0.5, "positive"), (6, "keeps all of its 6"), (1.0, "keeps all of its 6"), (0.1, "keeps none of")]
)
def test_osf_ranks_that_split_nothing(rank: float, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        inlay.get_peft_model(nn.Sequential(nn.Linear(6, 8)), inlay.OSFConfig(target_modules=["0"], effective_rank=rank))


def test_the_projection_leaves_values_and_takes_half_of_the_gradient() -> None:
    from inlay.kernels.projected import within

    basis = torch.linalg.qr(torch.randn(2, 5, 3))[0]
    t, g = torch.randn(2, 5, 4, requires_grad=True), torch.randn(2, 5, 4)

    def taken(complement: bool) -> Tensor:
        held = within(t, basis, complement)
        assert torch.equal(held, t)
        return torch.autograd.grad(held, t, g)[0]

    torch.testing.assert_close(taken(False) + taken(True), g)
    torch.testing.assert_close(basis.mT @ taken(True), torch.zeros(2, 3, 4), rtol=0, atol=1e-6)
    torch.testing.assert_close(taken(False), basis @ (basis.mT @ g))
