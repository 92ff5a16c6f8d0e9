"""LoHa, LoKr, LoCon, DyLoRA and full differences: their papers' formulas, what they draw in training, bad options."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.adapter import Adapter
from inlay.core.attach import attach
from inlay.core.inlaid import adapters_of
from inlay.core.method import Method
from inlay.methods.dylora import DyLoraConfig
from inlay.methods.full import FullConfig
from inlay.methods.locon import LoConConfig
from inlay.methods.loha import LoHaConfig
from inlay.methods.lokr import LoKrConfig, factorization

from .support import close

HOSTS = {
    "linear": lambda: nn.Linear(6, 4),
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(6, 4, (3, 2)),
    "grouped": lambda: nn.Conv2d(6, 4, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 4, (1, 2, 3)),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, (3, 2)),
}


def adapter(config: Method, host: str = "linear", training: bool = False) -> Adapter:
    """One with random numbers in double precision."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"host": HOSTS[host]()}).double()
    config.target_modules = {"host"}
    attach(model, config, "a")
    (p,) = adapters_of(model, "a")
    for q in p.parameters():
        q.data = torch.randn_like(q)
    return p.train(training)


def update(p: Adapter) -> Tensor:
    """What is added to the weight, in the host's own shape."""
    assert p.strength == 1
    w, _ = p.site.read()
    return (p.site.raw(p.method.fold(p, w, None)[0]) - p.site.raw(w)).detach()


def elementwise(shape: torch.Size, value: Any) -> Tensor:
    """A tensor by a formula for each of its numbers."""
    found = torch.zeros(shape, dtype=torch.float64)
    for index in itertools.product(*map(range, shape)):
        found[index] = value(*index)
    return found


# ---- the papers' formulas -------------------------------------------------------------------------------------------------
def test_loha_is_a_product_by_elements() -> None:
    p = adapter(LoHaConfig(r=2, alpha=5))
    close(update(p), 5 / 2 * (p.hada_w1_a @ p.hada_w1_b) * (p.hada_w2_a @ p.hada_w2_b))
    a, b = p.method.factors(p)  # type: ignore[attr-defined]
    assert a.shape == (4, 6)
    close(5 / 2 * b @ a, update(p))


@pytest.mark.parametrize("host", ["conv1d", "conv2d", "grouped", "conv3d", "transposed"])
def test_cores_of_loha(host: str) -> None:
    p = adapter(LoHaConfig(r=2, alpha=5, use_effective_conv2d=True), host)
    shape = p.site.raw_shape
    assert p.hada_t1.shape == (2, 2, *shape[2:])

    def side(k: int, o: int, i: int, *tap: int) -> Tensor:
        core, a, b = (getattr(p, f"hada_{name}") for name in (f"t{k}", f"w{k}_a", f"w{k}_b"))
        return sum(core[(r, s, *tap)] * a[r, o] * b[s, i] for r in range(2) for s in range(2))  # type: ignore[return-value]

    close(update(p), elementwise(shape, lambda *at: 5 / 2 * side(1, *at) * side(2, *at)))


