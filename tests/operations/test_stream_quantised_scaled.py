"""Merging on disk into folders with eight-bit floating point and whole numbers, against the libraries that write and read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay import LoraConfig
from inlay.operations.stream_merge import StreamMerge
from inlay.stores.torchao import MAKERS

from .bases import (
    Quantised,
    adapter,
    both_dequantised,
    linear,
    llama,
    load,
    mixtral,
    quantised_by,
    requantised,
    same_in_pieces,
    saved,
    tensors,
    written,
)

MOST = 448.0


def wide() -> Any:
    return llama(hidden_size=64, intermediate_size=96)


# ---- transformers' FP8 --------------------------------------------------------------------------------------------------------
def by_blocks(w: Tensor, block: tuple[int, int], exponents: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales, and what they stand for, block by block."""
    w = w.float()
    rows, columns = -(-w.shape[0] // block[0]), -(-w.shape[1] // block[1])
    codes, scales, found = torch.empty(w.shape, dtype=torch.float8_e4m3fn), torch.empty(rows, columns), torch.empty(w.shape)
    for i in range(rows):
        for j in range(columns):
            at = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            scale = w[at].abs().max() / MOST
            scale = torch.exp2(scale.log2().ceil()) if exponents else scale
            scales[i, j] = scale
            codes[at] = (w[at] / scale).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
            found[at] = codes[at].float() * scale
    return codes, scales, found


def fp8(block: tuple[int, int], scales: torch.dtype = torch.float32) -> Any:
    def quantise(_: str, w: Tensor) -> Quantised:
        codes, scale, found = by_blocks(w, block, scales != torch.float32)
        kept = (scale.log2() + 127).to(torch.uint8) if scales == torch.uint8 else scale.to(scales)
        return {"weight": codes, "weight_scale_inv": kept if kept.numel() > 1 else kept.view(())}, found

    return quantise


@pytest.mark.parametrize(
    ("block", "scales"),
    [
        ((32, 32), torch.float32),
        ((48, 40), torch.float32),
        ((1000, 1000), torch.float32),
        ((32, 32), torch.uint8),
        ((32, 32), torch.float8_e8m0fnu),
    ],
)
def test_fp8(block: tuple[int, int], scales: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = block == (1000, 1000)
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None if whole else list(block)}
    base, dense = quantised_by(fp8(block, scales), config, tmp_path, wide, torch.bfloat16)
    folder = both_dequantised(base, dense, tmp_path)
    found, wanted, merge = requantised(base, dense, folder, tmp_path)
    for key, w in wanted.items():
        codes, scale, meaning = by_blocks(w, block, scales != torch.float32)
        kept = found[f"{key}_scale_inv"]
        kept = (kept.float() - 127).exp2() if scales == torch.uint8 else kept.float()
        torch.testing.assert_close(kept.view(scale.shape), scale, rtol=1e-6, atol=0)
        assert (found[key].float() != codes.float()).float().mean() < 0.001
        error = ((meaning - w).norm() / w.norm()).item()
        assert merge.rounding[key].of_weight == pytest.approx(error, rel=1e-3)
        assert 0.01 < error < 0.05
    same_in_pieces(base, folder, tmp_path, monkeypatch)


def test_fp8_as_transformers_reads_it(tmp_path: Path) -> None:
    """What is written again is a model to transformers, and what is written dense is what it makes of it where there is no GPU."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    base, dense = quantised_by(fp8((32, 32)), config, tmp_path, wide, torch.bfloat16)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    again = StreamMerge(base, [folder], base_dtype="requantized").run(tmp_path / "again")
    theirs, expected = load(base).state_dict(), tensors(dense)
    assert [k for k in expected if not torch.equal(theirs[k], expected[k])] == []
    merged = load(again).state_dict()
    assert [k for k in expected if not torch.equal(merged[k], expected[k])] == [k for k in expected if "q_proj" in k]


def test_codes_and_scales_keep_their_dtypes(tmp_path: Path) -> None:
    """Another dtype is for what is not quantised."""
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [32, 32]}
    base, dense = quantised_by(fp8((32, 32)), config, tmp_path, wide, torch.bfloat16)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    expected = tensors(StreamMerge(base, [folder], base_dtype="requantized").run(tmp_path / "as-it-is"))
    found = tensors(StreamMerge(base, [folder], out_dtype=torch.float32, base_dtype="requantized").run(tmp_path / "other"))
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        assert torch.equal(tensor.float(), expected[key].float())
        assert tensor.dtype == (torch.float32 if "proj.weight" not in key else expected[key].dtype)


def test_fp8_experts_one_by_one(tmp_path: Path) -> None:
    """Codes of single experts, and their scales, become the stack that the model has, and single ones again."""

    def which(key: str) -> bool:
        return ".experts." in key

    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    base, dense = quantised_by(fp8((8, 8)), config, tmp_path, mixtral, torch.bfloat16, which)
    options: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    folder = both_dequantised(base, dense, tmp_path, ["q_proj"], **options)
    merge = StreamMerge(base, [folder], base_dtype="requantized")
    found, before = tensors(merge.run(tmp_path / "again")), tensors(base)
    wanted = tensors(StreamMerge(dense, [folder]).run(tmp_path / "wanted"))
    assert len(merge.rounding) == 2 * 3 * 3
    for key in merge.rounding:
        codes, scale, _ = by_blocks(wanted[key], (8, 8))
        assert torch.equal(found[key].float(), codes.float())
        torch.testing.assert_close(found[f"{key}_scale_inv"], scale, rtol=1e-6, atol=0)
    assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in before.items()}


def test_fp8_stacks(tmp_path: Path) -> None:
    """Stacks with their own scales ``<name>_scale_inv``."""
    origin = load(saved(mixtral(), tmp_path / "origin", torch.bfloat16))
    own, packed = dict(origin.state_dict()), {}
    dense = dict(own)
    for key, w in own.items():
        if ".experts." not in key:
            packed[key] = w
            continue
        made = [by_blocks(matrix, (8, 8)) for matrix in w]
        packed[key], packed[f"{key}_scale_inv"] = torch.stack([m[0] for m in made]), torch.stack([m[1] for m in made])
        dense[key] = torch.stack([m[2] for m in made]).to(w.dtype)
    said = json.loads((tmp_path / "origin" / "config.json").read_text())
    config = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}
    base = written(tmp_path / "base", said | {"quantization_config": config}, packed)
    plain = written(tmp_path / "dense", said, dense)
    options: dict[str, Any] = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    folder = both_dequantised(base, plain, tmp_path, ["q_proj"], **options)
    merge = StreamMerge(base, [folder], base_dtype="requantized")
    found, wanted = (
        tensors(merge.run(tmp_path / "again")),
        tensors(StreamMerge(plain, [folder], out_dtype=torch.float32).run(tmp_path / "w")),
    )
    assert len(merge.rounding) == 2 * 2
    for key in merge.rounding:
        for matrix, codes, scale in zip(wanted[key], found[key], found[f"{key}_scale_inv"], strict=True):
            expected = by_blocks(matrix, (8, 8))
            assert (codes.float() != expected[0].float()).float().mean() < 0.01
            torch.testing.assert_close(scale, expected[1], rtol=1e-5, atol=0)


# ---- compressed-tensors -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["fp8 of rows", "fp8", "int8 of rows"])
def test_compressed_tensors(kind: str, tmp_path: Path) -> None:
    def quantise(_: str, w: Tensor) -> Quantised:
        w = w.float()
        largest = w.abs().amax(1, keepdim=True) if "rows" in kind else w.abs().amax().view(1)
        if kind.startswith("fp8"):
            scale = (largest / MOST).bfloat16()
            codes = (w / scale.float()).clamp(-MOST, MOST).to(torch.float8_e4m3fn)
        else:
            scale = (largest / 127.5).bfloat16()
            codes = (w / scale.float()).round().clamp(-128, 127).to(torch.int8)
        return {"weight": codes, "weight_scale": scale}, codes.float() * scale.float()

    weights = {"num_bits": 8, "type": "float" if "fp8" in kind else "int", "strategy": "channel", "symmetric": True}
    layout = "float-quantized" if "fp8" in kind else "int-quantized"
    config = {"quant_method": "compressed-tensors", "format": layout, "config_groups": {"group_0": {"weights": weights}}}
    base, dense = quantised_by(quantise, config, tmp_path, wide, torch.bfloat16)
    folder = both_dequantised(base, dense, tmp_path)
    found, wanted, merge = requantised(base, dense, folder, tmp_path)
    for key, w in wanted.items():
        parts, meaning = quantise(key, w)
        torch.testing.assert_close(found[f"{key}_scale"], parts["weight_scale"], rtol=2**-8, atol=0)
        assert merge.rounding[key].of_weight == pytest.approx(((meaning - w).norm() / w.norm()).item(), rel=0.05)


# ---- torchao ---------------------------------------------------------------------------------------------------------------------
def asked(name: str) -> Any:
    from torchao import quantization

    few: dict[int, Any] = {bits: getattr(torch, f"int{bits}") for bits in (3, 4)}
    return {
        "int8": lambda: quantization.Int8WeightOnlyConfig(version=2),
        "int8 in groups": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerGroup(32), version=2),
        "int8 as one": lambda: quantization.Int8WeightOnlyConfig(granularity=quantization.PerTensor(), version=2),
        "int8 inputs": lambda: quantization.Int8DynamicActivationInt8WeightConfig(version=2),
        "int4 in bytes": lambda: quantization.IntxWeightOnlyConfig(few[4], quantization.PerGroup(32)),
        "int3 with zeros": lambda: quantization.IntxWeightOnlyConfig(
            few[3], quantization.PerGroup(16), mapping_type=quantization.MappingType.ASYMMETRIC
        ),
        "float8": lambda: quantization.Float8WeightOnlyConfig(),
    }[name]()


TORCHAO = ["int8", "int8 in groups", "int8 as one", "int8 inputs", "int4 in bytes", "int3 with zeros", "float8"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", TORCHAO)
def test_torchao(name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TorchAoConfig

    origin = saved(wide(), tmp_path / "origin", dtype)
    base = tmp_path / "base"
    model = load(origin, quantization_config=TorchAoConfig(asked(name)))
    model.save_pretrained(base, max_shard_size="20KB")
    said = json.loads((origin / "config.json").read_text())
    dense = written(tmp_path / "dense", said, {k: t.dequantize() if linear(k) else t for k, t in model.state_dict().items()})
    folder = both_dequantised(base, dense, tmp_path)
    _, wanted, merge = requantised(base, dense, folder, tmp_path)
    theirs = load(tmp_path / "again").state_dict()
    own: Any
    other: Any
    for key, w in wanted.items():
        own, other = theirs[key], MAKERS[type(theirs[key]).__name__](model.get_parameter(key), w)
        assert type(own) is type(other)
        error, best = ((t.dequantize().float() - w).norm() / w.norm() for t in (own, other))
        assert error <= best * (1.001 if dtype == torch.float32 else 1.05)
        if dtype == torch.float32 and name != "int3 with zeros":
            assert (own.qdata.float() != other.qdata.float()).float().mean() < 0.001
            torch.testing.assert_close(own.scale, other.scale, rtol=1e-6, atol=0)
        # Reading it gives numbers of the weight's dtype, which rounds once more.
        assert merge.rounding[key].of_weight == pytest.approx(error.item(), rel=1e-3 if dtype == torch.float32 else 0.06)
    if name != "int8 as one":
        same_in_pieces(base, folder, tmp_path, monkeypatch)


def halves(_: str, w: Tensor) -> Quantised:
    """Int4Tensor's numbers: codes from -8 to 7 of which a byte has two, and what a code means is ``code * scale + zero``."""
    groups = w.float().view(w.shape[0], -1, 32)
    low, high = groups.amin(-1), groups.amax(-1)
    scale = (high - low).clamp(min=1e-6) / 15
    zero = low + scale * 8
    codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).to(torch.int8).flatten(1) - 8
    scale, zero = scale.bfloat16(), zero.bfloat16()
    parts = {"_weight_qdata": (codes[:, ::2] & 15) | (codes[:, 1::2] << 4), "_weight_scale": scale.mT, "_weight_zero_point": zero.mT}
    return parts, (codes.view(groups.shape).float() * scale.float()[..., None] + zero.float()[..., None]).flatten(1)


