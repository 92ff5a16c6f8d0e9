"""X-LoRA, Arrow and Poly against the real library: the same shares, outputs, files and steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import inlay

from .models import MODELS, tokens
from .support import WEIGHTS, close, jitter, outputs, same_configs, same_files, train

BUILD = MODELS["llama"][0]


def trained_adapters(folder: Path, ranks: tuple[int, ...] = (4, 4), targets: tuple[str, ...] = ("q_proj", "down_proj")) -> dict[str, str]:
    """Adapters on disk, by the names that the real library's X-LoRA gives them."""
    found = {}
    for i, r in enumerate(ranks):
        model = peft.get_peft_model(BUILD(), peft.LoraConfig(r=r, lora_alpha=6 + i, target_modules=list(targets)))
        generator = torch.Generator().manual_seed(i)
        for q in model.parameters():
            if q.requires_grad:
                q.data = 0.3 * torch.randn(q.shape, generator=generator)
        model.save_pretrained(folder / str(i))
        found[str(i)] = str(folder / str(i))
    return found


# ---- X-LoRA ---------------------------------------------------------------------------------------------------------------
XLORA: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise_scalings": True, "softmax_temperature": 0.3},
    "deep": {"xlora_depth": 3, "xlora_size": 12, "xlora_dropout_p": 0.0},
    "sparse": {"top_k_lora": 1, "global_scaling_weight": 1.7},
    "sparse-softmax": {"top_k_lora": 2, "enable_softmax": False, "enable_softmax_topk": True},
    "raw": {"enable_softmax": False},
}


def uncached() -> nn.Module:
    model = BUILD()
    model.config.use_cache = False
    return model


def classifier(model: nn.Module) -> list[torch.Tensor]:
    return [q for n, q in model.named_parameters() if "internal_xlora_classifier" in n]


def xlora(folder: Path, *ranks: int, **options: Any) -> tuple[Any, Any, dict[str, str]]:
    experts = trained_adapters(folder, ranks or (4, 4, 2))
    given = {"adapters": experts, "hidden_size": 16, "task_type": "CAUSAL_LM", **options}
    theirs = peft.get_peft_model(uncached(), peft.XLoraConfig(**given))
    for i, q in enumerate(classifier(theirs)):
        q.data = torch.randn(q.shape, generator=torch.Generator().manual_seed(9 + i))
    theirs.save_pretrained(folder / "theirs", selected_adapters=["default"])
    # What it writes lacks layers whose number is an adapter's name: it takes "layers.0" for a tensor of the adapter "0", and its
    # adapters have numbers for names. What it reads are these keys.
    save_file({k: q for k, q in theirs.state_dict().items() if "internal_xlora_classifier" in k}, folder / "theirs" / WEIGHTS)
    ours = inlay.PeftModel.from_pretrained(BUILD(), folder / "theirs", is_trainable=True)
    return theirs.eval(), ours.eval(), experts


