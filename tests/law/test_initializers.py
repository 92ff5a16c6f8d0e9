"""Starts of low-rank methods: what each is by its mathematics, on all layouts, and that the base is where all of them start."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.core.adapter import Adapter
from inlay.core.attach import attach
from inlay.core.config import PeftConfig
from inlay.core.stores import STORES
from inlay.core.targets import explain_targets
from inlay.initializers.cloq import root
from inlay.initializers.compensation import best_factors
from inlay.initializers.corda import components
from inlay.initializers.directions import StreamedDirections
from inlay.initializers.eva import get_eva_state_dict, initialize_lora_eva_weights
from inlay.initializers.loraga import leading
from inlay.initializers.mica import minor_directions
from inlay.initializers.offset import alive
from inlay.initializers.olora import olora
from inlay.initializers.pissa import pissa
from inlay.initializers.search import distribute
from inlay.initializers.svd import approximate_singular_vectors, singular_vectors
from inlay.initializers.together import AT_ONCE, Starts
from inlay.kernels.blockwise import rounded as in_bits

from .layouts import LAYOUTS, Layout, Model
from .support import BY_NAME, adapters, close, jitter
from .test_stores import Rounded, RoundedStore, restored

STARTS = ["pissa", "pissa_niter_2", "olora", "mica", "lora_ga", "eva", "gaussian"]


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def started(layout: Layout, init: str, dtype: torch.dtype = torch.float64, **more: Any) -> tuple[nn.Module, nn.Module] | None:
    """A base and an adapted one; None where the method does not act on the layout."""
    options: dict[str, Any] = {"r": 2, "lora_alpha": 3, "init_lora_weights": init, **layout.targets, **more}
    if init == "lora_ga":
        options["lora_ga_config"] = inlay.LoraGAConfig()
    config = inlay.LoraConfig(**options)
    model = layout.model(dtype)
    if explain_targets(model, config).refused:
        return None
    if init == "lora_ga":
        if min(min(site.site.shape[-2:]) for site in explain_targets(model, config).targets) < 4:
            return None
        inlay.preprocess_loraga(model, config, lambda: model(*layout.example(dtype)).square().sum().backward())
    attach(model, config, "a")
    return layout.model(dtype).eval(), model.eval()


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_starts_from_the_base_exactly(layout: Layout, init: str, dora: bool) -> None:
    made = started(layout, init, torch.float32, use_dora=dora)
    if made is None:
        assert init in ("mica", "lora_ga")
        return
    base, model = made
    example = layout.example(torch.float32)
    before, after = base(*example), model(*example)
    if dora or init in ("eva", "gaussian"):
        # Norms are rounded; what is no offset is added as a product with zero, which may be a fused one.
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(after, before)
    assert all(q.requires_grad for p in adapters(model) for q in p.parameters())


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_half_precision_starts_from_the_base_exactly(init: str) -> None:
    for name in ("linear", "conv1d-gpt2", "conv2d"):
        base, model = started(BY_NAME[name], init, torch.bfloat16)  # type: ignore[misc]
        example = BY_NAME[name].example(torch.bfloat16)
        assert torch.equal(model(*example), base(*example))
        assert next(iter(adapters(model))).lora_A.dtype == torch.float32


@pytest.fixture
def _rounded() -> Iterator[None]:
    STORES["Rounded"] = RoundedStore()
    yield
    del STORES["Rounded"]


@pytest.mark.usefixtures("_rounded")
@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_2", "mica"])
def test_a_quantised_base(init: str) -> None:
    """It stays to the bit, and the start is that of the numbers that it stands for."""
    torch.manual_seed(1)
    model = Model(Rounded(8, 6))
    x = BY_NAME["linear"].example()[0]
    before, stored = model(x), model.host.weight.clone()
    attach(model, inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights=init, target_modules=["host"]), "a")
    assert torch.equal(model(x), before)
    assert torch.equal(model.host.weight, stored)
    (p,) = adapters(model)
    if init == "pissa":
        w = restored(model.host.weight)
        u, s, vh = torch.linalg.svd(w)
        close(1.5 * p.lora_B @ p.lora_A, u[:, :2] * s[:2] @ vh[:2])
    jitter(model, "a")
    close(model(x), F.linear(x, restored(stored_like(stored, model)) + p.method.delta(p), model.host.bias))


def stored_like(stored: Tensor, model: nn.Module) -> Tensor:
    stored.scale = model.host.weight.scale  # type: ignore[attr-defined]
    return stored


# ---- what each start is ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", ["linear", "conv1d-gpt2", "conv2d-groups", "embedding", "experts", "transpose1d"])
def test_pissa_is_the_best_approximation(layout: str) -> None:
    _, model = started(BY_NAME[layout], "pissa")  # type: ignore[misc]
    for p in adapters(model):
        w = p.site.read()[0]
        a, b = (getattr(p, n) for n in p.method.names(p.site))
        error = (w - 1.5 * b @ a).norm(dim=(-2, -1))
        best = torch.linalg.svdvals(w)[..., a.shape[-2] :].norm(dim=-1)
        close(error, best, 1e-10)
        close(a.norm(dim=-1), b.norm(dim=-2), 1e-10)
        assert not p.method.delta(p).any()


def test_pissa_of_awkward_weights() -> None:
    """An outlier 1e5 times as large as the rest; columns that are zero; more rank than there is."""
    u, v = torch.linalg.qr(drawn(12, 8)).Q, torch.linalg.qr(drawn(8, 8, seed=2)).Q
    s = torch.tensor([1e5, 3, 2, 1, 0.5, 0.2, 0.1, 0.05], dtype=torch.float64)
    w = u * s @ v.mT
    a, b = pissa(w, 3, 1.0)
    # In single precision nothing but the outlier would be right.
    close(w - b @ a, u[:, 3:] * s[3:] @ v[:, 3:].mT, 1e-6)
    w[:, 3:] = 0
    a, b = alive(*pissa(w, 8, 2.0), 8)
    close(2.0 * b @ a, w, 1e-6)
    # The ranks that there are not start as those of LoRA do, so that they can learn.
    assert (a.norm(dim=-1) > 0).all()
    assert not b[:, 3:].any()
    a, b = alive(*pissa(drawn(3, 5), 4, 1.0), 4)
    assert a.shape == (4, 5)
    assert b.shape == (3, 4)
    close(b @ a, drawn(3, 5))


def test_olora_is_the_start_of_a_qr_decomposition() -> None:
    w = drawn(3, 7, 10)
    a, b = olora(w, 4, 2.0)
    q, r = torch.linalg.qr(w)
    close(b, q[..., :4])
    close(a, r[..., :4, :])
    close(b.mT @ b, torch.eye(4, dtype=w.dtype).expand(3, 4, 4))


@pytest.mark.parametrize("shape", [(6, 9), (9, 6), (2, 9, 6)])
def test_mica_is_behind_the_minor_directions(shape: tuple[int, ...]) -> None:
    w = drawn(*shape)
    b = minor_directions(w, 2)
    u, s, _ = torch.linalg.svd(w, full_matrices=False)
    close(b @ b.mT, u[..., -2:] @ u[..., -2:].mT)
    close((b.mT @ w).norm(dim=-1), s[..., -2:])
    w[..., -3:] = 0  # directions that the weight does not have
    b = minor_directions(w, 2)
    close(b.mT @ b, torch.eye(2, dtype=w.dtype).expand(*shape[:-2], 2, 2))


def test_mica_trains_one_factor() -> None:
    _, model = started(BY_NAME["linear"], "mica")  # type: ignore[misc]
    (p,) = adapters(model)
    assert [n for n, _ in p.named_parameters()] == ["lora_A"]
    assert "lora_B" in p.state_dict()


@pytest.mark.parametrize("direction", ["ArB2r", "A2rBr", "ArBr", "random"])
@pytest.mark.parametrize("scale", ["stable", "weight_svd", "gd_scale", "unit"])
def test_lora_ga_takes_directions_of_the_gradient(direction: str, scale: str) -> None:
    layout = BY_NAME["conv1d-gpt2"]
    model, (x,) = layout.model(), layout.example()
    options = inlay.LoraGAConfig(direction=direction, scale=scale, stable_gamma=9)
    config = inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights="lora_ga", lora_ga_config=options, **layout.targets)
    (p,) = started_by_gradient(model, config, x)
    gradient = (2 * model.host(x)).flatten(0, 1).mT @ x.flatten(0, 1)
    u, s, vh = torch.linalg.svd(gradient)
    in_a, in_b = {"ArB2r": ([0, 1], [2, 3]), "A2rBr": ([2, 3], [0, 1]), "ArBr": ([1, 3], [0, 2])}.get(direction, (None, None))
    by_b = p.lora_B / p.lora_B.norm(dim=0)
    if in_a is None:
        in_a = in_b = (p.lora_A @ vh.mT).abs().argmax(1).tolist()
        assert max(in_a) < 4
    lengths = {
        "stable": s[in_b] * 6**0.25 / 3,
        "weight_svd": s[in_b] / s[in_b][0] * torch.linalg.matrix_norm(model.host.weight, 2),
        "gd_scale": s[in_b] / 1.5,
        "unit": s[in_b],
    }[scale]
    close(p.lora_A.norm(dim=1), torch.full((2,), 1 / 1.5 if scale == "gd_scale" else 1.0, dtype=torch.float64))
    close(p.lora_B.norm(dim=0), lengths)
    close(F.normalize(p.lora_A, dim=1).mul(vh[in_a]).sum(1).abs(), torch.ones(2).double())
    close(by_b.mul(u[:, in_b]).sum(0).abs(), torch.ones(2).double())


def started_by_gradient(model: nn.Module, config: Any, x: Tensor) -> list[Adapter]:
    marks = [torch.randn_like(q) for q in model.parameters()]
    for q, mark in zip(model.parameters(), marks, strict=True):
        q.grad = mark
    frozen = next(model.parameters()).requires_grad_(False)
    inlay.preprocess_loraga(model, config, lambda: model(x).square().sum().backward())
    # The model is as it was.
    assert not frozen.requires_grad
    assert all(q.grad is mark for q, mark in zip(model.parameters(), marks, strict=True))
    attach(model, config, "a")
    assert not any("loraga" in key for key in vars(model.host))
    return list(adapters(model))


def test_leading_directions_of_a_gradient() -> None:
    """Of many directions they are found by iteration, in a stack as alone; of few exactly."""
    u, v = (torch.linalg.qr(drawn(3, n, 40, seed=n)).Q for n in (64, 48))
    gradients = (u * 0.8 ** torch.arange(40) @ v.mT).float()
    for k, tolerance in ((4, 1e-4), (24, 1e-6)):
        found_u, s, found_v = leading(gradients, k)
        best_u, best_s, best_vh = torch.linalg.svd(gradients, full_matrices=False)
        close(s.float(), best_s[..., :k], tolerance)
        best = best_u[..., :k] * best_s[..., None, :k] @ best_vh[..., :k, :]
        close((found_u * s.unsqueeze(-2) @ found_v.mT).float(), best, 10 * tolerance)
        for i, one in enumerate(gradients):
            one_u, one_s, one_v = leading(one, k)
            close(one_u * one_s @ one_v.mT, found_u[i] * s[i] @ found_v[i].mT, 1e-5)


def test_corda_adapts_the_components_that_matter_on_the_inputs() -> None:
    layout = BY_NAME["linear"]
    seen: list[tuple[int, ...]] = []
    for method in ("ipm", "kpm"):
        model, (x,) = layout.model(), layout.example()
        config = inlay.LoraConfig(
            r=2, lora_alpha=3, init_lora_weights="corda", corda_config=inlay.CordaConfig(corda_method=method), **layout.targets
        )
        inlay.preprocess_corda(model, config, lambda model=model, x=x: model(x), progress=lambda *done: seen.append(done))
        assert seen.pop() == (1, 1)
        attach(model, config, "a")
        (p,) = adapters(model)
        rows = (x / x.max()).flatten(0, 1).float()
        c = (rows.mT @ rows).double()
        c = c + 0.01 * c.diagonal().mean() * torch.eye(8)
        u, s, vh = torch.linalg.svd(model.host.weight.detach() @ c, full_matrices=False)
        kept = slice(0, 2) if method == "ipm" else slice(-2, None)
        torch.testing.assert_close(1.5 * p.lora_B @ p.lora_A, u[:, kept] * s[kept] @ vh[kept] @ c.inverse(), rtol=1e-5, atol=1e-6)
        assert not hasattr(model.host, "eigens")


def test_results_of_data_can_be_kept_in_files(tmp_path: Path) -> None:
    layout = BY_NAME["linear"]
    (x,) = layout.example()
    options = inlay.CordaConfig(cache_file=str(tmp_path / "a" / "cache.pt"), covariance_file=str(tmp_path / "b" / "covariance.pt"))
    config = inlay.LoraConfig(r=2, init_lora_weights="corda", corda_config=options, **layout.targets)
    found = []
    for step in range(3):
        model = layout.model()
        inlay.preprocess_corda(model, config, (lambda model=model: model(x)) if step == 0 else None)
        found.append(model.host.eigens)
        if step == 1:
            (tmp_path / "a" / "cache.pt").unlink()
    for leaf in ("U_WC", "S_WC", "V_WC"):
        assert torch.equal(getattr(found[0], leaf), getattr(found[1], leaf))
        assert torch.equal(getattr(found[0], leaf), getattr(found[2], leaf))
    config = inlay.LoraConfig(r=2, init_lora_weights="lora_ga", lora_ga_config=inlay.LoraGAConfig(), **layout.targets)
    for step in range(2):
        model = layout.model()
        inlay.preprocess_loraga(
            model, config, lambda model=model, step=step: None if step else model(x).sum().backward(), str(tmp_path / "g.pt")
        )
        found.append(model.host._peft_loraga_grad)
    assert torch.equal(found[-1], found[-2])


# ---- LoftQ ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("layout", ["linear", "conv1d-gpt2", "embedding", "conv2d"])
def test_loftq_alternates(layout: str, bits: int) -> None:
    """Against the paper's algorithm."""
    on = BY_NAME[layout]
    for rounds in (1, 2, 5):
        model = on.model()
        options = inlay.LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
        attach(model, inlay.LoraConfig(r=2, lora_alpha=5, init_lora_weights="loftq", loftq_config=options, **on.targets), "a")
        (p,) = adapters(model)
        raw = model.host.weight.detach()
        w = p.site.matrix(raw)
        product = torch.zeros_like(w)
        for _ in range(rounds):
            q = p.site.matrix(in_bits(p.site.raw(w - product), bits)).double()
            u, s, vh = torch.linalg.svd(w - q, full_matrices=False)
            product = u[:, :2] * s[:2] @ vh[:2]
        close(p.site.matrix(raw) + p.method.fold(p, w, None)[0] - w, q + product, 1e-6)
        assert torch.equal(model.host.weight, raw)


