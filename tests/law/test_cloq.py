"""Starts on a quantised base: what the factors make up for, by the mathematics, for every backend that is installed."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay import LoraConfig, get_peft_model, initialize_lora_cloq_weights, quantize_, replace_lora_weights_loftq
from inlay.core.adapter import Adapter
from inlay.core.attach import attach
from inlay.initializers import cloq
from inlay.initializers.compensation import best_factors, weighted

from .. import tiny
from .backends import BACKENDS, SETTINGS
from .layouts import Model
from .support import BY_NAME, adapter_places, adapters
from .test_backends import dense

ALL = BACKENDS | SETTINGS
SCALING = 1.5


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual.double(), expected.double(), rtol=tolerance, atol=tolerance)


def product(p: Adapter) -> Tensor:
    a, b = (getattr(p, n) for n in p.method.names(p.site))  # type: ignore[attr-defined]
    return p.method.scaling * (b @ a).detach().double()  # type: ignore[attr-defined]


# ---- the closed form ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(6, 8), (8, 6), (3, 6, 8)])
def test_the_papers_formula(shape: tuple[int, ...]) -> None:
    """The best approximation of ``E R``, with the root undone (arXiv 2501.18475, theorem 3.1)."""
    lost, x = drawn(*shape), drawn(*shape[:-2], 40, shape[-1], seed=2)
    root = torch.linalg.cholesky(x.mT @ x)
    u, s, vh = torch.linalg.svd(lost @ root)
    wanted = (u[..., :3] * s[..., None, :3]) @ vh[..., :3, :] @ torch.linalg.inv(root)
    a, b = best_factors(lost, 3, SCALING, root)
    close(SCALING * b @ a, wanted, 1e-10)
    close(a.norm(dim=-1), b.norm(dim=-2), 1e-10)


@pytest.mark.parametrize("samples", [40, 3])
def test_no_descent_finds_better(samples: int) -> None:
    lost, x = drawn(6, 8), drawn(samples, 8, seed=2)
    root = x.mT / samples**0.5
    a, b = best_factors(lost, 2, 1.0, root)
    least = weighted(lost - b @ a, root).norm()
    for seed in range(3):
        # Three samples can be met exactly by rank 2 only up to one of their directions.
        found = [drawn(2, 8, seed=seed).requires_grad_(), drawn(6, 2, seed=seed + 9).requires_grad_()]
        search = torch.optim.LBFGS(found, max_iter=300, line_search_fn="strong_wolfe", tolerance_grad=1e-12, tolerance_change=1e-14)

        def loss(found: list[Tensor] = found, search: Any = search) -> Tensor:
            search.zero_grad()
            value = weighted(lost - found[1] @ found[0], root).square().sum()
            value.backward()
            return value

        search.step(loss)
        assert loss().detach().sqrt() > least * (1 - 1e-6)


def test_a_diagonal_is_the_matrix_that_it_stands_for() -> None:
    lost, h = drawn(6, 8), drawn(8).square()
    for one, other in zip(best_factors(lost, 2, 1.0, cloq.root(h)), best_factors(lost, 2, 1.0, cloq.root(h.diag())), strict=True):
        close(one.abs(), other.abs(), 1e-9)


# ---- backends -------------------------------------------------------------------------------------------------------------
def inputs() -> Tensor:
    """Some directions are ten times as long as others, as in trained models."""
    x = torch.randn(96, 128, generator=torch.Generator().manual_seed(3))
    return x * torch.logspace(-0.5, 0.5, 128)[torch.randperm(128, generator=torch.Generator().manual_seed(4))]


def on(backend: str) -> Any:
    host = (
        quantize_(nn.Sequential(dense()), backend.removeprefix("inlay-"), skip=[])[0]
        if backend.startswith("inlay-")
        else ALL[backend](dense())
    )
    return Model(host).requires_grad_(False)


def original() -> nn.Module:
    return Model(dense())


def started(backend: str, how: str, iterations: int = 1) -> tuple[float, float, Any]:
    """What is left of the weight and of the outputs on the calibration data."""
    model = get_peft_model(on(backend), LoraConfig(r=8, lora_alpha=12, target_modules=["host"]))
    if how == "loftq":
        done: list[tuple[int, ...]] = []
        replace_lora_weights_loftq(model, original(), iterations=iterations, progress=lambda *counts: done.append(counts))
        assert done == [(1, 1)]
    elif how == "cloq":
        initialize_lora_cloq_weights(model, original(), [inputs()], iterations=iterations)
    (p,) = adapters(model.get_base_model())
    w = p.site.read()[0].double() + product(p)
    left = dense().weight.detach().double() - w
    return float(left.norm()), float((inputs().double() @ left.mT).norm()), p


OWN = ["inlay-nf4", "inlay-fp4", "inlay-int4", "inlay-int8"]


@pytest.mark.parametrize("backend", [*OWN, *ALL])
def test_less_is_left_on_every_backend(backend: str) -> None:
    plain, loftq, calibrated = started(backend, "plain"), started(backend, "loftq"), started(backend, "cloq")
    # Of the weight LoftQ leaves least, of the outputs CLoQ does.
    assert loftq[0] <= calibrated[0] < plain[0]
    assert calibrated[1] < 0.93 * loftq[1] < 0.93 * plain[1]
    lost = dense().weight.detach().double() - loftq[2].site.read()[0].double()
    torch.testing.assert_close(loftq[0], float(torch.linalg.svdvals(lost)[8:].norm()), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["loftq", "cloq"])
@pytest.mark.parametrize("backend", [*OWN, *ALL])
def test_alternating_on_every_backend(backend: str, how: str) -> None:
    """The weight is quantised again of what the factors left over; the model computes with the new one."""
    once, often = started(backend, how), started(backend, how, iterations=4)
    at = 0 if how == "loftq" else 1
    assert often[at] <= once[at]
    if backend.split("-")[1] in ("nf4", "fp4", "int4"):
        assert often[at] < 0.97 * once[at]
    p = often[2]
    host: Any = p.site.module
    x, (w, b) = torch.randn(3, 128), p.site.read()
    expected = torch.nn.functional.linear(x.double(), w.double() + product(p), None if b is None else b.double())
    rounds_inputs = backend in ("torchao-int8-dynamic", "bitsandbytes-int8")
    close(host(x), expected, 0.1 if rounds_inputs else 2e-4)


def test_the_paper_of_loftq_step_by_step() -> None:
    w = dense().weight.detach()
    q = on("inlay-nf4").host.weight.dequantize()
    best = float("inf")
    for _ in range(3):
        u, s, vh = torch.linalg.svd((w - q).double(), full_matrices=False)
        change = (u[:, :8] * s[:8] @ vh[:8]).float()
        best = min(best, float((w - q - change).norm()))
        again = nn.Linear(128, 64)
        again.weight.data.copy_(w - change)
        stored: Any = quantize_(again, "nf4", skip=[]).weight
        q = stored.dequantize()
    assert started("inlay-nf4", "loftq", 3)[0] == pytest.approx(best, rel=1e-4)


def test_a_refused_layer_keeps_its_base_and_its_factors() -> None:
    model = get_peft_model(on("inlay-nf4"), LoraConfig(r=8, target_modules=["host"]))
    (p,) = adapters(model.get_base_model())
    codes, start = p.site.read()[0].clone(), p.lora_A.detach().clone()
    replace_lora_weights_loftq(model, original(), callback=lambda *_: False, iterations=3)
    assert torch.equal(p.site.read()[0], codes)
    assert torch.equal(p.lora_A, start)
    assert not p.lora_B.any()


# ---- layouts --------------------------------------------------------------------------------------------------------------
LAYOUTS = ["linear", "conv1d-gpt2", "embedding", "experts", "experts-transposed"]


def met(layout: str, name: str, example: tuple[Tensor, ...]) -> Tensor:
    """What the first matrix of a host multiplies, ``(*batch, rows, in)``: rows that an expert is not given are zero."""
    x = example[0]
    if layout == "embedding":
        return nn.functional.one_hot(x.flatten(), 9).double()
    if not layout.startswith("experts"):
        return x.flatten(0, -2).double()
    return torch.stack([x.double() * (example[1] == e).any(-1, keepdim=True) for e in range(3)])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    found = {}
    for how in ("plain", "loftq", "cloq"):
        model, exact = quantize_(BY_NAME[layout].model(torch.float32), "nf4", skip=[], block=16), BY_NAME[layout].model(torch.float32)
        torch.manual_seed(2)
        example = BY_NAME[layout].example(torch.float32)
        attach(model, LoraConfig(r=2, lora_alpha=3, **BY_NAME[layout].targets), "default")
        if how == "loftq":
            replace_lora_weights_loftq(model, exact)
        elif how == "cloq":
            initialize_lora_cloq_weights(model, exact, lambda model=model, example=example: model(*example), damping=1e-9)
        for p in adapters(model):
            w = p.site.matrix(exact.get_parameter(f"host.{p.site.name}")).double()
            left = w.detach() - p.site.read()[0].double() - (product(p) if how != "plain" else 0)
            if p.site.name != "down_proj":
                found[how, p.site.name] = float((met(layout, p.site.name, example) @ left.mT).norm())
            found[how, "weight", p.site.name] = float(left.norm())
    for name in {key[-1] for key in found}:
        assert found["loftq", "weight", name] < found["plain", "weight", name]
        assert found["loftq", "weight", name] < found["cloq", "weight", name]
        if name != "down_proj":
            assert found["cloq", name] < found["loftq", name]


@pytest.mark.parametrize("layout", ["experts", "experts-transposed"])
def test_the_inputs_of_experts(layout: str) -> None:
    """Each expert's own, of both its matrices; and the host is as it was afterwards."""
    model: Any = quantize_(BY_NAME[layout].model(torch.float32), "int8", skip=[])
    example = BY_NAME[layout].example(torch.float32)
    before, held, way = model(*example), model.host.gate_up_proj, model.host.config._experts_implementation
    attach(model, LoraConfig(r=2, **BY_NAME[layout].targets), "default")
    sites = {p.site.name: p.site for p in adapters(model)}
    moments = cloq.second_moments(model, sites, lambda: model(*example))
    x, chosen, _ = example
    for e in range(3):
        rows = x[(chosen == e).any(-1)].double()
        close(moments["gate_up_proj"][e], rows.mT @ rows)
    assert moments["down_proj"].shape == (3, 6, 6)
    assert model.host._parameters["gate_up_proj"] is held
    assert model.host.config._experts_implementation == way
    close(model(*example), before)


