"""Methods with an update of few numbers: the fused layers under the law, and options that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.attach import attach
from inlay.core.inlaid import places
from inlay.core.place import Place
from inlay.kernels import lowrank, spread

from .layouts import Layout
from .support import acting, adapted, adapters, close, over
from .test_law import test_gradients as check_gradients
from .test_law import test_the_law as check_the_law

OURS = ("FOURIERFT", "WAVEFT", "C3A", "SHIRA", "SUPERTUNING", "HIRA", "DELORA", "DEFT", "PEANUT")
LINEAR = [pair for pair in acting("linear", "linear-no-bias", "conv1d-gpt2") if pair[0].startswith(OURS)]


@pytest.mark.parametrize("share", [0, 1000])
@over(LINEAR)
def test_fused_layers_obey_the_law(case: str, layout: Layout, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are for many rows, which the small layers of the law do not have; with entries sampled and taken from all."""
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)
    monkeypatch.setitem(spread.DENSE_SHARE, "cpu", share)
    check_the_law(case, layout)
    check_gradients(case, layout)


@over([pair for pair in LINEAR if pair[1].name == "linear"])
def test_fused_layers_in_training(case: str, layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a host in half precision the update has the parameters' precision; dropout leaves the base alone."""
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)
    model = adapted(case, layout, torch.bfloat16).train()
    (x,) = layout.example(torch.bfloat16)
    y = model(x.requires_grad_())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    assert x.grad is not None
    assert all(q.grad is not None and q.grad.isfinite().all() for p in adapters(model) for q in p.parameters())


def test_hira_above_another_adapter_passes_its_gradient_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowrank, "FEW_ROWS", -1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6)).double()
    attach(model, inlay.LoraConfig(r=2, target_modules=["0"]), "a")
    attach(model, inlay.HiraConfig(r=2, target_modules=["0"]), "b")
    (place,) = [p for p in places(model) if isinstance(p, Place)]
    place.session.active = ("a", "b")
    trained = [q.requires_grad_() for p in adapters(model) for q in p.parameters()]
    for q in trained:
        q.data += 0.3 * torch.randn_like(q)
    x = torch.randn(50, 8, dtype=torch.float64)
    direct = model(x)
    folded = nn.functional.linear(x, *place.fold(("a", "b")))
    close(direct, folded)
    for mine, right in zip(torch.autograd.grad(direct.sum(), trained), torch.autograd.grad(folded.sum(), trained), strict=True):
        close(mine, right)


def test_proportional_wavelets_follow_the_sizes() -> None:
    model = nn.ModuleDict({"small": nn.Linear(4, 4), "large": nn.Linear(8, 12)})
    config = inlay.WaveFTConfig(n_frequency=14, proportional_parameters=True, target_modules=["small", "large"])
    attach(model, config, "a")
    sizes = {name: model[name].adapters["a"].waveft_spectrum.numel() for name in model}
    assert sizes == {"small": 4, "large": 24}
    assert config.to_file()["n_frequency"] == 14


def test_shira_trains_all_where_there_are_fewer() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    attach(model, inlay.ShiraConfig(r=4, target_modules=["0"]), "a")
    assert model[0].adapters["a"].shira_weight.numel() == 6


# ---- options that make no sense ------------------------------------------------------------------------------------------------
BAD: list[tuple[str, dict[str, Any], str]] = [
    ("FourierFTConfig", {"n_frequency": 0}, "n_frequency.*positive"),
    ("FourierFTConfig", {"random_loc_seed": None}, "random_loc_seed.*integer"),
    ("FourierFTConfig", {"bias": "lora_only"}, "bias"),
    ("WaveFTConfig", {"wavelet_family": "db11"}, "Unknown wavelet_family='db11'. Did you mean 'db1'?"),
    ("WaveFTConfig", {"n_frequency": -3}, "n_frequency.*positive"),
    ("C3AConfig", {"block_size": 0}, "block_size.*positive"),
    ("C3AConfig", {"init_weights": "gausian"}, "Did you mean 'gaussian'"),
    ("ShiraConfig", {"r": 0}, "`r` should be a positive"),
    ("SupertuningConfig", {"sparsity": 1.0}, "sparsity.*share"),
    ("SupertuningConfig", {"lora_alpha": 3}, "set `r` too"),
    ("SupertuningConfig", {"r": 0}, "positive integer"),
    ("SupertuningConfig", {"r": 2, "lora_dropout": 1.0}, "lora_dropout.*share"),
    ("HiraConfig", {"r": -1}, "positive"),
    ("HiraConfig", {"hira_dropout": 1.5}, "share"),
    ("HiraConfig", {"init_weights": "normal"}, "Known: True, False, gaussian"),
    ("DeloraConfig", {"r": 0}, "positive"),
    ("DeloraConfig", {"module_dropout": -0.1}, "share"),
    ("DeftConfig", {"decomposition_method": "svd"}, "Known: relu, qr"),
    ("DeftConfig", {"r": 0}, "positive"),
    ("DeftConfig", {"deft_dropout": 2}, "share"),
    ("PeanutConfig", {"r": 0}, "positive"),
    ("PeanutConfig", {"depth": -1}, "depth"),
    ("PeanutConfig", {"act_fn": "rellu"}, "Did you mean 'relu'"),
]  # fmt: skip


@pytest.mark.parametrize(("config", "options", "message"), BAD, ids=[f"{c}-{next(iter(o))}" for c, o, _ in BAD])
def test_bad_options_are_named(config: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        getattr(inlay, config)(**options)


def mask(of: list[int]) -> Any:
    def choose(layer: nn.Linear, r: int) -> Tensor:
        found = torch.zeros(layer.weight.shape)
        found.view(-1)[of] = 1
        return found

    return choose


def test_masks_of_ones_own_are_checked() -> None:
    config = inlay.ShiraConfig(r=1, mask_type="mine", target_modules=["0"])
    with pytest.raises(ValueError, match="set `config.mask_fn`"):
        attach(nn.Sequential(nn.Linear(8, 6)), config, "a")
    config.mask_fn = mask([1, 2])
    with pytest.raises(ValueError, match="gave 2 entries.*should give 14"):
        attach(nn.Sequential(nn.Linear(8, 6)), config, "a")
    config.mask_fn = mask(list(range(3, 17)))
    model = nn.Sequential(nn.Linear(8, 6))
    attach(model, config, "a")
    assert model[0].adapters["a"].shira_indices[:, 0].tolist() == [0, 3]


REFUSALS = [
    (lambda: inlay.FourierFTConfig(n_frequency=49, target_modules=["0"]), "48 entries, fewer than n_frequency=49"),
    (lambda: inlay.C3AConfig(block_size=4, target_modules=["0"]), "block_size=4 does not divide its 6 outputs"),
    (lambda: inlay.SupertuningConfig(target_modules=["0"]), "sparsity=0.99 leaves nothing of its 48 entries"),
]


@pytest.mark.parametrize(("config", "message"), REFUSALS)
def test_layers_that_are_too_small(config: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        attach(nn.Sequential(nn.Linear(8, 6)), config(), "a")