def test_loftq_comes_nearer_to_the_base_with_more_rounds() -> None:
    @torch.no_grad()
    def error(bits: int, rounds: int) -> float:
        torch.manual_seed(1)
        model = Model(nn.Linear(96, 80))
        options = inlay.LoftQConfig(loftq_bits=bits, loftq_iter=rounds)
        attach(model, inlay.LoraConfig(r=8, init_lora_weights="loftq", loftq_config=options, target_modules=["host"]), "a")
        (p,) = adapters(model)
        return float(p.method.delta(p).add(p.lora_base - model.host.weight).norm() / model.host.weight.norm())

    assert error(4, 5) < 0.97 * error(4, 1) < 0.1
    assert error(8, 1) < 0.01


def test_loftq_with_dora() -> None:
    on = BY_NAME["linear"]
    model, (x,) = on.model(), on.example()
    config = inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights="loftq", loftq_config=inlay.LoftQConfig(), use_dora=True, **on.targets)
    attach(model, config, "a")
    (p,) = adapters(model)
    jitter(model, "a")
    v = p.lora_base + 1.5 * p.lora_B @ p.lora_A
    w = p.lora_magnitude_vector.unsqueeze(1) * v / v.norm(dim=1, keepdim=True)
    close(model.eval()(x), F.linear(x, w, model.host.bias))