@pytest.mark.parametrize("factor", [-1, 2])
@pytest.mark.parametrize("r", [1, 8])
@pytest.mark.parametrize("host", HOSTS)
def test_lokr_is_a_kronecker_product(host: str, r: int, factor: int) -> None:
    p = adapter(LoKrConfig(r=r, alpha=5, decompose_factor=factor, decompose_both=True, use_effective_conv2d=True), host)
    rows, columns, *kernel = p.site.raw_shape
    (_, k), (_, q) = factorization(rows, factor), factorization(columns, factor)
    w1 = p.lokr_w1 if "lokr_w1" in p.declared else p.lokr_w1_a @ p.lokr_w1_b
    if "lokr_w2" in p.declared:
        w2 = p.lokr_w2
    elif "lokr_t2" in p.declared:
        w2 = torch.einsum("ij...,ip,jq->pq...", p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b)
    else:
        w2 = p.lokr_w2_a @ p.lokr_w2_b
    assert w2.shape == (k, q, *kernel)
    close(update(p), elementwise(p.site.raw_shape, lambda o, i, *tap: 5 / r * w1[o // k, i // q] * w2[(o % k, i % q, *tap)]))


@pytest.mark.parametrize("host", ["conv1d", "conv2d", "conv3d"])
def test_locon_is_three_convolutions(host: str) -> None:
    p = adapter(LoConConfig(r=3, alpha=2), host)
    kernel = p.site.kernel
    conv = (nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d)[len(kernel) - 1]
    down, mid, up = (p.declared[name].to_file(p.site, getattr(p, name)) for name in ("locon_A", "locon_mid", "locon_B"))
    assert down.shape == (3, p.site.raw_shape[1], *(1 for _ in kernel))
    assert mid.shape == (3, 3, *kernel)
    assert up.shape == (p.site.raw_shape[0], 3, *(1 for _ in kernel))
    x = torch.randn(2, p.site.raw_shape[1], *(5 for _ in kernel), dtype=torch.float64)
    close(conv(x, update(p)), 2 / 3 * conv(conv(conv(x, down), mid), up))


def test_locon_on_transposed_convolutions() -> None:
    p = adapter(LoConConfig(r=2, alpha=2), "transposed")
    a, core, b = p.locon_A, p.locon_mid, p.locon_B
    expected = torch.einsum("oi,ij...,jc->co...", b, core, a)
    close(update(p), expected)


def test_full_is_a_difference_of_weight_and_bias() -> None:
    p = adapter(FullConfig())
    w, b = p.site.read()
    assert b is not None
    new_w, new_b = p.method.fold(p, w, b)
    assert new_b is not None
    close(new_w, w + p.diff)
    close(new_b, b + p.diff_b)
    assert sum(q.numel() for q in p.parameters()) == w.numel() + b.numel()
    assert [*adapter(FullConfig(train_bias=False)).declared] == ["diff"]


@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig, LoConConfig])
def test_a_trained_factor_starts_from_zero(method: Any) -> None:
    model = nn.ModuleDict({"host": nn.Linear(6, 4)})
    attach(model, method(r=1, use_scalar=True, target_modules=["host"]), "a")
    (p,) = adapters_of(model, "a")
    name = f"{p.method.prefix}scalar"
    assert all((q == 0).all() if n == name else q.any() for n, q in p.named_parameters())
    without = {n: q for n, q in p.named_parameters() if n != name}
    getattr(p, name).data.fill_(1)
    whole = update(p)
    getattr(p, name).data.fill_(-3)
    torch.testing.assert_close(update(p), -3 * whole, rtol=1e-4, atol=1e-6)
    assert whole.any()
    assert without


# ---- what is drawn in training --------------------------------------------------------------------------------------------
def trained_updates(p: Adapter, count: int = 400) -> Tensor:
    """Updates of linear layers as they act in training: what a layer makes of the identity."""
    host = p.site.module.train()
    torch.manual_seed(1)
    base = nn.functional.linear(torch.eye(6, dtype=torch.float64), *p.site.read())
    with torch.no_grad():
        return torch.stack([(host(torch.eye(6, dtype=torch.float64)) - base).T for _ in range(count)])


@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig])
@pytest.mark.parametrize("rescaled", [True, False])
def test_rank_dropout_leaves_out_rows(method: Any, rescaled: bool) -> None:
    p = adapter(method(r=1, alpha=1, rank_dropout=0.4, rank_dropout_scale=rescaled))
    whole, found = update(p), trained_updates(p)
    gains = (found / whole).mean(-1)
    close(found, gains.unsqueeze(-1) * whole)
    kept = gains != 0
    assert abs(kept.double().mean().item() - 0.6) < 0.05
    expected = kept.double() * (4 / kept.double().sum(-1, keepdim=True).clamp(min=1) if rescaled else 1)
    close(gains, expected)
    # No row at all is left out of nothing: HF divides by zero there.
    assert not kept.any(-1).all()
    assert found.isfinite().all()


@pytest.mark.parametrize("method", [LoHaConfig, LoKrConfig, LoConConfig])
def test_module_dropout_leaves_out_all_or_nothing(method: Any) -> None:
    p = adapter(method(r=1, alpha=1, module_dropout=0.3))
    whole, found = update(p), trained_updates(p)
    zero = (found == 0).all(-1).all(-1)
    assert abs(zero.double().mean().item() - 0.3) < 0.07
    close(found[~zero], whole.expand_as(found[~zero]))


def test_rank_dropout_of_locon_leaves_out_ranks() -> None:
    p = adapter(LoConConfig(r=3, alpha=3, rank_dropout=0.5))
    each = torch.stack([torch.outer(p.locon_B[:, i], p.locon_A[i]) for i in range(3)]).detach()
    possible = torch.stack(
        [(torch.tensor(choice, dtype=torch.float64).view(3, 1, 1) * each).sum(0) for choice in itertools.product((0, 1), repeat=3)]
    )
    found = trained_updates(p)
    distance = (found.unsqueeze(1) - possible).abs().amax((-1, -2))
    assert (distance.amin(1) < 1e-9).all()
    assert set(distance.argmin(1).tolist()) == set(range(8))


class Twice(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.Linear(6, 6))
        self.double()


def cut(p: Adapter, b: int) -> Tensor:
    alpha = p.method.alpha  # type: ignore[attr-defined]
    return (alpha / b * p.dylora_B[:, :b] @ p.dylora_A[:b]).detach()


def dylora(**options: Any) -> tuple[nn.Module, list[Adapter]]:
    model = Twice()
    attach(model, DyLoraConfig(alpha=3, init_weights=False, target_modules=["0", "1"], **options), "a")
    return model.train(), adapters_of(model, "a")


def rank_now(p: Adapter, ranks: range) -> int:
    """The rank to which a layer in training cuts its update."""
    (a, b), _ = p.method.drawn(p)  # type: ignore[attr-defined]
    return next(k for k in ranks if torch.allclose(p.method.scaling * b @ a, cut(p, k)))  # type: ignore[attr-defined]