def described(kind: str, keys: dict[str, Tensor], **more: Any) -> dict[str, str]:
    """The header of a file."""
    found = {}
    for key, w in keys.items():
        said = {"block_size": [1, 32], "shape": list(w.shape), **more}
        found[key] = json.dumps({"_type": kind, "_data": said} if linear(key) else {"_type": "Tensor"})
    return found | {"tensor_names": json.dumps(list(keys))}


def test_torchao_int4(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    metadata = described("Int4Tensor", wide().state_dict())
    base, dense = quantised_by(halves, {"quant_method": "torchao"}, tmp_path, wide, torch.bfloat16, metadata=metadata)
    folder = both_dequantised(base, dense, tmp_path)
    found, wanted, merge = requantised(base, dense, folder, tmp_path)
    for key, w in wanted.items():
        parts, meaning = halves(key, w)
        owner = key.removesuffix("weight")
        assert (found[f"{owner}_weight_qdata"] != parts["_weight_qdata"]).float().mean() < 0.01
        for end in ("_weight_scale", "_weight_zero_point"):
            torch.testing.assert_close(found[owner + end], parts[end], rtol=2**-7, atol=1e-6)
        assert merge.rounding[key].of_weight == pytest.approx(((meaning - w).norm() / w.norm()).item(), rel=1e-2)
    same_in_pieces(base, folder, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("kind", "more", "said"),
    [
        ("Int4TilePackedTo4dTensor", {}, "torchao, with a Int4TilePackedTo4dTensor for 'model.*cannot be read.*--base-dtype original"),
        ("Int4Tensor", {"activation_dtype": {"_type": "torch.dtype", "_data": "float8_e4m3fn"}}, "its scales fit inputs in eight bits"),
    ],
)
def test_torchao_refusals(kind: str, more: dict[str, Any], said: str, tmp_path: Path) -> None:
    metadata = described(kind, wide().state_dict(), **more)
    base, dense = quantised_by(halves, {"quant_method": "torchao"}, tmp_path, wide, torch.bfloat16, metadata=metadata)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=said):
        StreamMerge(base, [folder], base_dtype="requantized")


def test_compressed_tensors_of_several_codes_in_a_number_are_refused(tmp_path: Path) -> None:
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}
    base, dense = quantised_by(lambda _, w: ({"weight_packed": w}, w), config, tmp_path, wide)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="compressed-tensors, pack-quantized.*cannot be read.*--base-dtype original"):
        StreamMerge(base, [folder], base_dtype="dequantized")