@pytest.mark.usefixtures("_rounded")
def test_loftq_on_a_quantised_base(tmp_path: Path) -> None:
    on = BY_NAME["linear"]
    torch.manual_seed(1)
    model = Model(Rounded(8, 6)).float()
    exact = restored(model.host.weight) + 0.03 * drawn(6, 8)
    save_file({"host.weight": exact.contiguous()}, tmp_path / "model.safetensors")
    wrapped = inlay.get_peft_model(model, inlay.LoraConfig(r=2, lora_alpha=5, target_modules=["host"]))
    (p,) = adapters(model)
    lost = exact - restored(model.host.weight)
    start = p.lora_A.detach().clone()
    inlay.replace_lora_weights_loftq(wrapped, str(tmp_path), callback=lambda _, name: name != "host")
    assert torch.equal(p.lora_A, start)
    assert not p.lora_B.any()
    inlay.replace_lora_weights_loftq(wrapped, str(tmp_path / "model.safetensors"))
    close((lost - p.method.delta(p)).norm(), torch.linalg.svdvals(lost)[2:].norm())
    with pytest.raises(ValueError, match="model_path"):
        inlay.replace_lora_weights_loftq(wrapped, str(tmp_path / "nowhere"))
    plain = inlay.get_peft_model(on.model(), inlay.LoraConfig(r=2, target_modules=["host"]))
    with pytest.raises(ValueError, match="is quantised"):
        inlay.replace_lora_weights_loftq(plain, str(tmp_path))


