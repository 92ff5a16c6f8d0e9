"""Small models on disk, and adapters for them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2Model,
)

from inlay import LoraConfig, PeftModel, get_peft_model
from inlay.core.method import Method
from inlay.formats import streaming
from inlay.operations.stream_merge import StreamMerge

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}


def llama(**more: Any) -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, "num_key_value_heads": 1, **more}))


def gpt2(**more: Any) -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, **more))


def mixtral(**more: Any) -> nn.Module:
    return MixtralForCausalLM(
        MixtralConfig(**{**SIZES, "num_key_value_heads": 1, "num_local_experts": 3, "num_experts_per_tok": 2, **more})
    )


def speech() -> nn.Module:
    """A model with convolutions that does not say what its embeddings are."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 8}
    layers = {"conv_dim": (8, 8), "conv_kernel": (3, 3), "conv_stride": (2, 2), "num_feat_extract_layers": 2}
    positions = {"num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2Model(Wav2Vec2Config(**sizes, **layers, **positions))


def saved(model: nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Path:
    """A base on disk whose biases and norms say something."""
    generator = torch.Generator().manual_seed(3)
    for q in model.parameters():
        q.data = q.data + 0.05 * torch.randn(q.shape, generator=generator)
    model.to(dtype).save_pretrained(folder, **{"max_shard_size": "6KB", **options})  # type: ignore[operator]
    return folder


def load(folder: Path, cls: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return cls.from_pretrained(folder, dtype="auto", **options)


def moved(model: nn.Module, seed: int = 1) -> None:
    """Adapters as if they had been trained."""
    generator = torch.Generator().manual_seed(seed)
    for q in model.parameters():
        if q.requires_grad:
            q.data += 0.05 * torch.randn(q.shape, generator=generator).to(q)


def adapter(base: Path, folder: Path, config: Method, seed: int = 1, cls: Any = AutoModelForCausalLM, **options: Any) -> Path:
    tuned = get_peft_model(load(base, cls, **options), config)
    moved(tuned, seed)
    tuned.save_pretrained(folder)
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        found |= load_file(file)
    return found


def in_memory(base: Path, adapters: list[Path], folder: Path, weights: list[float] | None = None, **options: Any) -> Path:
    """What `merge_and_unload` and `save_pretrained` write."""
    cls = options.pop("cls", AutoModelForCausalLM)
    tuned = PeftModel.from_pretrained(load(base, cls, **options), adapters[0])
    names = ["default", *(f"adapter{i}" for i in range(1, len(adapters)))]
    for name, path in zip(names[1:], adapters[1:], strict=True):
        tuned.load_adapter(path, name)
    for name, weight in zip(names, weights or [1.0] * len(names), strict=True):
        tuned.set_scale(name, weight)
    tuned.merge_and_unload(adapter_names=names).save_pretrained(folder)
    return folder


def check_same(base: Path, out: Path, reference: Path) -> set[str]:
    """Bit-equal; the keys of what changed."""
    expected, found, before = tensors(reference), tensors(out), tensors(base)
    assert expected.keys() == found.keys()
    assert [k for k in expected if expected[k].dtype != found[k].dtype or not torch.equal(expected[k], found[k])] == []
    return {k for k in found if k not in before or not torch.equal(before[k], found[k])}


def both_ways(tmp_path: Path, base: Path, *adapters: Path, weights: list[float] | None = None, **options: Any) -> set[str]:
    reference = in_memory(base, list(adapters), tmp_path / "reference", weights, **options)
    out = StreamMerge(base, list(adapters), weights).run(tmp_path / "out")
    changed = check_same(base, out, reference)
    cls = options.get("cls", AutoModelForCausalLM)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load(out, cls)(ids).logits, load(reference, cls)(ids).logits)
    return changed


# What is folded in pieces: methods of each kind.
PIECEWISE: dict[str, tuple[str, dict[str, Any]]] = {
    "LORA": ("LORA", {}),
    "DORA": ("LORA", {"use_dora": True}),
    "LOHA": ("LOHA", {"r": 4}),
    "LOKR": ("LOKR", {"r": 4}),
    "OFT": ("OFT", {"oft_block_size": 4}),
    "BOFT": ("BOFT", {"boft_block_size": 4}),
    "HRA": ("HRA", {}),
    "VERA": ("VERA", {"r": 8}),
    "IA3": ("IA3", {"feedforward_modules": []}),
    "FOURIERFT": ("FOURIERFT", {"n_frequency": 50}),
    "WAVEFT": ("WAVEFT", {"n_frequency": 50}),
    "C3A": ("C3A", {"block_size": 8}),
    "ROAD": ("ROAD", {"group_size": 4}),
    "DEFT": ("DEFT", {}),
    "BAT": ("MISS", {"r": 4, "init_weights": "bat"}),
}


# ---- quantised by others ----------------------------------------------------------------------------------------------------
Quantised = tuple[dict[str, Tensor], Tensor]


def linear(key: str) -> bool:
    return key.endswith("proj.weight")


def written(folder: Path, config: dict[str, Any], found: dict[str, Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A model's folder with these tensors, in two files."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    keys = sorted(found)
    shards = [keys[: len(keys) // 2], keys[len(keys) // 2 :]]
    where = {k: f"model-{i:05d}-of-00002.safetensors" for i, part in enumerate(shards, 1) for k in part}
    for name in sorted(set(where.values())):
        save_file({k: found[k].contiguous() for k in keys if where[k] == name}, folder / name, {"format": "pt", **(metadata or {})})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def quantised_by(
    quantise: Callable[[str, Tensor], Quantised],
    config: dict[str, Any],
    tmp_path: Path,
    make: Callable[[], nn.Module] = llama,
    dtype: torch.dtype = torch.float16,
    which: Callable[[str], bool] = linear,
    metadata: dict[str, str] | None = None,
) -> tuple[Path, Path]:
    """A quantised folder, and one with the dense weights that it stands for.

    Args:
        quantise: gives the tensors of a weight by the ends of their keys (behind that of the module), and what they stand for.
    """
    origin = saved(make(), tmp_path / "origin", dtype)
    own, packed = tensors(origin), {}
    dense = dict(own)
    for key, w in own.items():
        if which(key):
            parts, dense[key] = quantise(key, w)
            packed |= {f"{key.rpartition('.')[0]}.{end}": t for end, t in parts.items()}
            dense[key] = dense[key].to(dtype)
        else:
            packed[key] = w
    said = json.loads((origin / "config.json").read_text())
    said |= {"dtype": str(dtype).removeprefix("torch.")}
    base = written(tmp_path / "base", said | {"quantization_config": config}, packed, metadata)
    return base, written(tmp_path / "dense", said, dense)


def both_dequantised(base: Path, dense: Path, tmp_path: Path, targets: Sequence[str] = ("q_proj", "down_proj"), **options: Any) -> Path:
    """Merging into the dense weights of a quantised base is merging into those weights; returns the adapter."""
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=list(targets), **options))
    out = StreamMerge(base, [folder], base_dtype="dequantized").run(tmp_path / "out")
    found, expected = tensors(out), tensors(StreamMerge(dense, [folder]).run(tmp_path / "expected"))
    assert found.keys() == expected.keys()
    assert [k for k in found if found[k].dtype != expected[k].dtype or not torch.equal(found[k], expected[k])] == []
    assert [k for k in found if not torch.equal(found[k], tensors(dense)[k])] != []
    assert "quantization_config" not in json.loads((out / "config.json").read_text())
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert load(out)(ids).logits.isfinite().all()
    return folder


def requantised(base: Path, dense: Path, folder: Path, tmp_path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor], StreamMerge]:
    """The tensors of a merge that quantises again, and what was to be quantised, in full precision."""
    merge = StreamMerge(base, [folder], base_dtype="requantized")
    found = tensors(merge.run(tmp_path / "again"))
    before = tensors(base)
    assert {k: (t.dtype, t.shape) for k, t in found.items()} == {k: (t.dtype, t.shape) for k, t in before.items()}
    wanted = tensors(StreamMerge(dense, [folder], out_dtype=torch.float32).run(tmp_path / "wanted"))
    assert set(merge.rounding) == {c.name for c in merge.changes}
    return found, {k: wanted[k] for k in merge.rounding}, merge


def same_in_pieces(base: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The merges of `both_dequantised` and `requantised` again, a few rows at a time; sums may round otherwise."""
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 1000)
    for into, whole in (("dequantized", "out"), ("requantized", "again")):
        found = tensors(StreamMerge(base, [folder], base_dtype=into).run(tmp_path / f"{whole}-pieces"))
        for key, expected in tensors(tmp_path / whole).items():
            codes = key.endswith("W_q") or not expected.is_floating_point() or expected.itemsize == 1
            one, other = (t.reshape(-1).view(torch.uint8) if codes else t for t in (found[key], expected))
            assert (one.sub(other).abs() > (0 if codes else 1e-5)).float().mean() < 0.01, key
            assert codes or (one - other).abs().max() <= 2**-7 * other.abs().max(), key


def requantised_in_pieces(base: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes, and what rounding lost, are those of the whole weight, but for last digits of the products."""
    whole = StreamMerge(base, [tuned], base_dtype="requantized")
    expected = tensors(whole.run(tmp_path / "whole"))
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    pieces = StreamMerge(base, [tuned], base_dtype="requantized")
    found = tensors(pieces.run(tmp_path / "out"))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-6, atol=1e-8)
        elif "quant_state" not in key:
            assert (tensor != expected[key]).float().mean() < 0.01, key
    for key, told in pieces.rounding.items():
        other = whole.rounding[key]
        assert (told.error, told.weight, told.change) == pytest.approx((other.error, other.weight, other.change), rel=1e-4)
