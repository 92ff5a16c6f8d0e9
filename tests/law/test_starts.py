"""Starts beyond LoRA on linear layers: other methods with free factors, convolutions, embeddings, experts, weights that are no
parameters."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.core.attach import attach
from inlay.core.site import site_of
from inlay.core.targets import explain_targets
from inlay.initializers.calibration import multiplied
from inlay.initializers.pissa import pissa

from .layouts import LAYOUTS, Layout, Model, experts
from .support import BY_NAME, adapters, close, jitter

METHODS: dict[str, Callable[..., Any]] = {
    "dylora": lambda init, **more: inlay.DyLoraConfig(**{"r": 2, "alpha": 3, "init_weights": init, **more}),
    "locon": lambda init, **more: inlay.LoConConfig(**{"r": 2, "alpha": 3, "init_weights": init, **more}),
    "locon-gated": lambda init, **more: inlay.LoConConfig(**{"r": 2, "alpha": 3, "init_weights": init, "use_scalar": True, **more}),
    "adalora": lambda init, **more: inlay.AdaLoraConfig(**{"init_r": 2, "total_step": 9, "init_lora_weights": init, **more}),
}
STARTS = ["pissa", "corda", "lora_ga", "mica", "orthogonal"]


def prepared(model: nn.Module, config: Any, layout: Layout) -> None:
    """Show the model the data that a start is a function of."""
    if config.init == "lora_ga":
        inlay.preprocess_loraga(model, config, lambda: model(*layout.example(torch.float32)).square().sum().backward())
    if config.init == "corda":
        inlay.preprocess_corda(model, config, lambda: model(*layout.example(torch.float32)))


def fits(layout: Layout, config: Any) -> bool:
    model = layout.model(torch.float32)
    found = explain_targets(model, config)
    if found.refused:
        return False
    least = min(min(target.site.shape[-2:]) for target in found.targets)
    reads = any(target.site.reads for target in found.targets)
    return not ((config.init == "lora_ga" and least < 4) or (config.init == "corda" and reads and "experts" not in layout.name))


@pytest.mark.parametrize("init", STARTS)
@pytest.mark.parametrize("method", ["dylora", "locon-gated"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_the_base_is_where_all_start(layout: Layout, method: str, init: str) -> None:
    if method == "dylora" and init == "orthogonal":
        with pytest.raises(ValueError, match="with all ranks only"):
            METHODS[method](init)
        return
    options = {"lora_ga_config": inlay.LoraGAConfig()} if init == "lora_ga" else {}
    config = METHODS[method](init, **options, **layout.targets)
    if not fits(layout, config):
        assert init in ("mica", "lora_ga", "corda", "orthogonal")
        return
    model, base = layout.model(torch.float32), layout.model(torch.float32)
    if "experts" in layout.name and init == "corda":
        model.host.config._experts_implementation = base.host.config._experts_implementation = "eager"
    prepared(model, config, layout)
    attach(model, config, "a")
    example = layout.example(torch.float32)
    torch.testing.assert_close(model.eval()(*example), base(*example), rtol=1e-5, atol=1e-5)
    torch.manual_seed(3)
    # Whatever ranks a step of training draws.
    torch.testing.assert_close(model.train()(*example), base(*example), rtol=1e-5, atol=1e-5)
    model(*example).square().sum().backward()
    for p in adapters(model):
        # A tied adapter has none of its own.
        grads = [q.grad for q in p.parameters()]
        assert not grads or max(float(g.abs().max()) for g in grads if g is not None) > 1e-4


@pytest.mark.parametrize("eval_rank", [None, 1, 3])
def test_an_offset_is_cut_and_scaled_like_the_factors(eval_rank: int | None) -> None:
    on = BY_NAME["linear"]
    model = on.model()
    attach(model, inlay.DyLoraConfig(r=4, alpha=6, init_weights="pissa", eval_rank=eval_rank, **on.targets), "a")
    (p,) = adapters(model)
    a0, b0 = p.dylora_A.detach().clone(), p.dylora_B.detach().clone()
    close(b0 @ a0, (lambda a, b: b @ a)(*pissa(model.host.weight.detach(), 4, 1.5)))
    jitter(model, "a")
    b = eval_rank or 4
    close(p.method.delta(p), 6 / b * (p.dylora_B[:, :b] @ p.dylora_A[:b] - b0[:, :b] @ a0[:b]))
    # In training the share says how many ranks take part.
    model.train()
    p.shared.share.fill_(0.3)
    x = on.example()[0]
    w = model.host.weight + 3 * (p.dylora_B[:, :2] @ p.dylora_A[:2] - b0[:, :2] @ a0[:2])
    close(model(x), F.linear(x, w, model.host.bias))


def test_only_the_last_block_learns_from_an_offset() -> None:
    on = BY_NAME["linear"]
    model = on.model()
    attach(model, inlay.DyLoraConfig(r=4, unit=2, last_only=True, init_weights="pissa", **on.targets), "a")
    jitter(model, "a")
    (p,) = adapters(model)
    p.shared.share.fill_(0.7)
    model.train()(*on.example()).square().sum().backward()
    assert not p.dylora_A.grad[:2].any()
    assert not p.dylora_B.grad[:, :2].any()
    assert p.dylora_A.grad[2:].any()
    assert p.dylora_B.grad[:, 2:].any()


@pytest.mark.parametrize("layout", ["conv2d", "conv2d-groups", "transpose1d", "transpose2d-groups", "conv3d"])
def test_a_core_tensor_starts_as_the_truncated_decomposition(layout: str) -> None:
    """With as much rank as there are channels the start is the best approximation; with less it is its Tucker decomposition."""
    on = BY_NAME[layout]
    for r, exact in ((8, True), (2, False)):
        model = on.model()
        attach(model, inlay.LoConConfig(r=r, alpha=r, init_weights="pissa", **on.targets), "a")
        (p,) = adapters(model)
        a, b = p.method.joined(p.site, *p.method.tensors(p))
        w = p.site.read()[0]
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        k = min(r, *w.shape[-2:])
        best = u[..., :k] * s[..., None, :k] @ vh[..., :k, :]
        if exact:
            close(b @ a, best)
            assert all((q.flatten(-2).norm(dim=-1) > 0).all() for q in (p.locon_A, p.locon_B))
        else:
            # What is left out is orthogonal to what is kept, and no more than the other ranks of the unfolded kernel hold.
            close(((best - b @ a) * (b @ a)).sum(), torch.zeros((), dtype=torch.float64))
            assert ((best - b @ a).norm() < best.norm()).all()
        assert not p.method.delta(p).any()


@pytest.mark.parametrize("init", ["eva", "mica", "orthogonal", "gaussian"])
def test_adalora_starts_from_the_base_with_vectors_that_can_learn(init: str) -> None:
    on = BY_NAME["linear"]
    model, (x,) = on.model(), on.example()
    config = METHODS["adalora"](init, **on.targets)
    wrapped = inlay.get_peft_model(model, config)
    if init == "eva":
        inlay.initialize_lora_eva_weights(wrapped, [{"input": x}], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None,
                                          forward_fn=lambda m, batch: m(batch["input"]))  # fmt: skip
    close(model.eval()(x), on.model()(x), 1e-6)
    (p,) = adapters(model)
    if init in ("eva", "orthogonal"):
        close(p.lora_A @ p.lora_A.mT, torch.eye(2).double(), 1e-5)
        close(p.lora_B.mT @ p.lora_B, torch.eye(2).double(), 1e-5)
    if init == "eva":
        rows = x.flatten(0, 1) - x.flatten(0, 1).mean(0)
        vh = torch.linalg.svd(rows)[2][:2]
        close((p.lora_A * vh).sum(1).abs(), torch.ones(2).double(), 1e-4)
        assert config.rank_pattern is None
    assert ("lora_B" in dict(p.named_parameters())) == (init != "mica")
    model.train()(x).square().sum().backward()
    assert p.lora_E.grad is not None
    assert p.lora_E.grad.all()


def test_adalora_says_why_zero_has_to_be_the_base() -> None:
    on = BY_NAME["linear"]
    model = on.model()
    for init in ("pissa", "PiSSA_niter_4", "olora", "corda", "lora_ga"):
        with pytest.raises(ValueError, match="setting its value to zero, which has to be the base"):
            attach(model, METHODS["adalora"](init, **on.targets), "a")
        assert not list(adapters(model))


def test_adalora_takes_its_triplets_from_what_rounding_loses() -> None:
    on = BY_NAME["linear"]
    model = on.model()
    attach(model, METHODS["adalora"]("loftq", loftq_config=inlay.LoftQConfig(), **on.targets), "a")
    (p,) = adapters(model)
    lost = model.host.weight - p.lora_base
    u, s, vh = torch.linalg.svd(lost.detach())
    close(p.method.delta(p), u[:, :2] * s[:2] @ vh[:2], 1e-6)
    close(p.lora_A @ p.lora_A.mT, torch.eye(2).double(), 1e-6)


def test_what_has_no_free_factors_says_so() -> None:
    on = BY_NAME["linear"]
    for config, why in (
        (inlay.VeraConfig(r=2, **on.targets), "drawn once and frozen"),
        (inlay.OFTConfig(oft_block_size=2, r=0, **on.targets), "no product of two matrices"),
    ):
        model = on.model()
        for call in (
            lambda model=model, config=config: inlay.preprocess_corda(model, config, lambda: None),
            lambda model=model, config=config: inlay.preprocess_loraga(model, config, lambda: None),
            lambda model=model, config=config: inlay.get_eva_state_dict(model, [], config),
            lambda model=model, config=config: inlay.initialize_lora_eva_weights(inlay.get_peft_model(model, config), []),
        ):
            with pytest.raises(ValueError, match=f"has no free factors A and B .*{why}"):
                call()
    with pytest.raises(ValueError, match="scaled by r / b"):
        inlay.DyLoraConfig(init_weights="loftq", loftq_config=inlay.LoftQConfig())
    with pytest.raises(ValueError, match="`rank_dropout` leaves some out"):
        inlay.LoConConfig(init_weights="orthogonal", rank_dropout=0.1)
    with pytest.raises(ValueError, match="Did you mean 'lycoris'"):
        inlay.LoConConfig(init_weights="lycori")


def test_a_decomposed_offset_travels() -> None:
    on = BY_NAME["linear"]
    model, (x,) = on.model(), on.example()
    attach(model, inlay.DyLoraConfig(r=2, init_weights="pissa", use_dora=True, **on.targets), "a")
    jitter(model, "a")
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(again.eval()(x), model.eval()(x), 1e-12)


@pytest.mark.parametrize("method", ["dylora", "locon-gated"])
@pytest.mark.parametrize("init", ["pissa", "lora_ga", "mica"])
def test_files(method: str, init: str, tmp_path: Any) -> None:
    on = BY_NAME["conv2d"]
    options = {"lora_ga_config": inlay.LoraGAConfig()} if init == "lora_ga" else {}
    config = METHODS[method](init, **options, **on.targets)
    model, example = on.model(torch.float32), on.example(torch.float32)
    prepared(model, config, on)
    wrapped = inlay.get_peft_model(model, config)
    jitter(model, "default")
    wrapped.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(on.model(torch.float32), tmp_path)
    close(again.eval()(*example), wrapped.eval()(*example), 1e-6)


# ---- what a layer multiplies ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [x.name for x in LAYOUTS if "conv" in x.name or x.name.startswith("transpose")])
def test_patches_are_what_the_matrix_multiplies(layout: str) -> None:
    on = BY_NAME[layout]
    host, (x,) = on.model().host, on.example()
    site = site_of(host)
    assert site is not None
    w, _ = site.read()
    rows = multiplied(site, x)
    assert rows.shape[:-2] == site.batch
    # The sum over positions of a quadratic form of the outputs.
    if layout.startswith("transpose"):
        close(rows.square().sum(), x.square().sum())
        return
    bare = copy.deepcopy(host)
    if getattr(bare, "bias", None) is not None:
        bare.bias.data.zero_()
    close((rows @ w.mT).square().sum(), bare(x).square().sum())


def covariance(rows: Tensor) -> Tensor:
    c = rows.mT @ rows
    return c + 0.01 * c.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(c.shape[-1], dtype=c.dtype)


@pytest.mark.parametrize("layout", ["conv2d", "conv2d-groups", "transpose2d-groups", "embedding", "experts"])
def test_corda_on_other_layouts(layout: str) -> None:
    """Against the paper's formula, from the inputs of each matrix."""
    on = BY_NAME[layout]
    model = on.model(torch.float32)
    config = inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights="corda", **on.targets)
    example = on.example(torch.float32)
    seen: dict[str, Tensor] = {}
    if layout == "experts":
        x, choice, _ = example
        seen["host.gate_up_proj"] = torch.stack([F.pad(r := x[(choice == i).any(1)], (0, 0, 0, len(x) - len(r))) for i in range(3)])
    elif layout == "embedding":
        seen["host"] = F.one_hot(example[0].flatten(), 9).float()
    else:
        site = site_of(model.host)
        assert site is not None
        seen["host"] = multiplied(site, example[0])
    if layout == "experts":
        model.host.config._experts_implementation = "eager"
    inlay.preprocess_corda(model, config, lambda: model(*example))
    attach(model, config, "a")
    for p in adapters(model):
        if p.path not in seen and layout == "experts":
            continue
        rows = seen.get(p.path, next(iter(seen.values()))).double()
        largest = rows.amax((-2, -1), keepdim=True) if layout == "experts" else rows.max()
        w, c = p.site.read()[0].double(), covariance(rows / largest.abs())
        r = 1 if "groups" in layout else 2
        u, s, vh = torch.linalg.svd(w @ c, full_matrices=False)
        expected = u[..., :r] * s[..., None, :r] @ vh[..., :r, :] @ c.inverse()
        a, b = (t.double() for t in p.method.joined(p.site, *p.method.tensors(p)))
        torch.testing.assert_close(p.method.scaling * b @ a, expected, rtol=1e-3, atol=1e-4)