@pytest.mark.usefixtures("_rounded")
def test_loftq_says_why_it_refuses_a_quantised_base() -> None:
    config = inlay.LoraConfig(r=2, init_lora_weights="loftq", loftq_config=inlay.LoftQConfig(), target_modules=["host"])
    with pytest.raises(ValueError, match=r"weight before rounding, .* is gone; .* `replace_lora_weights_loftq`"):
        attach(Model(Rounded(8, 6)).float(), config, "a")


# ---- offsets as adapters --------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("layout", ["linear", "conv2d-groups", "experts"])
def test_dora_over_an_offset(init: str, layout: str) -> None:
    """The magnitude is that of the base's rows, and the direction that of ``W + s (B A - B0 A0)``."""
    on = BY_NAME[layout]
    _, model = started(on, init, use_dora=True)  # type: ignore[misc]
    starts = {p.path: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for p in adapters(model)}
    for p in adapters(model):
        close(p.lora_magnitude_vector, p.site.read()[0].norm(dim=-1))
    jitter(model, "a")
    for p in adapters(model):
        a, b = starts[p.path]
        w = p.site.read()[0]
        v = w + 1.5 * (p.lora_B @ p.lora_A - b @ a)
        close(p.method.fold(p, w, None)[0], p.lora_magnitude_vector.unsqueeze(-1) * v / v.norm(dim=-1, keepdim=True))


