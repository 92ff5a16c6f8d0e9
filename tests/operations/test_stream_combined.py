"""Combinations on disk, of which no whole change is in memory, give what they give in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, Wav2Vec2Model

from inlay import LoraConfig, PeftModel
from inlay.core.method import METHODS, Method
from inlay.formats import streaming
from inlay.operations.arithmetic import COMBINATIONS, Options
from inlay.operations.slicing import Sliced, by_slices
from inlay.operations.stream_merge import StreamMerge

from .bases import PIECEWISE, adapter, gpt2, llama, load, mixtral, saved, speech, tensors

WEIGHTS = [0.7, 0.3]
# Rules that read only what is in front of them, and those that know the whole to the bit.
EXACT = {name for name, c in COMBINATIONS.items() if c.space in ("factors", "sum", "delta") and "sce" not in name}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 0.77, 1.0])
@pytest.mark.parametrize("name", [name for name, c in COMBINATIONS.items() if c.space in ("factors", "sum", "delta")])
def test_rules_on_slices(name: str, density: float, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 256)
    t = torch.randn(3, 21, 10, generator=torch.Generator().manual_seed(3), dtype=dtype)
    # Equal magnitudes, zeros, and numbers that differ in their lowest bits alone.
    t[0, ::3, :4], t[1, 5:9] = 0.5, 0
    t[2, 3:12, 1:7] = 1 + torch.arange(54).view(9, 6) * torch.finfo(dtype).eps
    w = torch.tensor([0.7, 0.4, 1.5], dtype=dtype)

    def options() -> Options:
        return Options(density=density, gamma=0.1, generator=torch.Generator().manual_seed(5))

    expected = COMBINATIONS[name].rule(t, w, options())
    found = by_slices(COMBINATIONS[name].rule, 3, Sliced(t.shape[1:], lambda rows: t[:, rows]), w, options())
    for _ in range(2):
        if name in EXACT:
            assert torch.equal(found.whole(), expected)
        else:
            torch.testing.assert_close(found.whole(), expected, rtol=1e-6, atol=1e-6)


def config(name: str, **more: Any) -> Method:
    method, options = PIECEWISE[name]
    return METHODS[method](**options, **more)  # type: ignore[call-arg]


def check(tmp_path: Path, base: Path, folders: list[Path], how: str, cls: Any = AutoModelForCausalLM) -> None:
    more = {"density": 0.6, "seed": 3} if COMBINATIONS[how].prunes else {}
    tuned = PeftModel.from_pretrained(load(base, cls), folders[0])
    tuned.load_adapter(folders[1], "other")
    ranks = {"svd_rank": 1.0} if COMBINATIONS[how].fixed_rank else {}
    tuned.add_weighted_adapter(["default", "other"], WEIGHTS, "both", how, **more, **ranks)
    tuned.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "reference")
    expected, before = tensors(tmp_path / "reference"), tensors(base)
    found = tensors(StreamMerge(base, folders, WEIGHTS, combine=how, **more).run(tmp_path / "out"))
    assert expected.keys() == found.keys()
    assert any(not torch.equal(found[key], before[key]) for key in before)
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("how", ["linear", "ties", "dare_ties", "sce", "svd"])
@pytest.mark.parametrize("names", [("LORA", "LORA"), ("LOHA", "DORA")])
def test_convolutions(names: tuple[str, str], how: str, tmp_path: Path) -> None:
    base = saved(speech(), tmp_path / "base", torch.float32)
    configs = [config(name, target_modules=["conv_layers.1.conv"]) for name in names]
    folders = [adapter(base, tmp_path / f"a{i}", each, seed=i, cls=Wav2Vec2Model) for i, each in enumerate(configs)]
    check(tmp_path, base, folders, how, Wav2Vec2Model)


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 512)


@pytest.mark.parametrize("how", COMBINATIONS)
@pytest.mark.parametrize("names", [("LORA", "LORA"), ("LOHA", "HRA")], ids="-".join)
def test_every_combination(names: tuple[str, str], how: str, tmp_path: Path) -> None:
    base = saved(llama(num_hidden_layers=1), tmp_path / "base", torch.float32)
    folders = [
        adapter(base, tmp_path / str(i), config(name, target_modules=["q_proj", "down_proj"]), i + 1) for i, name in enumerate(names)
    ]
    check(tmp_path, base, folders, how)


MODELS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any]]] = {
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"]}),
    "biases": (lambda: llama(num_hidden_layers=1, attention_bias=True), {"target_modules": ["q_proj", "v_proj"]}),
    "embeddings": (lambda: llama(num_hidden_layers=1), {"target_modules": ["embed_tokens"]}),
    "experts": (
        lambda: mixtral(num_hidden_layers=1),
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


@pytest.mark.parametrize("how", ["linear", "ties", "dare_ties_svd", "della", "sce", "slerp"])
@pytest.mark.parametrize("model", MODELS)
def test_layouts(model: str, how: str, tmp_path: Path) -> None:
    make, fields = MODELS[model]
    base = saved(make(), tmp_path / "base", torch.float32)
    folders = [adapter(base, tmp_path / str(i), config("LOHA", **fields), i + 1) for i in range(2)]
    check(tmp_path, base, folders, how)


ONCE: dict[str, Any] = {"num_hidden_layers": 1}
HEAD: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
WORDS: dict[str, Any] = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}
# The base, and what the adapters retrain or adapt.
RETRAINED: dict[str, tuple[Callable[[], nn.Module], list[dict[str, Any]]]] = {
    "a head": (lambda: llama(**ONCE), [HEAD, HEAD]),
    "a tied head": (lambda: llama(**ONCE, tie_word_embeddings=True), [HEAD, HEAD]),
    "an adapted head": (lambda: llama(**ONCE), [HEAD, {"target_modules": ["q_proj", "lm_head"]}]),
    "adapted embeddings": (lambda: llama(**ONCE), [{"target_modules": ["embed_tokens"]}, WORDS]),
    "tokens": (lambda: llama(**ONCE), [WORDS, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 4]}]),
    "attentions with biases": (
        lambda: llama(**ONCE, attention_bias=True),
        [{"target_modules": ["up_proj"], "modules_to_save": ["self_attn"]}] * 2,
    ),
    "experts": (lambda: mixtral(**ONCE), [{"target_modules": ["q_proj"], "modules_to_save": ["mlp"]}] * 2),
    "an adapted Conv1D": (gpt2, [{"target_modules": ["c_attn"], "modules_to_save": ["c_fc"]}, {"target_modules": ["c_fc"]}]),
}


@pytest.mark.parametrize("how", ["cat", "ties", "dare_linear", "sce_svd", "karcher"])
@pytest.mark.parametrize("what", RETRAINED)
def test_retrained_modules(what: str, how: str, tmp_path: Path) -> None:
    make, both = RETRAINED[what]
    base = saved(make(), tmp_path / "base", torch.float32)
    folders = [adapter(base, tmp_path / str(i), LoraConfig(r=2, **fields), i + 1) for i, fields in enumerate(both)]
    check(tmp_path, base, folders, how)


@pytest.mark.parametrize("name", PIECEWISE)
def test_methods(name: str, tmp_path: Path) -> None:
    base = saved(llama(num_hidden_layers=1), tmp_path / "base", torch.float32)
    targets = ["q_proj", "down_proj"]
    folders = [adapter(base, tmp_path / str(i), config(n, target_modules=targets), i + 1) for i, n in enumerate((name, "LOKR"))]
    check(tmp_path, base, folders, "cat")
