"""Optimisers for factors, beside the real library's: the same numbers after the same steps."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import peft.optimizers as theirs_module
import pytest
import torch
from peft.optimizers import lorafa as their_lorafa
from torch import nn

import inlay
from inlay import optimizers

from .models import MODELS
from .support import close, outputs, train

LORA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}
LINEAR = LORA | {"target_modules": ["q_proj", "down_proj"]}
Make = Callable[[Any, Any], torch.optim.Optimizer]


def beside(make: Make, folder: Path, options: dict[str, Any], name: str = "llama", tolerance: float = 1e-5) -> None:
    build, example = MODELS[name]
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options))
    for q in theirs.parameters():
        if q.requires_grad:
            q.data += 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel()))
    theirs.save_pretrained(folder)
    ours = inlay.PeftModel.from_pretrained(build(), folder, is_trainable=True)
    start = outputs(ours, example())
    its = train(theirs, example(), optimizer=make(theirs_module, theirs))
    mine = train(ours, example(), optimizer=make(optimizers, ours))
    assert mine == pytest.approx(its, rel=tolerance)
    torch.testing.assert_close(outputs(ours, example()), outputs(theirs, example()), rtol=10 * tolerance, atol=10 * tolerance)
    assert not torch.allclose(outputs(ours, example()), start, atol=1e-3)


@pytest.mark.parametrize("by", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"lora_bias": True}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_lora_plus(by: type[torch.optim.Optimizer], more: dict[str, Any], tmp_path: Path) -> None:
    def make(library: Any, model: Any) -> torch.optim.Optimizer:
        options = {"lr": 2e-3, "loraplus_lr_ratio": 8.0, "loraplus_weight_decay": 0.1, "loraplus_lr_embedding": 1e-2}
        return library.create_loraplus_optimizer(model, by, **options)

    beside(make, tmp_path, (LINEAR if "lora_bias" in more else LORA) | more)


def test_the_groups_of_lora_plus() -> None:
    build, _ = MODELS["llama"]
    options = LORA | {"use_dora": True, "modules_to_save": ["model.norm", "lm_head"]}
    found = []
    for library, own in ((peft, theirs_module), (inlay, optimizers)):
        model = library.get_peft_model(build(), library.LoraConfig(**options))
        made = own.create_loraplus_optimizer(model, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=4.0, loraplus_weight_decay=0.2)
        found.append([(sorted(tuple(q.shape) for q in g["params"]), g["lr"], g["weight_decay"]) for g in made.param_groups])
    assert found[0] == found[1]


@pytest.mark.parametrize("more", [{}, {"use_rslora": True}, {"rank_pattern": {"down_proj": 2}}, {"modules_to_save": ["lm_head"]}], ids=str)
def test_lora_fa(more: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The real library rounds the projected gradient to bfloat16 wherever the machine can; that is no part of the method.
    monkeypatch.setattr(their_lorafa, "is_bf16_available", lambda: False)
    beside(lambda library, model: library.create_lorafa_optimizer(model, 4, 6, lr=5e-3, weight_decay=0.1), tmp_path, LINEAR | more)


@pytest.mark.parametrize("by", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("more", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}], ids=str)
def test_riemannian(by: type[torch.optim.Optimizer], more: dict[str, Any], tmp_path: Path) -> None:
    rate = 2.0 if by is torch.optim.SGD else 5e-3
    beside(lambda library, model: library.create_riemannian_optimizer(model, by, lr=rate, reg=0.05), tmp_path, LINEAR | more)


def test_riemannian_leaves_convolutions_alone(tmp_path: Path) -> None:
    options = LINEAR | {"target_modules": ["plane", "head"]}

    def make(library: Any, model: Any) -> torch.optim.Optimizer:
        return library.create_riemannian_optimizer(model, torch.optim.SGD, lr=5e-2)

    beside(make, tmp_path, options, "convolutions")


# ---- what the mathematics allows ------------------------------------------------------------------------------------------
def small(config: Any) -> Any:
    torch.manual_seed(0)
    return inlay.get_peft_model(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 6)), config)


def test_steps_that_do_not_depend_on_the_split() -> None:
    """With A times c and B divided by c the product takes the same step."""
    found = []
    for c in (1.0, 10.0):
        model = small(inlay.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
        a, b = (q for q in model.parameters() if q.requires_grad)
        a.data *= c
        b.data /= c
        optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.0)
        model(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        optimizer.step()
        found.append((b @ a).detach())
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_lora_fa_is_nearest_to_the_gradient_of_the_weight() -> None:
    a, g = torch.randn(3, 7), torch.randn(5, 7)
    scale = 1.5
    step = optimizers.lorafa.projected(scale * g @ a.T, a, scale)
    # The least squares solution of s (X) A = g.
    expected = torch.linalg.lstsq((scale * a).T, g.T).solution.T
    torch.testing.assert_close(step, expected, rtol=1e-4, atol=1e-4)


def test_methods_without_such_factors_are_told_why() -> None:
    budget = small(inlay.AdaLoraConfig(total_step=9, target_modules=["0"]))
    turns = small(inlay.HRAConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="HRA is no product of two factors"):
        optimizers.create_riemannian_optimizer(turns, torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="ADALORA has factors that are computed"):
        optimizers.create_lorafa_optimizer(budget, 4, 4, lr=1e-3)
    with pytest.raises(ValueError, match="none of these adapters has one"):
        optimizers.create_loraplus_optimizer(turns, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2.0)
    # AdaLoRA's B is on the output side, whatever is between the factors.
    made = optimizers.create_loraplus_optimizer(budget, torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=2.0)
    assert [len(g["params"]) for g in made.param_groups] == [2, 0, 1, 0]


def test_what_cannot_be() -> None:
    model = small(inlay.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="LBFGS requires a closure"):
        optimizers.create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    with pytest.raises(TypeError, match="subclass of torch.optim.Optimizer"):
        optimizers.create_riemannian_optimizer(model, nn.Linear, lr=1e-3)  # type: ignore[arg-type]
    optimizer = optimizers.create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    with pytest.raises(ValueError, match="without one"):
        optimizer.step(lambda: 0.0)
    with pytest.raises(ValueError, match="is not what"):
        optimizers.create_lorafa_optimizer(model, 2, 2, lr=1e-3, use_rslora=True)
    words = inlay.get_peft_model(nn.Sequential(nn.Embedding(5, 4)), inlay.LoraConfig(r=2, target_modules=["0"]))
    with pytest.raises(ValueError, match="freezes A, and that of '0' is zero"):
        optimizers.create_lorafa_optimizer(words, 2, 2, lr=1e-3)
    with pytest.raises(ValueError, match="has no adapters"):
        optimizers.create_lorafa_optimizer(nn.Linear(2, 2), 2, 2, lr=1e-3)


def test_an_optimiser_goes_on_from_its_state() -> None:
    def fresh() -> tuple[Any, torch.optim.Optimizer]:
        model = small(inlay.LoraConfig(r=2, target_modules=["0", "2"]))
        return model, optimizers.create_lorafa_optimizer(model, 2, 8, lr=1e-2)

    def step(model: Any, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        model(torch.linspace(-1, 1, 12).view(2, 6)).square().sum().backward()
        optimizer.step()

    one, by = fresh()
    step(one, by)
    other, again = fresh()
    other.load_state_dict(one.state_dict())
    again.load_state_dict(copy.deepcopy(by.state_dict()))
    step(one, by)
    step(other, again)
    x = torch.randn(3, 6)
    close(other(x), one(x))
