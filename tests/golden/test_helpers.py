"""The tools of ``peft.helpers``, beside the real ones."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import peft
import peft.helpers
import pytest
import torch
from peft.tuners.lora import intruders
from torch import nn

import inlay
from inlay import helpers
from inlay.core.inlaid import adapters_of
from inlay.methods.dora import cache

from .models import MODELS
from .support import close, jitter, outputs


# ---- condition numbers ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "mixtral", "bert"])
@pytest.mark.parametrize("how", [{"top_p": 0.3}, {"num_modules": 3}, {"threshold": 20.0}, {}], ids=str)
def test_the_best_conditioned_weights_are_the_same(name: str, how: dict[str, Any]) -> None:
    model = MODELS[name][0]()
    found = []
    for library in (helpers, peft.helpers):
        selector = library.KappaTuneSelector(model, max_dim_size_to_analyze=38, show_progress=False)
        found.append((selector.get_best_targets(**how), selector.get_best_target_parameters(**how)))
    assert found[0] == found[1]
    assert found[0][0]


def test_what_the_selector_finds_can_be_adapted() -> None:
    model = MODELS["mixtral"][0]()
    found = helpers.find_kappa_target_modules(model, top_p=0.2, show_progress=False)
    assert found == peft.helpers.find_kappa_target_modules(model, top_p=0.2, show_progress=False)
    assert trainable(inlay.get_peft_model(model, inlay.LoraConfig(r=2, **found))) > 0
    # Beyond the real library: GPT-2's layers are linear, too.
    assert helpers.find_kappa_target_modules(MODELS["gpt2"][0](), 0.1, show_progress=False)["target_modules"]
    assert helpers.condition_number(torch.diag(torch.tensor([6.0, 3.0, 2.0]))) == pytest.approx(3.0)


def trainable(model: nn.Module) -> int:
    return sum(q.numel() for q in model.parameters() if q.requires_grad)


# ---- intruders ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{"top_k": 4, "threshold_epsilon": 0.9, "mitigation_lambda": 0.3}, {"threshold_epsilon": 0.0}], ids=str)
def test_intruders_are_reduced_as_in_the_real_library(options: dict[str, Any], tmp_path: Path) -> None:
    build, example = MODELS["llama"]
    theirs = peft.get_peft_model(build(), peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]))
    jitter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(), tmp_path)
    before = outputs(ours, example())
    mine: list[str] = []
    its: list[str] = []
    helpers.reduce_intruder_dimension(ours, logging_sink=mine.append, **options)
    intruders.reduce_intruder_dimension(theirs, logging_sink=its.append, **options)
    assert [line.split(": ")[-1] for line in mine] == [line.split(": ")[-1] for line in its]
    assert ours.active_adapters == ["intruder_reduced"]
    torch.testing.assert_close(outputs(ours, example()), outputs(theirs, example()), rtol=1e-4, atol=1e-4)
    changed = not torch.allclose(outputs(ours, example()), before, atol=1e-3)
    assert changed == (options["threshold_epsilon"] > 0)
    ours.set_adapter("default")
    assert torch.equal(outputs(ours, example()), before)


def test_intruders_of_other_methods_are_refused() -> None:
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(4, 4)), inlay.HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="plain LoRA's factors"):
        helpers.reduce_intruder_dimension(model, logging_sink=None)


def test_an_intruder_of_an_embedding_is_taken_out() -> None:
    """By hand: one direction of the update that no direction of the base has. The real library mixes up the two sides here."""
    base = nn.Sequential(nn.Embedding(6, 3))
    base[0].weight.data = torch.eye(6)[:, :3] * torch.tensor([3.0, 2.0, 0.0])
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=1, lora_alpha=1, target_modules=["0"]))
    (p,) = adapters_of(base, "default")
    p.lora_embedding_A.data = torch.tensor([[0.0, 0, 0, 1, 0, 0]])
    p.lora_embedding_B.data = torch.tensor([[5.0], [5.0], [5.0]])
    ids = torch.arange(6)
    update = model(ids) - base[0].weight
    helpers.reduce_intruder_dimension(model, top_k=1, threshold_epsilon=0.9, mitigation_lambda=0.0, logging_sink=None)
    after = model(ids) - base[0].weight
    w = base[0].weight.T + update.T
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    best = torch.linalg.svd(update.T - s[0] * torch.outer(u[:, 0], v[0]), full_matrices=False)
    torch.testing.assert_close(after.T, best[1][0] * torch.outer(best[0][:, 0], best[2][0]), rtol=1e-4, atol=1e-5)


# ---- DoRA's cache -----------------------------------------------------------------------------------------------------------
def dora() -> tuple[Any, nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 8))
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, use_dora=True, target_modules=["0", "2"], init_lora_weights=False))
    return model.eval(), base, torch.randn(5, 8)


def test_norms_are_kept_in_evaluation_and_computed_anew_after_a_step() -> None:
    model, base, x = dora()
    with torch.no_grad():
        expected = model(x)
        with helpers.DoraCaching():
            assert len(cache.norms) == 0
            for _ in range(2):
                assert torch.equal(model(x), expected)
            kept = {p: cache.norms[p][1] for p in adapters_of(base, "default")}
            assert len(kept) == 2
            model(x)
            assert all(cache.norms[p][1] is t for p, t in kept.items())
            adapters_of(base, "default")[0].lora_A.mul_(2)
            changed = model(x)
        assert not cache.on
        assert len(cache.norms) == 0
        assert torch.equal(model(x), changed)
        assert not torch.allclose(changed, expected)


def test_caching_for_good_and_never_in_training() -> None:
    model, _, x = dora()
    caching = helpers.DoraCaching()
    caching(enabled=True)
    try:
        model(x)
        assert len(cache.norms) == 2
        model.train()(x)
        assert len(cache.norms) == 0
        with helpers.DoraCaching(enabled=False):
            model.eval()(x)
            assert len(cache.norms) == 0
        assert cache.on
    finally:
        caching(enabled=False)


# ---- signatures -----------------------------------------------------------------------------------------------------------
def test_signatures_of_the_base() -> None:
    build, example = MODELS["llama"]
    model = inlay.get_peft_model(build(), inlay.LoraConfig())
    expected = outputs(model, example())
    helpers.update_signature(model)
    assert model.forward.__doc__ == type(model.get_base_model()).forward.__doc__
    assert "input_ids" in inspect.signature(model.forward).parameters
    assert "generation_config" in inspect.signature(model.generate).parameters
    close(outputs(model, example()), expected)
    assert model.generate(example()["input_ids"], max_new_tokens=2).shape == (3, 8)
    with pytest.raises(ValueError, match="not one of"):
        helpers.update_signature(model, "backward")