def test_copies_keep_their_start() -> None:
    on = BY_NAME["linear"]
    _, model = started(on, "pissa")  # type: ignore[misc]
    jitter(model, "a")
    (x,) = on.example()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(again(x), model(x), 1e-12)
        (p,) = adapters(again)
        p.method.derive(p)
        close(again(x), model(x), 1e-12)


class Stacked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.wide = nn.ModuleList(nn.Linear(8, 6) for _ in range(3))
        self.square = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return sum(layer(self.square(x)) for layer in self.wide)  # type: ignore[return-value]


def test_layers_of_one_shape_are_decomposed_together(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = [], []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda t: calls.append(tuple(t.shape)) or eigh(t))
    model = Stacked()
    config = inlay.LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear")
    config.runtime_config.progress = lambda done, total: seen.append((done, total))
    attach(model, config, "a")
    assert sorted(calls) == [(1, 8, 8), (3, 6, 6)]
    assert seen[-1] == (4, 4)
    for p in adapters(model):
        assert isinstance(p.shared, Starts)
        assert not p.shared.found
        a, b = pissa(p.site.read()[0], 2, 4.0)
        close(p.lora_B @ p.lora_A, (b @ a).float(), 1e-5)


@pytest.mark.parametrize("init", ["mica", "loftq"])
def test_mica_and_loftq_decompose_layers_of_one_shape_together(init: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The numbers are those of one layer at a time; and a file's layers are only rounded again."""
    calls, seen = [], []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda t: calls.append(tuple(t.shape)) or eigh(t))

    def made() -> tuple[nn.Module, list[Tensor]]:
        options = {"loftq_config": inlay.LoftQConfig(loftq_iter=2)} if init == "loftq" else {}
        config = inlay.LoraConfig(r=2, init_lora_weights=init, target_modules="all-linear", **options)
        config.runtime_config.progress = lambda done, total: seen.append((done, total))
        calls.clear()
        model = inlay.get_peft_model(Stacked(), config)
        return model, [t for p in adapters(model) for t in (p.lora_B, p.lora_A, *p.buffers()) if t.any()]

    model, together = made()
    rounds = 2 if init == "loftq" else 1
    assert sorted(calls) == [(1, 8, 8)] * rounds + [(3, 6, 6)] * rounds
    assert seen == [(1, 4), (4, 4)] or seen == [(3, 4), (4, 4)]
    monkeypatch.setitem(AT_ONCE, "cpu", 1)
    _, alone = made()
    assert len(calls) == 4 * rounds
    for one, other in zip(together, alone, strict=True):
        close(one, other, 1e-6)
    model.save_pretrained(tmp_path)
    calls.clear()
    again = inlay.PeftModel.from_pretrained(Stacked(), tmp_path)
    assert len(calls) == (4 * (rounds - 1) if init == "loftq" else 0)
    x = drawn(5, 8).float()
    torch.testing.assert_close(again(x), model(x))


class Read(nn.Module):
    """Two embeddings of one shape before the layers of `Stacked`."""

    def __init__(self) -> None:
        super().__init__()
        self.stacked = Stacked()
        self.tokens, self.places = nn.Embedding(9, 8), nn.Embedding(9, 8)

    def forward(self, ids: Tensor) -> Tensor:
        return self.stacked(self.tokens(ids) + self.places(ids.flip(-1)))