@pytest.mark.parametrize("options", XLORA.values(), ids=XLORA.keys())
def test_xlora_both_ways(options: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours, experts = xlora(tmp_path, **options)
    ids = tokens()
    expected = theirs(**ids).logits
    close(ours(**ids).logits, expected)
    close(ours.get_latest_scalings(), theirs.base_model.get_latest_scalings())
    assert not torch.allclose(expected, BUILD()(**ids).logits, atol=1e-3)
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["default"])
    same_files(tmp_path / "ours", tmp_path / "theirs")
    same_configs(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(uncached(), tmp_path / "ours", config=peft.XLoraConfig.from_pretrained(tmp_path / "ours"))
    close(again.eval()(**ids).logits, expected)
    fresh = inlay.get_peft_model(BUILD(), inlay.XLoraConfig(adapters=experts, task_type="CAUSAL_LM", **options))
    assert sum(q.numel() for q in fresh.parameters() if q.requires_grad) == sum(q.numel() for q in classifier(theirs))


def test_xlora_trains_as_the_real_library_does(tmp_path: Path) -> None:
    theirs, ours, _ = xlora(tmp_path, layerwise_scalings=True)
    its, mine = train(theirs, tokens(), rate=0.5), train(ours, tokens(), rate=0.5)
    assert mine == pytest.approx(its, rel=1e-5)
    assert its[-1] < its[0]
    close(outputs(ours, tokens()), outputs(theirs, tokens()))


def test_xlora_trains_the_adapters_as_well(tmp_path: Path) -> None:
    theirs, ours, _ = xlora(tmp_path, use_trainable_adapters=True)
    its, mine = train(theirs, tokens()), train(ours, tokens())
    assert mine == pytest.approx(its, rel=1e-5)
    close(outputs(ours, tokens()), outputs(theirs, tokens()))


def test_xlora_generates(tmp_path: Path) -> None:
    theirs, ours, _ = xlora(tmp_path)
    asked = {**tokens(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(**asked), theirs.generate(**asked))


# ---- Arrow ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("general", [False, True], ids=["arrow", "genknowsub"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_arrow(general: bool, top_k: int, tmp_path: Path) -> None:
    paths = list(trained_adapters(tmp_path, (4, 4, 4, 4, 4)).values())
    found = []
    for library in (peft, inlay):
        options = library.ArrowConfig(top_k=top_k, router_temperature=0.7, rng_seed=3, use_gks=general)
        found.append(library.create_arrow_model(BUILD(), paths[:3], options, general_adapter_paths=paths[3:]))
    theirs, ours = found
    expected = outputs(theirs, tokens())
    close(outputs(ours, tokens()), expected)
    assert not torch.allclose(expected, BUILD()(**tokens()).logits, atol=1e-3)
    theirs.save_pretrained(tmp_path / "theirs", selected_adapters=["arrow_router"])
    ours.save_pretrained(tmp_path / "ours", selected_adapters=["arrow_router"])
    mine, its = (load_file(tmp_path / w / "arrow_router" / WEIGHTS) for w in ("ours", "theirs"))
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in its.items()}
    same_configs(tmp_path / "ours" / "arrow_router", tmp_path / "theirs" / "arrow_router")
    # The real library subtracts in place, for good; the adapters are themselves here.
    ours.set_adapter("task_0")
    alone = inlay.PeftModel.from_pretrained(BUILD(), paths[0])
    close(outputs(ours, tokens()), outputs(alone, tokens()))


def test_arrow_takes_adapters_that_join_later(tmp_path: Path) -> None:
    paths = list(trained_adapters(tmp_path, (4, 4, 4)).values())
    found = []
    for library in (peft, inlay):
        model = library.create_arrow_model(BUILD(), paths[:2], library.ArrowConfig(top_k=2, rng_seed=3))
        outputs(model, tokens())
        model.load_adapter(paths[2], adapter_name="late")
        found.append(outputs(model, tokens()))
    close(found[1], found[0])


# ---- Poly -----------------------------------------------------------------------------------------------------------------
POLY: dict[str, Any] = {"task_type": "CAUSAL_LM", "r": 4, "n_tasks": 3, "n_skills": 3, "target_modules": ["q_proj", "down_proj"]}
TASKS = torch.tensor([0, 2, 1])


def poly(folder: Path, **options: Any) -> tuple[Any, Any]:
    theirs = peft.get_peft_model(BUILD(), peft.PolyConfig(**POLY, **options))
    jitter(theirs)
    for n, q in theirs.named_parameters():
        if "module_logits" in n:
            q.data *= 10
    theirs.save_pretrained(folder)
    return theirs.eval(), inlay.PeftModel.from_pretrained(BUILD(), folder, is_trainable=True).eval()


@pytest.mark.parametrize("splits", [1, 2])
def test_poly_both_ways(splits: int, tmp_path: Path) -> None:
    theirs, ours = poly(tmp_path / "theirs", n_splits=splits)
    given = {**tokens(), "task_ids": TASKS}
    expected = outputs(theirs, given)
    close(outputs(ours, given), expected)
    assert not torch.allclose(expected, outputs(theirs, {**given, "task_ids": TASKS.flip(0)}), atol=1e-3)
    ours.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    same_configs(tmp_path / "ours", tmp_path / "theirs")
    close(outputs(peft.PeftModel.from_pretrained(BUILD(), tmp_path / "ours"), given), expected)


def test_poly_trains_as_the_real_library_does(tmp_path: Path) -> None:
    theirs, ours = poly(tmp_path, n_splits=2)
    given = {**tokens(), "task_ids": TASKS}
    torch.manual_seed(4)
    its = train(theirs, given)
    torch.manual_seed(4)
    assert train(ours, given) == pytest.approx(its, rel=1e-5)
    close(outputs(ours, given), outputs(theirs, given))


@pytest.mark.parametrize("cache", [True, False])
def test_poly_generates(cache: bool, tmp_path: Path) -> None:
    theirs, ours = poly(tmp_path)
    asked = {**tokens(), "task_ids": TASKS, "max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "use_cache": cache}
    assert torch.equal(ours.generate(**asked), theirs.generate(**asked))
