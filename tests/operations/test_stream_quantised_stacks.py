"""Merging on disk into stacks of experts that are quantised: the numbers of merging in memory."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from inlay import LoraConfig, from_pretrained_quantized, get_peft_model, quantize_
from inlay.core.stores import store_of
from inlay.operations.stream_merge import StreamMerge

from .bases import load, mixtral, moved, saved

EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def config() -> LoraConfig:
    return LoraConfig(r=2, target_modules=["q_proj"], target_parameters=EXPERTS)


def merged_in_memory(tuned: Any, folder: Path, into: str) -> Any:
    """What an adapter that does something, and is saved to a folder, makes of its base."""
    moved(tuned)
    tuned.save_pretrained(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return tuned.merge_and_unload(base=into)


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize("to", ["nf4", "int8", "int4"])
def test_our_own(to: str, into: str, tmp_path: Path) -> None:
    model = load(saved(mixtral(), tmp_path / "dense", torch.float32))
    quantize_(model, to).save_pretrained(tmp_path / "base", max_shard_size="6KB")
    tuned = get_peft_model(from_pretrained_quantized(tmp_path / "base"), config())
    expected = merged_in_memory(tuned, tmp_path / "a", into)
    merge = StreamMerge(tmp_path / "base", [tmp_path / "a"], base_dtype=into)
    out = merge.run(tmp_path / "out")
    assert len(merge.changes) == 2 * 3
    found = from_pretrained_quantized(out) if into == "requantized" else load(out)
    own, names = dict(found.named_parameters()), [n for n, q in expected.named_parameters() if q.ndim > 1]
    assert len([n for n in names if "experts" in n]) == 4
    for name in names:
        path, leaf = name.rpartition(".")[::2]
        one, other = (store_of(m.get_submodule(path)).read(m.get_submodule(path), leaf) for m in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
        assert type(own[name].data) is type(expected.get_parameter(name).data)


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_bitsandbytes(into: str, tmp_path: Path) -> None:
    """Its linear layers are quantised; the stacks beside them stay dense."""
    from transformers import BitsAndBytesConfig

    # Its reader on CPUs takes blocks that span rows for others.
    dense = saved(mixtral(hidden_size=64, intermediate_size=64), tmp_path / "dense", torch.float32)
    asked: Any = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    load(dense, quantization_config=asked).save_pretrained(tmp_path / "base")
    tuned = get_peft_model(load(tmp_path / "base"), config())
    expected = merged_in_memory(tuned, tmp_path / "a", into)
    found = load(StreamMerge(tmp_path / "base", [tmp_path / "a"], base_dtype=into).run(tmp_path / "out"))
    names = [n for n, q in load(dense).named_parameters() if q.ndim > 1]
    for name in names:
        path, leaf = name.rpartition(".")[::2]
        one, other = (store_of(m.get_submodule(path)).read(m.get_submodule(path), leaf) for m in (found, expected))
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)