@pytest.mark.parametrize("method", ["ipm", "kpm"])
def test_corda_decomposes_layers_of_one_shape_together(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are those of one layer at a time."""
    calls, seen = [], []
    eigh = torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda t: calls.append(tuple(t.shape)) or eigh(t))
    targets = {"target_modules": ["0", "1", "2", "square", "tokens", "places"], "corda_config": {"corda_method": method}}
    config = inlay.LoraConfig(r=2, init_lora_weights="corda", **targets)
    ids, model = torch.arange(40).reshape(4, 10) ** 2 % 9, Read()

    def found() -> dict[str, list[Tensor]]:
        calls.clear()
        inlay.preprocess_corda(model, config, lambda: model(ids), progress=lambda *done: seen.append(done))
        eigens = {name: vars(module).pop("eigens") for name, module in model.named_modules() if "eigens" in vars(module)}
        return {name: [e.S_WC, e.U_WC, e.V_WC] for name, e in eigens.items()}

    together = found()
    assert sorted(calls) == [(1, 8, 8), (2, 8, 8), (3, 6, 6)]
    assert seen == [(3, 6), (4, 6), (6, 6)]
    assert all(t.untyped_storage().nbytes() == t.nbytes for parts in together.values() for t in parts)
    monkeypatch.setitem(AT_ONCE, "cpu", 1)
    alone = found()
    assert len(calls) == len(alone) == 6
    for name, (s, u, v) in alone.items():
        one_s, one_u, one_v = together[name]
        close(one_s, s, 1e-6)
        close(one_u * one_s @ one_v.mT, u * s @ v.mT, 1e-5)


def test_a_covariance_that_needs_damping_leaves_others_alone() -> None:
    """Of two that are decomposed together, one is negative in a direction."""
    w, x = drawn(2, 5, 6), drawn(2, 9, 6, seed=2)
    c = x.mT @ x
    c[1, 0, 0] = -0.05 * c[1].diagonal().mean()
    u, s, v = components(w, c, 2, smallest=False)
    for i in range(2):
        one_u, one_s, one_v = components(w[i], c[i], 2, smallest=False)
        close(s[i], one_s, 1e-9)
        close(u[i] * s[i] @ v[i].mT, one_u * one_s @ one_v.mT, 1e-9)


def test_a_stack_is_made_up_for_as_each_of_its_matrices() -> None:
    """What LoftQ and CLoQ do for experts on a quantised base."""
    lost, inputs = drawn(3, 5, 6), drawn(3, 9, 6, seed=2)
    roots = root(inputs.mT @ inputs)
    for given in (None, roots):
        a, b = best_factors(lost, 2, 1.5, given)
        for i in range(3):
            one_a, one_b = best_factors(lost[i], 2, 1.5, None if given is None else root(inputs[i].mT @ inputs[i]))
            close(b[i] @ a[i], one_b @ one_a, 1e-9)


def test_starts_by_layer() -> None:
    model = Stacked()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    before = model(x)
    overrides = {r"wide\.1": {"init_lora_weights": "olora"}, "square": {"init_lora_weights": True}}
    attach(model, inlay.LoraConfig(r=2, init_lora_weights="pissa", target_modules="all-linear", overrides=overrides), "a")
    kinds = {p.path: (str(p.method.init_lora_weights), "lora_A_start" in dict(p.named_buffers())) for p in adapters(model)}
    assert kinds == {"wide.0": ("pissa", True), "wide.1": ("olora", True), "wide.2": ("pissa", True), "square": ("True", False)}
    torch.testing.assert_close(model(x), before)


# ---- decompositions -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(20, 31), (31, 20), (2, 3, 12, 12)])
@pytest.mark.parametrize("smallest", [False, True])
def test_exact_singular_vectors(shape: tuple[int, ...], smallest: bool) -> None:
    w = drawn(*shape).float()
    u, s, v = singular_vectors(w, 5, smallest=smallest)
    part = slice(-5, None) if smallest else slice(0, 5)
    full_u, full_s, full_vh = torch.linalg.svd(w.double(), full_matrices=False)
    close(s, full_s[..., part])
    close(u * s.unsqueeze(-2) @ v.mT, full_u[..., part] * full_s[..., part].unsqueeze(-2) @ full_vh[..., part, :])
    close(u.mT @ u, torch.eye(5).double().expand(*shape[:-2], 5, 5))


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("iterations", [0, 1, 4])
def test_error_of_the_randomised_decomposition(slope: float, iterations: int) -> None:
    """Halko, Martinsson and Tropp's bound, and no further from the best than the power iterations allow."""
    n, k = 96, 8
    u, v = torch.linalg.qr(drawn(2, n, n)).Q, torch.linalg.qr(drawn(2, n, n, seed=2)).Q
    s = torch.arange(1, n + 1, dtype=torch.float64) ** -slope
    w = u * s @ v.mT
    a, b, c = approximate_singular_vectors(w, k, iterations)
    error = torch.linalg.matrix_norm(w - (a * b.unsqueeze(-2) @ c.mT).double(), 2)
    bound = (1 + 4 * (2 * n / (k - 1)) ** 0.5) ** (1 / (2 * iterations + 1)) * s[k]
    assert (error <= bound).all()
    if iterations == 4:
        assert (error <= 1.05 * s[k]).all()
    torch.testing.assert_close(a.mT @ a, torch.eye(k).expand(2, k, k), rtol=1e-4, atol=1e-5)


# ---- EVA ------------------------------------------------------------------------------------------------------------------
def stream(rows: Tensor, k: int, sizes: list[int]) -> StreamedDirections:
    found = StreamedDirections(k)
    for part in rows.split(sizes):
        found.add(part)
    return found


@pytest.mark.parametrize("n", [12, 60])
def test_streamed_directions_are_the_principal_ones(n: int) -> None:
    """Of all rows about their mean, in batches of any size, also smaller than the number of directions."""
    scales = 2.0 ** -torch.arange(n)
    rows = (drawn(200, n) @ torch.linalg.qr(drawn(n, n, seed=2)).Q.mul(scales).mT + 3).float()
    found = stream(rows, 4, [50, 1, 2, 97, 50])
    assert found.count == 200
    centred = (rows - rows.mean(0)).double()
    _, s, vh = torch.linalg.svd(centred, full_matrices=False)
    torch.testing.assert_close(found.values.double(), s[:4], rtol=0.02, atol=0)
    assert ((found.directions * vh[:4]).sum(1).abs() > 0.999).all()
    torch.testing.assert_close(found.mean, rows.mean(0))
    torch.testing.assert_close(found.shares, s[:4] ** 2 / (s**2).sum(), rtol=0.04, atol=0)
    assert (found.directions.gather(1, found.directions.abs().argmax(1, keepdim=True)) > 0).all()


def test_ranks_go_where_they_explain_most() -> None:
    shares = {"a": torch.tensor([0.5, 0.2, 0.1]), "b": torch.tensor([0.3, 0.15, 0.05]), "c": torch.tensor([0.04, 0.03, 0.02])}
    assert distribute(shares, 4) == {"a": 2, "b": 2, "c": 0}
    assert distribute(dict.fromkeys("ab", torch.tensor([0.5, 0.2])), 3) == {"a": 2, "b": 1}


def eva_model() -> nn.Module:
    model = Stacked()
    with torch.no_grad():
        model.square.weight.mul_(2.0 ** -torch.arange(8)).mul_(2.0 ** -torch.arange(8).unsqueeze(1))
    return model


def eva_data(count: int = 5, rows: int = 40) -> list[dict[str, Tensor]]:
    return [{"x": drawn(rows, 8, seed=i).float() * 1.5 ** -torch.arange(8)} for i in range(count)]


def test_eva_redistributes_ranks_and_starts_from_the_base() -> None:
    model = eva_model()
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    before, seen = model(x), []
    config = inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights="eva", target_modules="all-linear", use_dora=True)
    wrapped = inlay.get_peft_model(model, config)
    initialize_lora_eva_weights(
        wrapped, eva_data(), prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, progress=lambda *done: seen.append(done)
    )
    ranks = {p.path: len(p.lora_A) for p in adapters(model)}
    assert sum(ranks.values()) == 8
    assert max(ranks.values()) > 2
    assert config.rank_pattern == {path: r for path, r in ranks.items() if r != 2}
    assert config.alpha_pattern == pytest.approx({path: 1.5 * r for path, r in ranks.items() if r != 2})
    assert seen[-1] == (4, 4)
    torch.testing.assert_close(model(x), before)
    for p in adapters(model):
        assert p.method.scaling == 1.5
        close(p.lora_A @ p.lora_A.mT, torch.eye(len(p.lora_A)), 1e-4)
    model(x).square().sum().backward()
    assert all(q.grad is not None for p in adapters(model) for q in p.parameters() if len(p.lora_A))


