"""Merging on disk some rows of a weight at a time gives what merging it whole gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Wav2Vec2Model

from inlay import LoraConfig, PeftModel, quantize_
from inlay.core.method import METHODS
from inlay.formats import streaming
from inlay.operations.stream_merge import StreamMerge

from .bases import PIECEWISE, adapter, both_ways, gpt2, in_memory, llama, load, mixtral, requantised_in_pieces, saved, speech, tensors


def test_large_weights_go_in_slices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    base = saved(llama(tie_word_embeddings=True), tmp_path / "base")
    options = {"target_modules": ["q_proj", "embed_tokens", "down_proj"], "ensure_weight_tying": True}
    both_ways(tmp_path, base, adapter(base, tmp_path / "a", LoraConfig(r=2, **options)))  # type: ignore[arg-type]


def one_ulp(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Products of some rows may round their last digit in another way than products of all."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=2**-7, atol=1e-7)
        assert (tensor != expected[key]).float().mean() < 0.01, key


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", PIECEWISE)
def test_rows_in_pieces(name: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    base = saved(make(**({"attention_bias": True} if make is llama else {})), tmp_path / "base")
    method, options = PIECEWISE[name]
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn", "mlp.c_proj"]
    folder = adapter(base, tmp_path / "a", METHODS[method](target_modules=targets, **options))  # type: ignore[call-arg]
    out = StreamMerge(base, [folder]).run(tmp_path / "out")
    one_ulp(tensors(out), tensors(in_memory(base, [folder], tmp_path / "reference")))


@pytest.mark.parametrize("name", PIECEWISE)
def test_convolutions_in_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    base = saved(speech(), tmp_path / "base")
    method, options = PIECEWISE[name]
    config = METHODS[method](target_modules=["conv_layers.1.conv"], **options)  # type: ignore[call-arg]
    folder = adapter(base, tmp_path / "a", config, cls=Wav2Vec2Model)
    out = StreamMerge(base, [folder]).run(tmp_path / "out")
    one_ulp(tensors(out), tensors(in_memory(base, [folder], tmp_path / "reference", cls=Wav2Vec2Model)))


@pytest.mark.parametrize(("to", "double"), [("nf4", True), ("nf4", False), ("int8", True)])
@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("name", ["LORA", "LOHA", "HRA"])
def test_quantised_rows_in_pieces(name: str, make: Any, to: str, double: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tmp_path / "base"
    quantize_(load(saved(make(), tmp_path / "dense", torch.float32)), to, double=double).save_pretrained(base)
    method, options = PIECEWISE[name]
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn", "mlp.c_proj"]
    folder = adapter(tmp_path / "dense", tmp_path / "a", METHODS[method](target_modules=targets, **options))  # type: ignore[call-arg]
    requantised_in_pieces(base, folder, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", PIECEWISE)
def test_experts_one_by_one_in_pieces(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One expert after another, and some rows of each."""
    base = saved(mixtral(), tmp_path / "base", save_original_format=True)
    assert any("experts.0.w1.weight" in key for key in tensors(base))
    method, options = PIECEWISE[name]
    stacks = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    folder = adapter(base, tmp_path / "a", METHODS[method](target_parameters=stacks, target_modules=["q_proj"], **options))  # type: ignore[call-arg]
    PeftModel.from_pretrained(load(base), folder).merge_and_unload().save_pretrained(tmp_path / "reference", save_original_format=True)
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    one_ulp(tensors(StreamMerge(base, [folder]).run(tmp_path / "out")), tensors(tmp_path / "reference"))


@pytest.mark.parametrize("make", [llama, gpt2])
@pytest.mark.parametrize("how", ["linear", "cat", "ties", "ties_svd"])
def test_one_change_in_pieces(how: str, make: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = saved(make(), tmp_path / "base", torch.float32)
    targets = ["q_proj", "embed_tokens", "down_proj"] if make is llama else ["c_attn", "wte"]
    bias = "none" if make is llama else "lora_only"
    both = [adapter(base, tmp_path / str(r), LoraConfig(r=r, target_modules=targets, bias=bias), seed=r) for r in (2, 3)]
    whole = tensors(StreamMerge(base, both, [0.7, 0.3], combine=how).run(tmp_path / "whole"))
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    found = tensors(StreamMerge(base, both, [0.7, 0.3], combine=how).run(tmp_path / "out"))
    assert found.keys() == whole.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, whole[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("name", ["LORA", "OFT", "HRA"])
def test_wider_numbers_are_those_of_the_fold(name: str, large: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of a bfloat16 base in float32: the fold itself, before it is rounded to the base's numbers."""
    base = saved(gpt2(), tmp_path / "base")
    method, options = PIECEWISE[name]
    folder = adapter(base, tmp_path / "a", METHODS[method](target_modules=["c_attn", "mlp.c_proj"], **options))  # type: ignore[call-arg]
    if large:
        monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    found = tensors(StreamMerge(base, [folder], out_dtype=torch.float32).run(tmp_path / "out"))
    expected = PeftModel.from_pretrained(load(base).float(), folder).merge_and_unload().state_dict()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-7)
    changed = [key for key in found if "c_attn.weight" in key]
    assert all(not torch.equal(found[key], found[key].bfloat16().float()) for key in changed)


def test_a_bias_alone_leaves_the_weight_where_it_is(tmp_path: Path) -> None:
    base = saved(llama(attention_bias=True), tmp_path / "base")
    merge = StreamMerge(base, [adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"], bias="all"))])
    assert {n.split(".", 3)[3] for u in merge.units for p in u.places for n in merge.touched(p)} >= {"self_attn.k_proj.bias"}
    assert not any("k_proj.weight" in n for u in merge.units for p in u.places for n in merge.touched(p))