# ---- inputs ---------------------------------------------------------------------------------------------------------------
def test_little_memory_changes_nothing() -> None:
    found = []
    for memory in (1, 2**31):
        torch.manual_seed(0)
        w = [nn.Linear(128, 128), nn.Linear(128, 64)]
        model, passes = get_peft_model(quantize_(nn.Sequential(*w), "nf4", skip=[]), LoraConfig(r=4, target_modules=["0", "1"])), []

        def run(model: nn.Module = model, passes: list[int] = passes) -> None:
            passes.append(1)
            model(inputs())

        torch.manual_seed(0)
        initialize_lora_cloq_weights(model, nn.Sequential(nn.Linear(128, 128), nn.Linear(128, 64)), run, memory=memory)
        assert len(passes) == (2 if memory == 1 else 1)
        found.append([product(p) for p in adapters(model.get_base_model())])
    # The second layer sees what the first one gave before it was started, in either case.
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def llama() -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    return tiny.llama(1, seed=0, **sizes, max_position_embeddings=24)


def test_padding_does_not_count() -> None:
    model = quantize_(llama(), "nf4")
    attach(model, LoraConfig(r=2, target_modules="all-linear"), "default")
    sites = {p.path: p.site for p in adapters(model)}
    ids = torch.arange(1, 13).view(2, 6)
    padded, mask = torch.cat((ids, torch.zeros_like(ids)), 1), torch.cat((torch.ones_like(ids), torch.zeros_like(ids)), 1)
    short = cloq.second_moments(model, sites, cloq.running(model, [{"input_ids": ids}]))
    long = cloq.second_moments(model, sites, cloq.running(model, [{"input_ids": padded, "attention_mask": mask}]))
    assert short.keys() == long.keys() == sites.keys()
    for name, moments in short.items():
        close(long[name], moments)
    # Layers with one input have their sum in common.
    q, k, o = (short[f"model.layers.0.self_attn.{n}_proj"] for n in "qko")
    assert q is k
    assert q is not o