class Seeing(nn.Module):
    """Convolutions of several kinds before a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.conv, self.grouped = nn.Conv2d(3, 8, 3, stride=2), nn.Conv2d(8, 6, 2, groups=2)
        self.up, self.head = nn.ConvTranspose2d(6, 4, 2), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(torch.tanh(self.grouped(torch.tanh(self.conv(x))))).mean((-1, -2)))


@pytest.mark.parametrize("rho", [1.0, 2.0])
@pytest.mark.parametrize("method", ["lora", "dylora", "locon-gated"])
def test_eva_on_convolutions(method: str, rho: float) -> None:
    model = Seeing()
    # Images of one colour each, and a little noise: the directions are those of the channels.
    sizes, data = torch.tensor([4.0, 2, 1])[:, None, None], []
    for i in range(3):
        generator = torch.Generator().manual_seed(i)
        colours, noise = torch.randn(32, 3, 1, 1, generator=generator), torch.randn(32, 3, 9, 9, generator=generator)
        data.append({"x": sizes * colours + noise / 10})
    before = model(data[0]["x"])
    options: dict[str, Any] = {"target_modules": ["conv", "grouped", "up", "head"], "eva_config": inlay.EvaConfig(rho=rho)}
    lora = inlay.LoraConfig(r=2, lora_alpha=3, init_lora_weights="eva", **options)
    config = lora if method == "lora" else METHODS[method]("eva", **options)
    wrapped = inlay.get_peft_model(model, config)
    inlay.initialize_lora_eva_weights(wrapped, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)
    torch.testing.assert_close(model(data[0]["x"]), before, rtol=1e-5, atol=1e-5)
    found = {p.path: p for p in adapters(model)}
    ranks = {path: p.method.rank_at(p.site) for path, p in found.items()}
    # Groups share their rank, so it stays; elsewhere the budget goes where it explains most.
    grouped = 1 if method == "lora" else 2
    assert ranks["grouped"] == grouped
    assert sum(r for path, r in ranks.items() if path != "grouped") == 6
    assert config.rank_pattern == {path: r for path, r in ranks.items() if r != 2 and path != "grouped"}
    if rho > 1:
        return
    assert set(ranks) == {"conv", "grouped", "up", "head"}
    p = found["conv"]
    rows = torch.cat([multiplied(p.site, batch["x"]) for batch in data]).double()
    vh = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)[2][: ranks["conv"]]
    a, _ = p.method.joined(p.site, *p.method.tensors(p))
    if method != "locon-gated":
        assert ((F.normalize(a.double(), dim=1) @ vh.mT).square().sum(1) > 0.95).all()


def test_eva_leaves_embeddings_alone() -> None:
    on = BY_NAME["tied"]
    model = on.model(torch.float32)
    config = inlay.LoraConfig(r=2, init_lora_weights="eva", target_modules=["host", "head"])
    wrapped = inlay.get_peft_model(model, config)
    with pytest.warns(UserWarning, match="host, .*each direction would be a single token"):
        inlay.initialize_lora_eva_weights(wrapped, [{"ids": on.example()[0]}], prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None)


# ---- LoRA-GA on weights that are no parameters -----------------------------------------------------------------------------
def gradients(model: nn.Module, config: Any, step: Callable[[], object]) -> dict[str, Tensor]:
    """What `preprocess_loraga` leaves on the layers, by name."""
    inlay.preprocess_loraga(model, config, step)
    return {f"{n}.{k}": v for n, m in model.named_modules() for k, v in vars(m).items() if k.startswith("_peft_loraga_grad")}


def ga(**options: Any) -> Any:
    return inlay.LoraConfig(r=2, init_lora_weights="lora_ga", lora_ga_config=inlay.LoraGAConfig(), **options)


def bits4() -> nn.Module:
    import bitsandbytes as bnb

    model = nn.Sequential(bnb.nn.Linear4bit(64, 128, quant_type="nf4", compute_dtype=torch.float32), nn.Tanh(), nn.Linear(128, 64))
    torch.manual_seed(0)
    model.load_state_dict(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)).state_dict())
    return model.to("cpu")


def int8() -> nn.Module:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    quantize_(model, Int8WeightOnlyConfig())
    return model


def own() -> nn.Module:
    torch.manual_seed(0)
    return inlay.quantize_(nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64)), "nf4")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("build", [bits4, int8, own])
def test_the_gradient_is_that_of_the_dense_weight(build: Callable[[], nn.Module]) -> None:
    """The mean over two backward passes, on what the stored weight stands for."""
    model = build()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    dense = nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64))
    for i in (0, 2):
        site = site_of(model[i])
        assert site is not None
        w, b = site.read()
        dense[i].weight.data, dense[i].bias.data = w.detach().float().clone(), b.detach().float().clone()  # type: ignore[union-attr]

    def step(on: nn.Module) -> None:
        for rows in x.split(3):
            on(rows).square().sum().backward()

    found = gradients(model, ga(target_modules=["0", "2"]), lambda: step(model))
    expected = gradients(dense, ga(target_modules=["0", "2"]), lambda: step(dense))
    assert found.keys() == expected.keys() == {"0._peft_loraga_grad", "2._peft_loraga_grad"}
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-5)
    assert all(q.grad is None for q in model.parameters())
    before = model(x)
    attach(model, ga(target_modules=["0", "2"]), "a")
    assert torch.equal(model(x), before)


@pytest.mark.filterwarnings("ignore")
def test_the_gradient_of_quantised_experts() -> None:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    torch.manual_seed(1)
    host = experts(MixtralExperts, MixtralConfig, "eager")
    for q in host.parameters():
        q.data = torch.randn(q.shape) / 2
    model = inlay.quantize_(Model(host), "nf4")
    example = BY_NAME["experts"].example(torch.float32)
    config = ga(target_modules=[], target_parameters=["host.gate_up_proj"])
    held = model.host.gate_up_proj
    found = gradients(model, config, lambda: model(*example).square().sum().backward())
    assert model.host.gate_up_proj is held
    dense = inlay.dequantize_(copy.deepcopy(model))
    expected = gradients(dense, config, lambda: dense(*example).square().sum().backward())
    for name, g in found.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-5, atol=1e-5)