@pytest.mark.parametrize("unit", [1, 2])
def test_dylora_draws_one_rank_a_step_for_all_layers(unit: int) -> None:
    model, (one, other) = dylora(r=4, unit=unit)
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=1e-3)
    torch.manual_seed(0)
    ranks, seen = range(unit, 5, unit), []
    for _ in range(60):
        seen.append(rank_now(one, ranks))
        assert rank_now(other, ranks) == seen[-1]
        x = torch.randn(3, 6, dtype=torch.float64)
        expected = x
        for p in (one, other):
            w, b = p.site.read()
            expected = nn.functional.linear(expected, w + cut(p, seen[-1]), b)
        y = model(x)
        close(y, expected)
        # The same step may run the layer many times.
        close(model(x), expected)
        optimizer.zero_grad()
        y.square().mean().backward()
        grad = one.dylora_A.grad
        assert grad is not None
        assert grad[: seen[-1]].any(-1).all()
        assert not grad[seen[-1] :].any()
        optimizer.step()
    assert set(seen) == set(ranks)


def test_dylora_of_the_last_block_leaves_the_others_alone() -> None:
    model, (p, _) = dylora(r=4, unit=2, last_only=True)
    for share, trained in ((0.1, [True, True, False, False]), (0.9, [False, False, True, True])):
        p.shared.share.fill_(share)
        model.zero_grad()
        model(torch.randn(3, 6, dtype=torch.float64)).square().mean().backward()
        assert p.dylora_A.grad is not None
        assert p.dylora_A.grad.any(-1).tolist() == trained
        assert p.dylora_B.grad is not None
        assert p.dylora_B.grad.any(0).tolist() == trained


def test_dylora_can_be_cut_to_any_rank() -> None:
    model = Twice()
    config = DyLoraConfig(r=4, alpha=3, init_weights=False, target_modules=["0"])
    attach(model, config, "a")
    (p,) = adapters_of(model.eval(), "a")
    for b in (None, 1, 2, 3, 4):
        config.eval_rank = b
        close(update(p), cut(p, b or 4))
        w, bias = p.site.read()
        x = torch.randn(3, 6, dtype=torch.float64)
        close(model[0](x), nn.functional.linear(x, w + cut(p, b or 4), bias))


def test_dylora_where_the_host_reads_its_weight() -> None:
    host = nn.ModuleDict({"host": nn.MultiheadAttention(8, 2, batch_first=True)}).double()
    attach(host, DyLoraConfig(r=4, init_weights=False, target_modules=["host"]), "a")
    p = adapters_of(host, "a")[0]
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    found = []
    for share in (0.1, 0.6):
        p.shared.share.fill_(share)
        found.append(host["host"].train()(x, x, x)[0])
        close(host["host"](x, x, x)[0], found[-1])
    assert not torch.allclose(*found)


# ---- options --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        (LoHaConfig, {"r": 0}, "`r` should be a positive integer, not 0"),
        (LoKrConfig, {"r": 2.5}, "`r` should be a positive integer, not 2.5"),
        (LoHaConfig, {"rank_dropout": 1.0}, "`rank_dropout` is a share"),
        (LoKrConfig, {"module_dropout": -0.1}, "`module_dropout` is a share"),
        (LoKrConfig, {"init_weights": "lycoriss"}, "Did you mean 'lycoris'"),
        (LoKrConfig, {"decompose_factor": 0}, "`decompose_factor` is a positive size or -1"),
        (DyLoraConfig, {"r": 6, "unit": 4}, "`unit`=4 does not divide r=6"),
        (DyLoraConfig, {"r": 4, "eval_rank": 5}, "`eval_rank`=5 is above r=4"),
        (DyLoraConfig, {"r": 4, "eval_rank": 0}, "`eval_rank` should be a positive integer"),
    ],
)
def test_bad_options(method: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        method(**options)


@pytest.mark.parametrize("method", ["DYLORA", "FULL", "LOCON"])
def test_methods_of_ours_go_to_files_and_back(method: str, tmp_path: Any) -> None:
    options = {"r": 2, "rank_pattern": {"1": 1}} if method != "FULL" else {}
    cls: Any = inlay.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    model = inlay.get_peft_model(Twice(), cls(target_modules=["0", "1"], **options))
    for q in model.parameters():
        q.data += torch.randn_like(q) * q.requires_grad
    model.save_pretrained(str(tmp_path))
    again = inlay.PeftModel.from_pretrained(Twice(), str(tmp_path))
    assert again.peft_config["default"].peft_type == method
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(again(x), model.eval()(x), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(again(x), Twice()(x))


@pytest.mark.parametrize(
    ("number", "factor", "found"), [(128, -1, (8, 16)), (127, -1, (1, 127)), (128, 4, (4, 32)), (8, 4, (4, 2)), (360, 7, (6, 60))]
)
def test_factors_of_an_axis(number: int, factor: int, found: tuple[int, int]) -> None:
    assert factorization(number, factor) == found