def test_a_stream_of_batches_is_kept_for_all_passes() -> None:
    model = get_peft_model(quantize_(llama(), "nf4"), LoraConfig(r=2, target_modules="all-linear"))
    stream = ({"input_ids": torch.arange(1, 13).view(2, 6)} for _ in range(2))
    initialize_lora_cloq_weights(model, llama(), stream, memory=1)
    assert all(p.lora_B.any() for p in adapters(model.get_base_model()))


def test_the_models_own_samples() -> None:
    """Nothing but the model is needed, the same tokens come out, and the drawing of others goes on as if there had been none."""
    exact = llama()
    model = get_peft_model(quantize_(llama(), "nf4"), LoraConfig(r=4, target_modules="all-linear"))
    base, state = model.get_base_model(), torch.get_rng_state()
    one, other = cloq.own_samples(base, rows=10), cloq.own_samples(base, rows=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert [b["input_ids"].shape for b in one] == [(8, 24), (2, 24)]
    assert all(torch.equal(a["input_ids"], b["input_ids"]) for a, b in zip(one, other, strict=True))
    x = torch.randint(0, 32, (8, 24))
    with torch.no_grad():
        wanted, plain = exact(input_ids=x).logits, model.eval()(input_ids=x).logits
        initialize_lora_cloq_weights(model, exact)
        assert (model(input_ids=x).logits - wanted).norm() < 0.8 * (plain - wanted).norm()


def test_an_encoder_reads_tokens_at_random() -> None:
    from transformers import BertConfig, BertModel

    sizes: dict[str, Any] = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 30}
    model = BertModel(BertConfig(**sizes, max_position_embeddings=16))
    (first, *_) = cloq.own_samples(model, rows=4)
    assert first["input_ids"].shape == (4, 16)
    assert len(first["input_ids"].unique()) > 15
    with pytest.raises(ValueError, match=r"Give `calibration`: .* `replace_lora_weights_loftq` needs no data"):
        cloq.own_samples(original())


