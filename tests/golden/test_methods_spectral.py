"""Methods whose update is made of few numbers, or is a function of the weight, beside the real library's."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay

from .models import MODELS
from .support import WEIGHTS, both_ways, close, jitter, outputs, same_steps

LINEAR = {"target_modules": ["q_proj", "down_proj"]}
CONV1D = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "fourierft": ("llama", "FourierFTConfig", {"n_frequency": 50, **LINEAR}),
    "fourierft-gpt2": ("gpt2", "FourierFTConfig", {"n_frequency": 40, "scaling": 30.0, "random_loc_seed": 5, **CONV1D}),
    "fourierft-bert": ("bert", "FourierFTConfig", {"n_frequency": 30, "n_frequency_pattern": {"key": 20}, "init_weights": True,
                                                   "target_modules": ["query", "key"]}),
    "waveft": ("llama", "WaveFTConfig", {"n_frequency": 50, **LINEAR}),
    "waveft-gpt2": ("gpt2", "WaveFTConfig", {"n_frequency": 40, "wavelet_family": "coif2", **CONV1D}),
    "waveft-entries": ("llama", "WaveFTConfig", {"n_frequency": 50, "use_idwt": False, "init_weights": False, **LINEAR}),
    "waveft-pattern": ("bert", "WaveFTConfig", {"n_frequency": 30, "n_frequency_pattern": {"key": 20}, "random_loc_seed": 4,
                                                "wavelet_family": "db4", "target_modules": ["query", "key", "classifier"]}),
    "waveft-proportional": ("llama", "WaveFTConfig", {"n_frequency": 40, "proportional_parameters": True, "wavelet_family": "sym5",
                                                      **LINEAR}),
    "c3a": ("llama", "C3AConfig", {"block_size": 8, **LINEAR}),
    "c3a-zero": ("llama", "C3AConfig", {"block_size": 4, "block_size_pattern": {"q_proj": 16}, "init_weights": True, **LINEAR}),
    "c3a-gaussian": ("llama", "C3AConfig", {"block_size": 1, "init_weights": "gaussian", **LINEAR}),
    "shira": ("llama", "ShiraConfig", {"r": 2, **LINEAR}),
    "shira-seed": ("llama", "ShiraConfig", {"r": 3, "random_seed": 11, "target_modules": ["up_proj", "o_proj"]}),
    "delora": ("llama", "DeloraConfig", {"r": 4, **LINEAR}),
    "delora-patterns": ("bert", "DeloraConfig", {"r": 4, "rank_pattern": {"key": 2}, "lambda_pattern": {"query": 5}, "bias": "delora_only",
                                                 "target_modules": ["query", "key"]}),
    "hira": ("llama", "HiraConfig", {"r": 4, **LINEAR}),
    "hira-gpt2": ("gpt2", "HiraConfig", {"r": 4, "init_weights": "gaussian", **CONV1D}),
    "hira-embedding": ("llama", "HiraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "hira-convolutions": ("convolutions", "HiraConfig", {"r": 3, "target_modules": ["line", "plane", "plain", "space", "head"]}),
    "deft": ("llama", "DeftConfig", {"r": 4, **LINEAR}),
    "deft-qr": ("gpt2", "DeftConfig", {"r": 3, "decomposition_method": "qr", "alpha": 6, **CONV1D}),
    "deft-para": ("bert", "DeftConfig", {"r": 4, "para": True, "target_modules": ["query", "classifier"]}),
    "deft-random": ("llama", "DeftConfig", {"r": 4, "init_weights": False, "init_scale": 3.0, "bias": "deft_only", **LINEAR}),
    "peanut": ("llama", "PeanutConfig", {"r": 4, **LINEAR}),
    "peanut-deep": ("llama", "PeanutConfig", {"r": 3, "depth": 2, "act_fn": "gelu_new", "scaling": 9.0, **LINEAR}),
    "supertuning": ("llama", "SupertuningConfig", {"sparsity": 0.9, **LINEAR}),
    "supertuning-supra": ("bert", "SupertuningConfig", {"sparsity": 0.8, "select_top": False, "r": 3, "lora_alpha": 5,
                                                        "target_modules": ["query", "key"]}),
    "supertuning-found-again": ("llama", "SupertuningConfig", {"sparsity": 0.9, "r": 2, "save_precomputed_indices": False, **LINEAR}),
}  # fmt: skip
# The small models differ little for some of these methods, so some need longer steps to go anywhere.
RATES = {
    **dict.fromkeys(("fourierft", "fourierft-gpt2", "waveft", "waveft-gpt2", "waveft-entries", "waveft-proportional", "deft-qr"), 0.05),
    **dict.fromkeys(("delora", "hira-embedding", "hira-convolutions", "peanut-deep", "supertuning", "supertuning-found-again"), 0.5),
    "c3a": 20,
    "c3a-zero": 100,
    "shira": 5,
    "shira-seed": 5,
    "hira": 50,
    "hira-gpt2": 5,
    "deft": 1,
    "deft-random": 1,
    "peanut": 10,
}


@pytest.mark.parametrize("case", CASES)
def test_method(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    both_ways(model, method, tmp_path, **options)


@pytest.mark.parametrize("case", RATES)
def test_training(case: str, tmp_path: Path) -> None:
    name, method, options = CASES[case]
    same_steps(name, method, tmp_path, rate=RATES[case], **options)


@pytest.mark.parametrize("case", ["fourierft", "waveft", "c3a", "shira", "delora", "hira", "deft", "peanut", "supertuning"])
def test_default_targets(case: str) -> None:
    """The modules that are adapted where none are named, architecture by architecture."""
    name = {"fourierft": "FOURIERFT"}.get(case, case.upper())
    theirs = getattr(peft.utils.constants, f"TRANSFORMERS_MODELS_TO_{name}_TARGET_MODULES_MAPPING")
    config = getattr(inlay, CASES[case][1])()
    ours = config.default_targets()
    assert {k: ours.get(k) for k in theirs} == theirs


# ---- what a seed or the base decides -----------------------------------------------------------------------------------------
def test_shira_draws_the_same_entries(tmp_path: Path) -> None:
    build, _ = MODELS["llama"]
    for seed in (None, 3):
        options = {"r": 2, "random_seed": seed, **LINEAR}
        peft.get_peft_model(build(), peft.ShiraConfig(**options)).save_pretrained(tmp_path / "theirs")
        inlay.get_peft_model(build(), inlay.ShiraConfig(**options)).save_pretrained(tmp_path / "ours")
        theirs, ours = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
        indices = [k for k in theirs if k.endswith("shira_indices")]
        assert len(indices) == 4
        for key in indices:
            assert ours[key].dtype == theirs[key].dtype == torch.int32
            assert torch.equal(ours[key], theirs[key])


def own_mask(layer: nn.Module, r: int, **_: Any) -> Tensor:
    mask = torch.zeros_like(layer.weight)
    mask.view(-1)[: r * sum(layer.weight.shape)] = 1
    return mask


def test_shira_with_a_mask_of_ones_own(tmp_path: Path) -> None:
    build, example = MODELS["llama"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        configs = [library.ShiraConfig(r=2, mask_type="first", **LINEAR) for library in (peft, inlay)]
    for config in configs:
        config.mask_fn = own_mask
    theirs, ours = peft.get_peft_model(build(), configs[0]), inlay.get_peft_model(build(), configs[1])
    for model in (theirs, ours):
        jitter(model)
    close(outputs(ours, example()), outputs(theirs, example()))
    ours.save_pretrained(tmp_path)
    close(outputs(inlay.PeftModel.from_pretrained(build(), tmp_path), example()), outputs(ours, example()))


def test_supertuning_chooses_the_same_entries(tmp_path: Path) -> None:
    """Also in half precision, where many entries are equal."""
    build, _ = MODELS["llama"]
    options = {"sparsity": 0.7, **LINEAR}
    peft.get_peft_model(build().bfloat16(), peft.SupertuningConfig(**options)).save_pretrained(tmp_path / "theirs")
    inlay.get_peft_model(build().bfloat16(), inlay.SupertuningConfig(**options)).save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / side / WEIGHTS) for side in ("theirs", "ours"))
    assert theirs.keys() == ours.keys()
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


def test_deft_puts_in_what_it_takes_out() -> None:
    build, example = MODELS["llama"]
    model = inlay.get_peft_model(build(), inlay.DeftConfig(r=4, alpha=7, decomposition_method="qr", **LINEAR))
    close(outputs(model, example()), outputs(build(), example()))


# ---- where the real library is wrong -----------------------------------------------------------------------------------------
def test_hira_honours_its_rank_pattern() -> None:
    """The real library reads `rank_pattern` only for a second adapter on the same layer."""
    build, _ = MODELS["bert"]
    options = {"r": 4, "rank_pattern": {"key": 2}, "target_modules": ["query", "key"]}
    theirs = peft.get_peft_model(build(), peft.HiraConfig(**options))
    ours = inlay.get_peft_model(build(), inlay.HiraConfig(**options))
    ranks = {n.rpartition(".self.")[2].partition(".")[0]: len(q) for n, q in ours.named_parameters() if n.endswith("hira_A")}
    assert ranks == {"query": 4, "key": 2}
    assert {len(q) for n, q in theirs.named_parameters() if ".hira_A" in n} == {4}


def test_hira_on_padded_convolutions_of_other_modes(tmp_path: Path) -> None:
    """The real library pads with zeros whatever the layer's `padding_mode`; what it merges is right."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"))
    x = torch.randn(2, 2, 5, 5)
    theirs = peft.get_peft_model(base, peft.HiraConfig(r=2, target_modules=["0"], init_weights=False))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(theirs.unload(), tmp_path)
    merged = peft.PeftModel.from_pretrained(ours.unload(), tmp_path).merge_and_unload()
    torch.manual_seed(0)
    again = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"))
    close(inlay.PeftModel.from_pretrained(again, tmp_path).eval()(x), merged(x))


@pytest.mark.parametrize("family", ["coif4", "coif5"])
def test_long_coiflets_are_coiflets(family: str) -> None:
    """The real library's table has other numbers: those of coif4 are not orthonormal, and those of coif5 are 48 in place of 30."""
    from peft.tuners.waveft.wavelet import Wavelet

    from inlay.kernels.wavelets import LOW_PASS

    its, ours = torch.tensor(Wavelet(family).rec_lo).double(), torch.tensor(LOW_PASS[family]).double()
    assert abs(its.square().sum() - 1) > 0.005
    assert len(ours) == 6 * int(family[-1])
    assert ours.square().sum().item() == pytest.approx(1, abs=1e-7)
    assert ours.sum().item() == pytest.approx(2**0.5, abs=1e-6)
