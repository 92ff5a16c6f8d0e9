"""What the real library makes of several adapters, and of other methods as LoRA, Inlay makes too."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import inlay

from .models import MODELS
from .support import close, jitter, outputs

PAIR = {"q_proj", "v_proj"}


def both(name: str, folder: Path, configs: dict[str, tuple[str, dict[str, Any]]]) -> tuple[Any, Any]:
    """A model of the real library with adapters, and ours that read their files."""
    build, _ = MODELS[name]
    theirs: Any = None
    for adapter, (method, options) in configs.items():
        config = getattr(peft, method)(**options)
        if theirs is None:
            theirs = peft.get_peft_model(build(), config, adapter)
        else:
            theirs.add_adapter(adapter, config)
    for i, adapter in enumerate(configs):
        theirs.set_adapter(adapter)
        torch.manual_seed(i)
        for key, q in theirs.named_parameters():
            if q.requires_grad and f".{adapter}" in key:
                q.data += 0.2 * torch.randn_like(q)
    theirs.save_pretrained(folder)
    ours: Any = None
    for adapter in configs:
        if ours is None:
            ours = inlay.PeftModel.from_pretrained(build(), folder / adapter, adapter)
        else:
            ours.load_adapter(folder / adapter, adapter)
    return theirs, ours


def same(name: str, theirs: Any, ours: Any, adapters: list[str], weights: list[float], *how: Any, **options: Any) -> None:
    example = MODELS[name][1]()
    for model in (theirs, ours):
        model.add_weighted_adapter(adapters, weights, "all", *how, **options)
    for active in (*adapters, "all"):
        for model in (theirs, ours):
            model.set_adapter(active)
        expected = outputs(theirs, example)
        close(outputs(ours, example), expected)
    ours.set_adapter(adapters[0])
    assert not torch.allclose(expected, outputs(ours, example), atol=1e-4), "nothing was combined"


LORAS: dict[str, tuple[str, dict[str, Any]]] = {
    "one": ("LoraConfig", {"r": 4, "lora_alpha": 6, "target_modules": PAIR}),
    "two": ("LoraConfig", {"r": 4, "use_rslora": True, "target_modules": {"q_proj", "down_proj"}}),
}
PRUNING = [("ties", "total"), ("ties", "frequency"), ("ties_svd", "total"), ("ties_svd", "frequency"), ("magnitude_prune", "total"),
           ("magnitude_prune_svd", "total")]  # fmt: skip


@pytest.mark.parametrize("kind", ["linear", "cat", "svd"])
@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.5, -0.5]])
def test_sums(kind: str, weights: list[float], tmp_path: Path) -> None:
    same("llama", *both("llama", tmp_path, LORAS), ["one", "two"], weights, kind)


@pytest.mark.parametrize(("kind", "sign"), PRUNING)
def test_what_is_pruned(kind: str, sign: str, tmp_path: Path) -> None:
    same("llama", *both("llama", tmp_path, LORAS), ["one", "two"], [0.8, -0.4], kind, density=0.4, majority_sign_method=sign)


def test_other_ranks(tmp_path: Path) -> None:
    three = LORAS | {"c": ("LoraConfig", {"r": 6, "target_modules": PAIR, "rank_pattern": {"layers.0.self_attn.q_proj": 2}})}
    theirs, ours = both("llama", tmp_path, three)
    same("llama", theirs, ours, ["one", "two", "c"], [0.5, 0.3, 0.4], "svd", svd_rank=3)
    assert {m.lora_A["all"].weight.shape[0] for m in ours.modules() if hasattr(m, "_inlay") and "all" in m.lora_A} == {3}


@pytest.mark.parametrize("kind", ["cat", "svd", "ties_svd"])
@pytest.mark.parametrize(("name", "targets"), [("gpt2", {"c_attn", "wte"}), ("convolutions", {"plane", "plain"})])
def test_other_layers(kind: str, name: str, targets: set[str], tmp_path: Path) -> None:
    pair = {n: ("LoraConfig", {"r": 3, "lora_alpha": a, "target_modules": targets}) for n, a in (("one", 3), ("two", 5))}
    same(name, *both(name, tmp_path, pair), ["one", "two"], [0.6, 0.9], kind, density=0.5)


def test_gains(tmp_path: Path) -> None:
    options = {"target_modules": {"k_proj", "down_proj"}, "feedforward_modules": {"down_proj"}}
    theirs, ours = both("llama", tmp_path, {"one": ("IA3Config", options), "two": ("IA3Config", options)})
    same("llama", theirs, ours, ["one", "two"], [0.7, 0.3])
    assert ours.peft_config["all"].peft_type == "IA3"


@pytest.mark.parametrize("rank", [5, 0.9])
@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig"])
def test_as_lora(method: str, rank: float, tmp_path: Path) -> None:
    build, example = MODELS["llama"]
    theirs, ours = both("llama", tmp_path, {"one": (method, {"r": 4, "target_modules": sorted(PAIR)})})
    (config, tensors), (mine_config, mine) = (f(m, rank, "one") for f, m in ((peft.convert_to_lora, theirs), (inlay.convert_to_lora, ours)))
    assert mine.keys() == tensors.keys()
    for key in tensors:
        assert mine[key].shape == tensors[key].shape
        if ".lora_A." in key:
            other = key.replace("lora_A", "lora_B")
            close(mine[other] @ mine[key], tensors[other] @ tensors[key])
    assert (mine_config.r, mine_config.lora_alpha) == (config.r, config.lora_alpha)
    inlay.save_as_lora(tmp_path / "lora", ours, rank, "one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read = peft.PeftModel.from_pretrained(build(), tmp_path / "lora")
    close(outputs(read, example()), outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / "lora"), example()))


def test_what_the_real_library_loses(tmp_path: Path) -> None:
    """It drops retrained biases, tokens and modules without a word; a sum has them."""
    build, example = MODELS["llama"]
    model = inlay.get_peft_model(build(), inlay.LoraConfig(r=4, target_modules=PAIR), "a")
    more: dict[str, Any] = {"bias": "lora_only", "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 3]}
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=PAIR, **more))
    for name in ("a", "b"):
        model.set_requires_grad(name)
        model.set_adapter(name)
        jitter(model)
    model.add_weighted_adapter(["b", "a"], [1.0, 0.0], "all", "cat")
    model.set_adapter("b")
    expected = outputs(model, example())
    model.set_adapter("all")
    close(outputs(model, example()), expected)
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path / "all"), example()), expected)