# ---- the report -------------------------------------------------------------------------------------------------------------
def test_the_report_is_what_the_starts_leave() -> None:
    model, held = on("inlay-nf4"), torch.randn(40, 128, generator=torch.Generator().manual_seed(8))
    report = inlay.start_errors(model, original(), [inputs()], [held], rank=8)
    (layer,) = report.layers
    w = dense().weight.detach().double()
    for how in ("plain", "loftq", "cloq"):
        left, _, p = started("inlay-nf4", how)
        outputs = held.double() @ (w - p.site.read()[0].double() - product(p)).mT
        assert layer.weight[how] == pytest.approx(left / float(w.norm()), rel=1e-4)
        assert layer.output[how] == pytest.approx(float(outputs.norm() / (held.double() @ w.mT).norm()), rel=1e-4)
    assert report.output == layer.output
    assert report.measured_on == "held out"


@pytest.mark.parametrize("memory", [1, 2**31])
def test_the_report_covers_stacks_and_embeddings_without_adapters(memory: int) -> None:
    for layout, names in (
        ("experts", {"host.gate_up_proj", "host.down_proj"}),
        ("embedding", {"host.weight"}),
        ("conv1d-gpt2", {"host.weight"}),
    ):
        model, exact = quantize_(BY_NAME[layout].model(torch.float32), "nf4", skip=[], block=16), BY_NAME[layout].model(torch.float32)
        example = BY_NAME[layout].example(torch.float32)
        report = inlay.start_errors(model, exact, lambda model=model, example=example: model(*example), rank=2, damping=1e-9, memory=memory)
        assert {layer.name for layer in report.layers} == names
        assert report.measured_on == "calibration"
        for layer in report.layers:
            assert layer.output["cloq"] < min(layer.output["loftq"], layer.output["plain"])
            assert layer.weight["loftq"] < min(layer.weight["cloq"], layer.weight["plain"])
        mean = sum(layer.output["cloq"] ** 2 for layer in report.layers) / len(report.layers)
        assert report.output["cloq"] == pytest.approx(mean**0.5)
    with pytest.raises(ValueError, match="No layer of the model is quantised"):
        inlay.start_errors(original(), original(), [inputs()])


