"""Starts of LoRA against the real library: the same numbers, and files both ways."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import sys
import types
import warnings
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import loraga as peft_loraga
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.core.adapter import Adapter
from inlay.core.inlaid import places

from .models import MODELS
from .support import WEIGHTS, both_ways, close, jitter, outputs, same_steps

# The real library takes `dataclass` from a package that it does not ask for.
sys.modules.setdefault("attr", types.SimpleNamespace(dataclass=dataclasses.dataclass))  # type: ignore[arg-type]
peft_corda = importlib.import_module("peft.tuners.lora.corda")

LAYERS = {"target_modules": ["q_proj", "down_proj", "up_proj"]}
FROM_THE_WEIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "pissa": ("llama", {"init_lora_weights": "pissa"}),
    "pissa-patterns": ("llama", {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}}),
    "pissa-dora": ("llama", {"init_lora_weights": "pissa", "use_dora": True}),
    "pissa-gpt2": ("gpt2", {"init_lora_weights": "pissa", "target_modules": ["c_attn"], "fan_in_fan_out": True}),
    "pissa-bert": ("bert", {"init_lora_weights": "pissa", "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"}),
    "olora": ("llama", {"init_lora_weights": "olora"}),
    "olora-dora": ("llama", {"init_lora_weights": "olora", "use_dora": True}),
    "mica": ("llama", {"init_lora_weights": "mica"}),
    "mica-embedding": ("llama", {"init_lora_weights": "mica", "target_modules": ["embed_tokens", "q_proj"]}),
    "eva": ("llama", {"init_lora_weights": "eva"}),
    "orthogonal": ("llama", {"init_lora_weights": "orthogonal"}),
}


def options(case: str) -> tuple[str, dict[str, Any]]:
    model, chosen = FROM_THE_WEIGHT[case]
    return model, {"r": 4, "lora_alpha": 7, **LAYERS, **chosen}


@pytest.mark.parametrize("case", FROM_THE_WEIGHT)
def test_both_ways(case: str, tmp_path: Path) -> None:
    model, chosen = options(case)
    both_ways(model, "LoraConfig", tmp_path, **chosen)


@pytest.mark.parametrize("case", ["pissa", "pissa-dora", "pissa-gpt2", "olora", "mica"])
def test_the_same_steps(case: str, tmp_path: Path) -> None:
    model, chosen = options(case)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        same_steps(model, "LoraConfig", tmp_path, **chosen)


def adapters(model: nn.Module) -> dict[str, Adapter]:
    return {p.path: p for place in places(model.get_base_model()) for p in place.adapters.values() if isinstance(p, Adapter)}  # type: ignore[operator]


def factors(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """A and B of the real library by layer."""
    return {
        name.removeprefix("base_model.model."): (m.lora_A["default"].weight.detach(), m.lora_B["default"].weight.detach())
        for name, m in model.named_modules()
        if hasattr(m, "lora_A") and "default" in m.lora_A
    }


@pytest.mark.parametrize("init", ["pissa", "olora", "mica"])
def test_same_start(init: str) -> None:
    """The vectors themselves, up to the sign that each pair of them leaves open."""
    build, _ = MODELS["llama"]
    chosen = {"r": 4, "lora_alpha": 7, **LAYERS, "init_lora_weights": init}
    theirs, ours = peft.get_peft_model(build(), peft.LoraConfig(**chosen)), inlay.get_peft_model(build(), inlay.LoraConfig(**chosen))
    for path, (a, b) in factors(theirs).items():
        p = adapters(ours)[path]
        torch.testing.assert_close(p.lora_B @ p.lora_A, b @ a, rtol=1e-4, atol=1e-5)
        same_up_to_signs(p.lora_A, a)
        same_up_to_signs(p.lora_B.mT, b.mT)


def same_up_to_signs(ours: Tensor, theirs: Tensor, tolerance: float = 1e-4) -> None:
    signs = (ours * theirs).sum(-1, keepdim=True).sign()
    torch.testing.assert_close(ours * signs.where(signs != 0, 1.0), theirs, rtol=1e-3, atol=tolerance)


def test_randomised_pissa_is_no_worse_than_theirs() -> None:
    build, example = MODELS["llama"]
    chosen = {"r": 4, "lora_alpha": 7, **LAYERS, "init_lora_weights": "pissa_niter_16"}
    torch.manual_seed(0)
    theirs, ours = peft.get_peft_model(build(), peft.LoraConfig(**chosen)), inlay.get_peft_model(build(), inlay.LoraConfig(**chosen))
    for path, (a, b) in factors(theirs).items():
        p = adapters(ours)[path]
        w = p.site.read()[0]
        best = torch.linalg.svdvals(w)[4:].norm()
        error, its = ((w - 7 / 4 * product).norm() for product in (p.lora_B @ p.lora_A, b @ a))
        assert best * (1 - 1e-5) < error < its * (1 + 1e-3)
    close(outputs(ours, example()), outputs(build(), example()))


def test_randomised_pissa_comes_back_from_its_file(tmp_path: Path) -> None:
    """In the real library it does not: the residual is drawn anew when the file is loaded."""
    build, example = MODELS["llama"]
    ours = inlay.get_peft_model(build(), inlay.LoraConfig(r=4, **LAYERS, init_lora_weights="pissa_niter_1"))
    jitter(ours)
    ours.save_pretrained(tmp_path)
    assert {k.split(".")[-2] for k in load_file(tmp_path / WEIGHTS)} == {"lora_A", "lora_B"}
    torch.manual_seed(99)
    again = inlay.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(outputs(again, example()), outputs(ours, example()))


# ---- from data ------------------------------------------------------------------------------------------------------------
def batches(count: int = 12, rows: int = 1, length: int = 16) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(11)
    return [{"input_ids": torch.randint(0, 40, (rows, length), generator=generator)} for _ in range(count)]


def run(model: nn.Module) -> Callable[[], None]:
    def go() -> None:
        for batch in batches():
            model(**batch)

    return go


def learn(model: nn.Module) -> Callable[[], None]:
    def go() -> None:
        for batch in batches(3, 2, 8):
            model(**batch, labels=batch["input_ids"]).loss.backward()

    return go


def config(library: Any, init: str, **more: Any) -> Any:
    extra = {}
    if init == "corda":
        extra["corda_config"] = (peft.tuners.lora.config.CordaConfig if library is peft else inlay.CordaConfig)(**more.pop("corda", {}))
    if init == "lora_ga":
        extra["lora_ga_config"] = library.LoraGAConfig(**more.pop("lora_ga", {}))
    return library.LoraConfig(**{"r": 2, "lora_alpha": 3, **LAYERS, "init_lora_weights": init, **extra, **more})


def prepared(library: ModuleType, name: str, init: str, **more: Any) -> tuple[nn.Module, Any]:
    """A base that has seen the data."""
    model, chosen = MODELS[name][0](), config(library, init, **more)
    if init == "corda":
        (peft_corda if library is peft else inlay).preprocess_corda(model, chosen, run(model))
    else:
        (peft_loraga if library is peft else inlay).preprocess_loraga(model, chosen, learn(model))
    return model, chosen


GPT2 = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
# LoRA-GA's "stable" scale takes the wrong side of a Conv1D for its outputs in the real library.
DATA: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ipm": ("llama", "corda", {}),
    "kpm": ("llama", "corda", {"corda": {"corda_method": "kpm"}}),
    "corda-dora": ("llama", "corda", {"use_dora": True}),
    "corda-gpt2": ("gpt2", "corda", GPT2),
    "lora-ga": ("llama", "lora_ga", {}),
    "lora-ga-alternating": ("llama", "lora_ga", {"lora_ga": {"direction": "ArBr", "scale": "gd_scale"}}),
    "lora-ga-reversed": ("llama", "lora_ga", {"lora_ga": {"direction": "A2rBr", "scale": "unit"}, "use_rslora": True}),
    "lora-ga-by-weight": ("llama", "lora_ga", {"lora_ga": {"scale": "weight_svd"}}),
    "lora-ga-gpt2": ("gpt2", "lora_ga", {"lora_ga": {"scale": "unit"}, **GPT2}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", DATA)
def test_from_data(case: str, tmp_path: Path) -> None:
    name, init, more = DATA[case]
    build, example = MODELS[name]
    base = outputs(build(), example())

    theirs = peft.get_peft_model(*prepared(peft, name, init, **copy.deepcopy(more)))
    ours = inlay.get_peft_model(*prepared(inlay, name, init, **copy.deepcopy(more)))
    assert torch.equal(outputs(ours, example()), base)
    for path, (a, b) in factors(theirs).items():
        p = adapters(ours)[path]
        # The real library approximates the gradient's singular vectors by a random sketch, and the weight's largest value too.
        rough = 1e-3 if init == "corda" else 0.02
        same_up_to_signs(p.lora_A, a, rough * float(a.abs().max()))
        same_up_to_signs(p.lora_B.mT, b.mT, rough * float(b.abs().max()))

    jitter(theirs)
    expected = outputs(theirs, example())
    assert not torch.allclose(expected, base, rtol=1e-3, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs")
    seen, _ = prepared(inlay, name, init, **copy.deepcopy(more))
    if init == "corda":
        # A file of theirs, on a base that has seen the same data.
        loaded = inlay.PeftModel.from_pretrained(seen, tmp_path / "theirs")
        torch.testing.assert_close(outputs(loaded, example()), expected, rtol=1e-4, atol=1e-4)
    else:
        # The signs of the vectors were anyone's choice, so the same data do not tell the start again.
        with pytest.raises(ValueError, match="convert the adapter"):
            inlay.PeftModel.from_pretrained(seen, tmp_path / "theirs")

    # A file of ours holds the start: any base will do.
    jitter(ours)
    expected = outputs(ours, example())
    ours.save_pretrained(tmp_path / "ours")
    close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / "ours"), example()), expected)
    # The real library reads past it and needs the data.
    seen, _ = prepared(peft, name, init, **copy.deepcopy(more))
    read = peft.PeftModel.from_pretrained(seen, tmp_path / "ours")
    for path, (a, b) in factors(read).items():
        assert torch.equal(a, adapters(ours)[path].lora_A)
        assert torch.equal(b, adapters(ours)[path].lora_B)
    if init == "corda":
        torch.testing.assert_close(outputs(read, example()), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("init", ["corda", "lora_ga"])
@pytest.mark.filterwarnings("ignore")
def test_a_file_without_its_start(init: str, tmp_path: Path) -> None:
    build, example = MODELS["llama"]
    theirs = peft.get_peft_model(*prepared(peft, "llama", init))
    theirs.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="path_initial_model_for_weight_conversion"):
        inlay.PeftModel.from_pretrained(build(), tmp_path)
    # The remedy for those who kept the residual.
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"init_lora_weights": True}))
    residual = build()
    with torch.no_grad():
        for path, layer in ((n.removeprefix("base_model.model."), m) for n, m in theirs.named_modules() if hasattr(m, "lora_A")):
            residual.get_submodule(path).weight.copy_(layer.base_layer.weight)
    close(outputs(inlay.PeftModel.from_pretrained(residual, tmp_path), example()), outputs(build(), example()))


# ---- conversion -----------------------------------------------------------------------------------------------------------
CONVERTED: dict[str, dict[str, Any]] = {
    "pissa": {},
    "olora": {},
    "pissa-rs": {"use_rslora": True},
    "pissa-patterns": {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 5}},
    "corda": {},
    "lora_ga": {},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CONVERTED)
def test_conversion_to_plain_lora(case: str, tmp_path: Path) -> None:
    """The file of either library gives the same outputs in either, on the base as it is."""
    build, example = MODELS["llama"]
    init = case.partition("-")[0]

    def fresh(library: Any) -> Any:
        if init in ("corda", "lora_ga"):
            return library.get_peft_model(*prepared(library, "llama", init, **CONVERTED[case]))
        return library.get_peft_model(build(), config(library, init, **CONVERTED[case]))

    theirs = fresh(peft)
    theirs.peft_config["default"].init_lora_weights = True
    theirs.save_pretrained(tmp_path / "before")
    theirs.peft_config["default"].init_lora_weights = init
    jitter(theirs)
    expected = outputs(theirs, example())
    theirs.save_pretrained(tmp_path / "theirs", path_initial_model_for_weight_conversion=tmp_path / "before")
    close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / "theirs"), example()), expected)

    ours = fresh(inlay)
    jitter(ours)
    expected = outputs(ours, example())
    ours.save_pretrained(tmp_path / "ours", path_initial_model_for_weight_conversion=tmp_path / "nowhere")
    assert load_file(tmp_path / "ours" / WEIGHTS).keys() == load_file(tmp_path / "theirs" / WEIGHTS).keys()
    mine, its = (json.loads((tmp_path / who / "adapter_config.json").read_text()) for who in ("ours", "theirs"))
    for field in ("r", "lora_alpha", "init_lora_weights", "rank_pattern", "alpha_pattern"):
        assert mine[field] == pytest.approx(its[field]), field
    close(outputs(peft.PeftModel.from_pretrained(build(), tmp_path / "ours"), example()), expected)
    close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / "ours"), example()), expected)
    close(outputs(ours, example()), expected)


@pytest.mark.filterwarnings("ignore")
def test_conversion_of_an_adapter_that_does_not_know_its_start(tmp_path: Path) -> None:
    """Plain LoRA over a residual: the start is read from the folder that the real library asks for."""
    build, example = MODELS["llama"]
    plain = config(inlay, "gaussian")
    ours = inlay.get_peft_model(build(), plain)
    jitter(ours)
    start = {n: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for n, p in adapters(ours).items()}
    ours.save_pretrained(tmp_path / "before")
    jitter(ours)
    ours.save_pretrained(tmp_path / "after", path_initial_model_for_weight_conversion=str(tmp_path / "before"))
    loaded = inlay.PeftModel.from_pretrained(build(), tmp_path / "after")
    for path, p in adapters(loaded).items():
        now, (a, b) = adapters(ours)[path], start[path]
        close(p.method.delta(p), 1.5 * (now.lora_B @ now.lora_A - b @ a))
    assert torch.isfinite(outputs(loaded, example())).all()


@pytest.mark.filterwarnings("ignore")
def test_tied_embeddings(tmp_path: Path) -> None:
    build, example = MODELS["llama-tied"]
    chosen = inlay.LoraConfig(r=4, init_lora_weights="pissa", target_modules=["embed_tokens"], ensure_weight_tying=True)
    ours = inlay.get_peft_model(build(), chosen)
    close(outputs(ours, example()), outputs(build(), example()))
    jitter(ours)
    for path, converted in (("as-it-is", None), ("plain", "nowhere")):
        ours.save_pretrained(tmp_path / path, path_initial_model_for_weight_conversion=converted)
        close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / path), example()), outputs(ours, example()))
    close(outputs(peft.PeftModel.from_pretrained(build(), tmp_path / "plain"), example()), outputs(ours, example()))


# ---- EVA ------------------------------------------------------------------------------------------------------------------
def sloping(name: str = "llama") -> nn.Module:
    """A model whose activations have a spectrum that falls: the directions are then well determined."""
    model = MODELS[name][0]()
    with torch.no_grad():
        for q in model.parameters():
            if q.ndim == 2:
                q *= torch.logspace(0.6, -0.6, q.shape[-1])
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"eva": {"rho": 1.0}},
        {"eva": {"adjust_scaling_factors": False}},
        {"rank_pattern": {"down_proj": 3}},
        # Of layers with one input, the real library whitens the same directions once a layer.
        {"eva": {"whiten": True}, "target_modules": ["q_proj", "down_proj"]},
    ],
)
def test_eva(more: dict[str, Any], tmp_path: Path) -> None:
    more = {"target_modules": ["q_proj", "k_proj", "down_proj"], **more}
    eva = more.pop("eva", {})
    loader = batches(6, 4, 16)
    made = {}
    for library in (peft, inlay):
        chosen = library.LoraConfig(r=2, lora_alpha=3, init_lora_weights="eva", eva_config=library.EvaConfig(**eva), **more)
        made[library] = library.get_peft_model(sloping(), chosen)
        library.initialize_lora_eva_weights(made[library], loader, show_progress_bar=False)
    theirs, ours = made[peft], made[inlay]
    its, mine = theirs.peft_config["default"], ours.peft_config["default"]
    assert mine.rank_pattern == its.rank_pattern
    assert mine.alpha_pattern == pytest.approx(its.alpha_pattern)
    found = factors(theirs)
    assert adapters(ours).keys() == found.keys()
    for path, (a, b) in found.items():
        p = adapters(ours)[path]
        assert p.lora_B.shape == b.shape
        assert not p.lora_B.any()
        cosines = torch.nn.functional.cosine_similarity(p.lora_A, a).abs()
        assert (cosines > 0.99).all(), (path, cosines)
        torch.testing.assert_close(p.lora_A.norm(dim=-1), a.norm(dim=-1), rtol=0.01, atol=1e-4)
    example = MODELS["llama"][1]
    assert torch.equal(outputs(ours, example()), outputs(sloping(), example()))
    jitter(ours)
    ours.save_pretrained(tmp_path)
    close(outputs(peft.PeftModel.from_pretrained(sloping(), tmp_path), example()), outputs(ours, example()))
    close(outputs(inlay.PeftModel.from_pretrained(sloping(), tmp_path), example()), outputs(ours, example()))