def test_a_layer_that_gets_no_rank_is_left_alone() -> None:
    model = eva_model()
    config = inlay.LoraConfig(r=2, init_lora_weights="eva", target_modules="all-linear")
    wrapped = inlay.get_peft_model(model, config)
    state = {f"base_model.model.{name}": drawn(r, 8).float() for name, r in {"wide.0": 3, "wide.1": 2, "square": 0}.items()}
    with pytest.warns(UserWarning, match=r"wide\.2"):
        initialize_lora_eva_weights(wrapped, eva_state_dict=state)
    assert {p.path: len(p.lora_A) for p in adapters(model)} == {"wide.0": 3, "wide.1": 2, "wide.2": 2}
    assert type(model.square) is nn.Linear
    assert config.target_modules == {"wide.0", "wide.1", "wide.2"}
    assert torch.equal(next(adapters(model)).lora_A, state["base_model.model.wide.0"])


def test_eva_says_what_it_lacks() -> None:
    model = Stacked()
    wrapped = inlay.get_peft_model(model, inlay.LoraConfig(r=2, init_lora_weights="eva", target_modules="all-linear"))
    plain: dict[str, Any] = {"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None}
    with pytest.raises(ValueError, match="dataloader is empty"):
        initialize_lora_eva_weights(wrapped, [], **plain)
    with pytest.raises(ValueError, match="less rows"):
        initialize_lora_eva_weights(wrapped, eva_data(1, 0), **plain)
    with pytest.raises(ValueError, match="`dataloader`"):
        initialize_lora_eva_weights(wrapped)
    with pytest.raises(TypeError, match="prepare_model_inputs_fn"):
        get_eva_state_dict(wrapped, [torch.zeros(3, 8)])
    with pytest.raises(ValueError, match="names layers"):
        get_eva_state_dict(wrapped, eva_data(), prepare_model_inputs_fn=None, prepare_layer_inputs_fn={"nowhere": lambda *_: None})
    other = inlay.get_peft_model(Stacked(), inlay.LoraConfig(r=2, target_modules="all-linear"))
    with pytest.raises(ValueError, match="init_lora_weights='eva'"):
        initialize_lora_eva_weights(other, eva_data())
    found = get_eva_state_dict(Stacked(), eva_data(), inlay.LoraConfig(r=2, init_lora_weights="eva", target_modules=["square"]), **plain)
    assert {name: tuple(rows.shape) for name, rows in found.items()} == {"square": (2, 8)}


# ---- options --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"init_lora_weights": "pisa"}, ValueError, "Did you mean 'pissa'"),
        ({"init_lora_weights": "pissa_niter_x"}, ValueError, "Unknown init_lora_weights"),
        ({"init_lora_weights": "pissa", "lora_alpha": 0}, ValueError, "`lora_alpha` must be positive"),
        ({"init_lora_weights": "loftq"}, ValueError, "needs a `loftq_config`"),
        ({"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 3}}, ValueError, "4 or 8"),
        ({"init_lora_weights": "eva", "eva_config": {"rho": 0.5}}, ValueError, "`rho`"),
        ({"init_lora_weights": "eva", "eva_config": {"tau": 2}}, ValueError, "`tau`"),
        ({"init_lora_weights": "eva", "eva_config": 3}, TypeError, "EvaConfig, a dict or None"),
        ({"init_lora_weights": "corda", "corda_config": {"corda_method": "x"}}, ValueError, "'ipm' or 'kpm'"),
        ({"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "x"}}, ValueError, "`direction`"),
    ],
)
def test_wrong_options(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        inlay.LoraConfig(**options)


def test_options_that_are_not_used() -> None:
    with pytest.warns(UserWarning, match="`eva_config` is ignored"):
        inlay.LoraConfig(eva_config=inlay.EvaConfig())
    with pytest.warns(UserWarning, match="`loftq_config` is ignored"):
        assert inlay.LoraConfig(loftq_config=inlay.LoftQConfig()).loftq_config == {}
    assert inlay.LoraConfig(init_lora_weights="PiSSA").init_lora_weights == "pissa"


def test_options_survive_a_file(tmp_path: Path) -> None:
    for config in (
        inlay.LoraConfig(init_lora_weights="eva", eva_config=inlay.EvaConfig(rho=3.0)),
        inlay.LoraConfig(init_lora_weights="corda", corda_config=inlay.CordaConfig(corda_method="kpm")),
        inlay.LoraConfig(init_lora_weights="lora_ga", lora_ga_config=inlay.LoraGAConfig(scale="unit")),
        inlay.LoraConfig(init_lora_weights="loftq", loftq_config=inlay.LoftQConfig(loftq_iter=4)),
    ):
        config.save_pretrained(tmp_path)
        again = PeftConfig.from_pretrained(tmp_path)
        assert again == config


def test_what_has_to_run_before_says_so() -> None:
    on = BY_NAME["linear"]
    for init, function in (("corda", "preprocess_corda"), ("lora_ga", "preprocess_loraga")):
        model = on.model()
        with pytest.raises(ValueError, match=f"run `{function}"):
            attach(model, inlay.LoraConfig(r=2, init_lora_weights=init, lora_ga_config=None, **on.targets), "a")
        assert not list(adapters(model))
    model = on.model()
    config = inlay.LoraConfig(r=2, init_lora_weights="corda", **on.targets)
    with pytest.raises(ValueError, match="`run_model` is needed"):
        inlay.preprocess_corda(model, config)
    with pytest.raises(ValueError, match="met no input"):
        inlay.preprocess_corda(model, config, lambda: None)
    norm = BY_NAME["layer-norm"]
    with pytest.raises(ValueError, match="take it out of the targets"):
        inlay.preprocess_corda(norm.model(), inlay.LoraConfig(r=2, init_lora_weights="corda", **norm.targets), lambda: None)
    plain = inlay.LoraConfig(r=2, init_lora_weights="lora_ga", **on.targets)
    with pytest.raises(ValueError, match="lora_ga_config="):
        inlay.preprocess_loraga(model, plain, lambda: None)
    with_options = inlay.LoraConfig(r=4, init_lora_weights="lora_ga", lora_ga_config=inlay.LoraGAConfig(), **on.targets)
    with pytest.raises(ValueError, match="got no gradient"):
        inlay.preprocess_loraga(model, with_options, lambda: None)
    inlay.preprocess_loraga(model, with_options, lambda: model(*on.example()).sum().backward())
    with pytest.raises(ValueError, match="choose a smaller r"):
        attach(model, with_options, "a")