# ---- other methods, and what is refused --------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "config",
    [
        LoraConfig(r=8, use_dora=True),
        LoraConfig(r=8, use_rslora=True),
        LoraConfig(r=8, use_rslora=True, use_dora=True),
        LoraConfig(r=8, velora_config={"num_groups": 4}),
        inlay.DyLoraConfig(r=8),
        inlay.LoConConfig(r=8),
        inlay.AdaLoraConfig(init_r=8, target_r=4, total_step=10),
    ],
    ids=lambda config: type(config).__name__,
)
def test_every_method_with_free_factors_starts_from_the_same_weight(config: Any) -> None:
    model: Any = get_peft_model(on("inlay-nf4"), replace(config, target_modules=["host"])).eval()
    initialize_lora_cloq_weights(model, original(), [inputs()])
    (p,) = adapters(model.get_base_model())
    a, b = p.method.factors(p)  # type: ignore[attr-defined]
    wanted = p.site.read()[0].double() + p.method.scaling * (b @ a).detach().double()  # type: ignore[attr-defined]
    close(model(torch.eye(128)), wanted.mT + model.get_base_model().host.bias.double(), 1e-4)
    left = (inputs().double() @ (dense().weight.detach().double() - wanted).mT).norm()
    assert float(left) == pytest.approx(started("inlay-nf4", "cloq")[1], rel=1e-4)


@pytest.mark.parametrize(
    "options", [{"use_qalora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "mica"}, {"kasa_config": {}}, {"ia3": True}]
)
def test_methods_without_free_factors(options: dict[str, Any]) -> None:
    config: Any = inlay.IA3Config(target_modules=["host"], feedforward_modules=[])
    if "ia3" not in options:
        config = LoraConfig(r=8, target_modules=["host"], **options)
    model = get_peft_model(on("inlay-nf4"), config)
    before = {n: q.detach().clone() for n, q in model.named_parameters() if q.requires_grad}
    for start in (replace_lora_weights_loftq, lambda m, w: initialize_lora_cloq_weights(m, w, [inputs()])):
        with pytest.raises(ValueError, match="'host' cannot start from what quantising lost: .* no product of free factors"):
            start(model, original())
    with pytest.raises(ValueError, match="cannot start from what quantising lost"):
        replace_lora_weights_loftq(model, original(), iterations=3)
    (place,) = adapter_places(model.get_base_model())
    assert torch.equal(place.site.read()[0], on("inlay-nf4").host.weight.dequantize())
    assert all(torch.equal(q, before[n]) for n, q in model.named_parameters() if n in before)


def test_what_is_refused() -> None:
    config = LoraConfig(r=8, target_modules=["host"])
    with pytest.raises(ValueError, match="No layer of adapter 'default' is quantised, so nothing was lost"):
        initialize_lora_cloq_weights(get_peft_model(original(), config), original(), [inputs()])
    model = get_peft_model(on("inlay-nf4"), config)
    with pytest.raises(ValueError, match="'host.weight' met no input in the calibration"):
        initialize_lora_cloq_weights(model, original(), lambda: None)
    with pytest.raises(ValueError, match="inputs of 'host.weight' in the calibration are not finite"):
        initialize_lora_cloq_weights(model, original(), [inputs() / 0])
    with pytest.raises(ValueError, match="The original model has no weight 'host.weight'"):
        initialize_lora_cloq_weights(model, nn.Linear(2, 2), [inputs()])
    with pytest.raises(ValueError, match=r"host.weight is of shape \(2, 2\) originally and of \(64, 128\)"):
        initialize_lora_cloq_weights(model, Model(nn.Linear(2, 2)), [inputs()])
    with warnings.catch_warnings():
        # It does nothing yet, so nothing is quantised again.
        warnings.simplefilter("error")
        model.merge_adapter()
    with pytest.raises(ValueError, match="'host' has default merged into it; call `unmerge_adapter`"):
        initialize_lora_cloq_weights(model, original(), [inputs()])


@pytest.mark.usefixtures("_no_writing")
def test_a_base_that_cannot_be_quantised_again() -> None:
    with pytest.raises(ValueError, match="'host' cannot be quantised a second time: it cannot. Use iterations=1"):
        started("inlay-nf4", "loftq", 2)
    assert started("inlay-nf4", "loftq")[0] > 0


@pytest.fixture
def _no_writing(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.stores.own import Own

    monkeypatch.setattr(Own, "unwritable", lambda *_: "it cannot.")
