"""Variants of LoRA: their formulas, what they keep for the backward pass, and which options exclude each other."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.adapter import Adapter
from inlay.core.inlaid import adapters_of
from inlay.operations.replicate import replicate

ALL: dict[str, dict[str, Any]] = {
    "use_dora": {"use_dora": True},
    "use_qalora": {"use_qalora": True, "qalora_group_size": 2},
    "use_bdlora": {"use_bdlora": {"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2}},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "velora_config": {"velora_config": {"num_groups": 3}},
    "kasa_config": {"kasa_config": {}},
    "monteclora_config": {"monteclora_config": {}},
    "arrow_config": {"arrow_config": {}},
}
TOGETHER = {frozenset({"use_dora", "use_qalora"}), frozenset({"use_dora", "use_bdlora"})}


def model(**options: Any) -> tuple[inlay.PeftModel, list[Adapter]]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 4)).double()
    adapted = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0", "2"], **options))
    adapters = adapters_of(base, "default")
    for q in adapted.parameters():
        if q.requires_grad:
            q.data = torch.randn(q.shape, dtype=q.dtype) / 2
    return adapted.eval(), adapters


def x() -> Tensor:
    return torch.randn(3, 5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


# ---- options --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("one", ALL)
@pytest.mark.parametrize("other", ALL)
def test_variants_exclude_each_other_by_name(one: str, other: str) -> None:
    if one == other or {one, other} in TOGETHER:
        config = inlay.LoraConfig(**ALL[one], **(ALL[other] if one != other else {}))
        assert type(config)(**config.to_dict()) == config
        return
    with pytest.raises(ValueError, match=f"(?s)`{min(one, other)}` and `{max(one, other)}` cannot be combined"):
        inlay.LoraConfig(**ALL[one], **ALL[other])


@pytest.mark.parametrize("name", ["use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config"])
def test_starts_from_the_weight_need_plain_factors(name: str) -> None:
    with pytest.raises(ValueError, match=f"'pissa' starts plain factors A and B, and `{name}` has others"):
        inlay.LoraConfig(init_lora_weights="pissa", **ALL[name])


@pytest.mark.parametrize("variant", ["alora_invocation_tokens", "velora_config"])
def test_starts_from_the_weight_go_with_what_has_plain_factors(variant: str) -> None:
    adapted, _ = model(init_lora_weights="pissa", **ALL[variant])
    assert adapted(x()).isfinite().all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: inlay.VeloraConfig(num_groups=0), "`num_groups` should be positive, not 0"),
        (lambda: inlay.VeloraConfig(init_type="mean"), "'mean' is not one of batch_average"),
        (lambda: inlay.KasaConfig(beta=-1), "`beta` should not be negative"),
        (lambda: inlay.MontecloraConfig(num_samples=0), "`num_samples` should be positive"),
        (lambda: inlay.ArrowConfig(top_k=0), "`top_k` should be positive"),
        (lambda: inlay.BdLoraConfig(["a"], ["b", "a"]), "both have 'a'"),
        (lambda: inlay.BdLoraConfig(nblocks=0), "`nblocks` should be a positive integer"),
        (lambda: inlay.LoraConfig(use_qalora=True, qalora_group_size=0), "`qalora_group_size` should be a positive integer"),
        (lambda: model(use_qalora=True, qalora_group_size=3), "8 inputs cannot be split into groups of `qalora_group_size` = 3"),
        (lambda: model(use_bdlora={"target_modules_bd_a": ["0"]}), "neither list of `use_bdlora` names it.*match_strict=False"),
        (lambda: model(use_bdlora={"target_modules_bd_a": ["0", "2"], "nblocks": 4}), "2 ranks cannot be split into 4 blocks"),
        (lambda: inlay.get_peft_model(nn.Sequential(nn.Linear(3, 2)), inlay.LoraConfig(r=2, target_modules=["0"], kasa_config={})),
         "a rank of 2 leaves nothing of its weight"),
        (lambda: inlay.get_peft_model(nn.Sequential(nn.Conv1d(3, 2, 1)), inlay.LoraConfig(target_modules="0", alora_invocation_tokens=[1])),
         "its inputs are no tokens"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_its_remedy(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_options_of_a_wrong_kind() -> None:
    with pytest.raises(TypeError, match="`kasa_config` must be a KasaConfig, a dict or None, not a int"):
        inlay.LoraConfig(kasa_config=3)


def test_alora_says_what_it_is_for() -> None:
    with pytest.warns(UserWarning, match="meant for task_type='CAUSAL_LM'"):
        inlay.LoraConfig(alora_invocation_tokens=[1], task_type="SEQ_CLS")


@pytest.mark.parametrize("name", ALL)
def test_variants_travel(name: str) -> None:
    adapted, _ = model(**ALL[name])
    expected = adapted(x())
    assert torch.equal(copy.deepcopy(adapted)(x()), expected)
    assert torch.equal(pickle.loads(pickle.dumps(adapted))(x()), expected)


# ---- formulas -------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dora", [False, True])
def test_qalora_sums_groups(dora: bool) -> None:
    adapted, (p, q) = model(use_qalora=True, qalora_group_size=2, lora_alpha=6, use_dora=dora)
    if dora:
        p.lora_magnitude_vector.data = (p.site.read()[0] + p.method.delta(p)).norm(dim=-1)
        q.lora_magnitude_vector.data = (q.site.read()[0] + q.method.delta(q)).norm(dim=-1)

    def layer(p: Adapter, x: Tensor) -> Tensor:
        assert p.lora_A.shape == (2, x.shape[-1] // 2)
        pooled = x.unflatten(-1, (-1, 2)).mean(-1) * (x.shape[-1] // 2)
        return nn.functional.linear(x, p.site.module.weight, p.site.module.bias) + 3 * pooled @ p.lora_A.T @ p.lora_B.T

    torch.testing.assert_close(adapted(x()), layer(q, torch.tanh(layer(p, x()))))


def kept(run: Callable[[], Tensor]) -> int:
    """The bytes of activations that a forward pass keeps."""
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.nbytes)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        run()
    return sum(sizes)


@pytest.mark.parametrize("options", [{"use_qalora": True, "qalora_group_size": 32}, {"velora_config": {"num_groups": 8}}])
def test_inputs_are_kept_compressed(options: dict[str, Any]) -> None:
    def run(options: dict[str, Any]) -> int:
        base = nn.Sequential(nn.Linear(256, 16))
        adapted = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0"], **options)).train()
        return kept(lambda: adapted(torch.ones(512, 256)))

    assert run(options) < run({}) / 8


def test_the_gradient_of_velora_knows_one_direction_a_group() -> None:
    adapted, (p, _) = model(velora_config={"num_groups": 3, "scale": 0.5})
    adapted.train()
    inputs = x().requires_grad_()
    p.site.module(inputs).square().sum().backward()
    grouped = nn.functional.pad(inputs.detach(), (0, 1)).reshape(-1, 3, 3)
    v = grouped.mean((0, 1))
    v = v / v.norm()
    torch.testing.assert_close(p.lora_velora_embed, v)
    seen = (grouped @ v).unsqueeze(-1) * v * 0.5
    again = inputs.detach().requires_grad_()
    a = p.lora_A.detach().requires_grad_()
    w, b = p.site.read()
    y = nn.functional.linear(again, w, b) + 4 * again @ a.T @ p.lora_B.detach().T
    g = torch.autograd.grad(y.square().sum(), (y, again))
    torch.testing.assert_close(inputs.grad, g[1])
    through = 4 * g[0].reshape(-1, 6) @ p.lora_B.detach()
    torch.testing.assert_close(p.lora_A.grad, through.T @ seen.flatten(1)[:, :8])


@pytest.mark.parametrize(("kind", "changes"), [("batch_average", True), ("batch_average_once", False), ("random", False)])
def test_when_the_direction_of_velora_changes(kind: str, changes: bool) -> None:
    adapted, (p, _) = model(velora_config={"num_groups": 3, "init_type": kind})
    assert bool(p.lora_velora_embed.any()) == (kind == "random")
    adapted.train()(x())
    first = p.lora_velora_embed.clone()
    assert first.norm().item() == pytest.approx(1)
    adapted(x().square())
    assert torch.equal(first, p.lora_velora_embed) != changes


def test_kasa_leaves_out_the_smallest_components_and_gives_them_back() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    weight = base[0].weight.detach().clone()
    adapted = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0"], kasa_config={}))
    u, s, v = torch.linalg.svd(weight, full_matrices=False)
    truncated = (u[:, :4] * s[:4]) @ v[:4]
    inputs = torch.randn(5, 8)
    torch.testing.assert_close(adapted(inputs), nn.functional.linear(inputs, truncated, base[0].bias))
    with adapted.disable_adapter():
        torch.testing.assert_close(adapted(inputs), nn.functional.linear(inputs, weight, base[0].bias))
    (p,) = adapters_of(base, "default")
    p.lora_B.data.normal_()
    expected = truncated + 4 * p.lora_B @ torch.diag(p.lora_diag) @ p.lora_A
    torch.testing.assert_close(adapted(inputs), nn.functional.linear(inputs, expected, base[0].bias))
    assert torch.equal(adapted.unload()[0].weight, weight)


def test_dropout_of_kasa_is_for_the_update_alone() -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6))
    adapted = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules=["0"], kasa_config={}, lora_dropout=0.5))
    inputs = torch.randn(40, 8)
    expected = adapted.eval()(inputs)
    torch.testing.assert_close(adapted.train()(inputs), expected)  # B is zero


def test_bdlora_has_blocks_on_the_diagonal() -> None:
    adapted, (p, q) = model(use_bdlora={"target_modules_bd_a": ["0"], "target_modules_bd_b": ["2"], "nblocks": 2})
    assert p.lora_A.shape == (2, 4)
    assert q.lora_B.shape == (4, 1)
    a, _ = p.method.factors(p)
    assert torch.equal(a, torch.block_diag(*p.lora_A.chunk(2)))
    _, b = q.method.factors(q)
    assert torch.equal(b, torch.block_diag(*q.lora_B.chunk(2)))
    adapted(x()).sum().backward()
    assert all(t.grad is not None for t in (p.lora_A, q.lora_B))


def test_bdlora_with_plain_lora_beside_it() -> None:
    _, (p, q) = model(use_bdlora=inlay.BdLoraConfig(target_modules_bd_a=["0"], nblocks=2, match_strict=False))
    assert p.lora_A.shape == (2, 4)
    assert q.lora_A.shape == (2, 6)
    assert q.lora_B.shape == (4, 2)


def test_monteclora_is_lora_when_it_is_not_trained() -> None:
    adapted, adapters = model(monteclora_config={"sample_scaler": 0.5})
    assert torch.equal(adapted(x()), adapted(x()))
    assert not torch.allclose(adapted.train()(x()), adapted(x()))
    adapted(x()).sum().backward()
    for p in adapters:
        assert p.std_prior.grad.abs().sum() > 0
        assert p.expert_weights_prior.grad.abs().sum() > 0
    plain = adapted.eval()(x())
    torch.testing.assert_close(adapted.merge_and_unload()(x()), plain)


def test_alora_outside_of_a_model_is_the_base() -> None:
    adapted, (p, _) = model(alora_invocation_tokens=[1, 2])
    base = nn.functional.linear(x(), *p.site.read())
    assert torch.equal(p.site.module(x()), base)
    with pytest.raises(TypeError, match="acts on some tokens only"):
        adapted.merge_and_unload()


def test_alora_looks_for_its_tokens_once_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.methods import alora

    adapted, (p, q) = model(alora_invocation_tokens=[1, 2], lora_alpha=6)
    found: list[Tensor] = []
    acting = alora._acting
    monkeypatch.setattr(alora, "_acting", lambda rows, x: found.append(acting(rows, x)) or found[-1])
    x = torch.randn(2, 40, 8, dtype=torch.float64)
    tensors = [x.requires_grad_(), *(t for t in adapted.parameters() if t.requires_grad)]
    for count, offsets in enumerate(([7, None], [40, 3]), 1):
        acts = (torch.arange(40) >= 40 - torch.tensor([[o or 0] for o in offsets])).double().unsqueeze(-1)

        def layer(x: Tensor, r: Adapter, acts: Tensor = acts) -> Tensor:
            return nn.functional.linear(x, r.site.module.weight, r.site.module.bias) + 3 * acts * (x @ r.lora_A.T @ r.lora_B.T)

        ours, wanted = adapted(input=x, alora_offsets=offsets), layer(layer(x, p).tanh(), q)
        assert len(found) == count
        torch.testing.assert_close(ours, wanted)
        for mine, theirs in zip(
            torch.autograd.grad(ours.sin().sum(), tensors), torch.autograd.grad(wanted.sin().sum(), tensors), strict=True
        ):
            torch.testing.assert_close(mine, theirs)


def test_a_layer_of_alora_sees_the_end_of_a_row() -> None:
    adapted, (p, _) = model(alora_invocation_tokens=[7, 8])
    method: Any = p.method
    ids = torch.tensor([[7, 8, 1, 1], [1, 7, 1, 8], [7, 8, 7, 8]])
    rows = method.given(adapted, (ids,), {})["alora"]
    assert rows[:, 0].tolist() == [0, 2**30, 2]
    assert rows[:, 1].tolist() == [4, 4, 4]
    from inlay.methods.alora import _acting

    def acting(tokens: int, times: int = 1) -> list[list[int]]:
        return _acting(rows, torch.zeros(3 * times, tokens, 5)).long().tolist()

    assert acting(4) == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]
    assert acting(1) == [[1], [0], [1]], "a cache holds the rest"
    assert acting(6) == [[1] * 6, [0] * 6, [0, 0, 1, 1, 1, 1]], "no cache"
    assert acting(1, times=2) == [[1], [1], [0], [0], [1], [1]], "beams"
    assert method.given(adapted, (ids[:, :1],), {})["alora"][:, 0].tolist() == [2**30] * 3
    with pytest.warns(UserWarning, match="pass `alora_offsets`"):
        assert method.given(adapted, (), {"inputs_embeds": torch.zeros(1, 4, 8)}) == {}


def test_penalties_are_in_the_loss_of_training_alone() -> None:
    from inlay.methods.kasa import Kasa

    _adapted, adapters = model(kasa_config={"beta": 2.0, "gamma": 3.0})
    expected = torch.zeros((), dtype=torch.float64)
    for p in adapters:
        one = torch.eye(2)
        apart = (p.lora_B.T @ p.lora_B - one).norm() + (p.lora_A @ p.lora_A.T - one).norm()
        expected += 2 * p.lora_diag.square().sum() + 3 * apart
    method: Any = adapters[0].method
    assert isinstance(method, Kasa)
    torch.testing.assert_close(method.penalty(adapters), expected)


# ---- replicated blocks ----------------------------------------------------------------------------------------------------
class Blocks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.h = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.h:
            x = torch.tanh(block(x))
        return x


def test_blocks_in_another_order_on_the_same_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = Blocks()
    before, inputs = list(base.h), torch.randn(2, 4)
    expected = base(inputs)
    config = inlay.LoraConfig(r=2, target_modules=["0", "1", "2", "3"], layer_replication=[(0, 2), (1, 3)])
    adapted = inlay.get_peft_model(base, config)
    y = inputs
    for i in (0, 1, 1, 2):
        y = torch.tanh(before[i](y))
    torch.testing.assert_close(adapted(inputs), y)
    assert base.h[1].weight is before[1].weight
    assert base.h[2].weight is before[1].weight
    first, second = (p for p in adapters_of(base, "default")[1:3])
    assert first.lora_A is not second.lora_A
    adapted.delete_adapter("default")
    assert list(base.h) == before
    assert torch.equal(base(inputs), expected)


def test_blocks_are_put_back_when_the_adapter_fails() -> None:
    base = Blocks()
    before = list(base.h)
    with pytest.raises(ValueError, match="not found in the base model"):
        inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["nothing"], layer_replication=[(0, 3), (0, 3)]))
    assert list(base.h) == before


@pytest.mark.parametrize(
    ("base", "ranges", "message"),
    [
        (Blocks(), [(0, 4)], r"the range \[0, 4\], and the model has 3 blocks"),
        (nn.Sequential(nn.Linear(2, 2)), [(0, 1)], "found no list of blocks in Sequential"),
    ],
)
def test_ranges_that_are_not_there(base: nn.Module, ranges: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replicate(base, ranges)


def test_blocks_with_adapters_stay() -> None:
    adapted = inlay.get_peft_model(Blocks(), inlay.LoraConfig(target_modules=["0"]))
    with pytest.raises(ValueError, match="load this one first"):
        adapted.add_adapter("more", inlay.LoraConfig(target_modules=["0"], layer_replication=[(0, 3)]))


def test_files_know_their_options() -> None:
    """Options of variants come back from a file as what they were."""
    config = inlay.LoraConfig(velora_config=inlay.VeloraConfig(num_groups=7), target_modules=["0"])
    plain = config.to_file()
    assert plain["velora_config"] == dataclasses.asdict(inlay.VeloraConfig(num_groups=7))
    assert inlay.LoraConfig(**{k: v for k, v in plain.items() if k != "runtime_config"}).velora_config == config.velora_config


def test_alora_counts_the_tokens_of_embeddings_given_in_place_of_ids() -> None:
    """Without a name as with one: the offsets count back from the end of ``(rows, tokens, width)``."""
    config = inlay.LoraConfig(r=2, alora_invocation_tokens=[1])
    x = torch.randn(2, 5, 7)
    for args, kwargs in (((x,), {}), ((), {"inputs_embeds": x})):
        found = config.variant().given(torch.nn.Linear(7, 7), args, {**kwargs, "alora_offsets": [2, None]})["alora"]
        assert found[0].tolist() == [3, 5]
        assert found[1, 0] > 5
