"""Merging on disk into folders of GPTQ and AWQ, against their formats spelt out number by number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from inlay import LoraConfig
from inlay.cli.app import run
from inlay.formats.packed.words import pack, unpack
from inlay.operations.stream_merge import StreamMerge

from .bases import Quantised, adapter, both_dequantised, gpt2, llama, quantised_by, requantised, same_in_pieces

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def grid(w: Tensor, groups: np.ndarray, bits: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes ``(in, out)``, zeros and scales ``(groups, out)`` that span each group."""
    inputs, most = w.float().numpy().T, 2**bits - 1
    count = groups.max() + 1
    scales, zeros = np.zeros((count, w.shape[0]), np.float16), np.zeros((count, w.shape[0]), np.int64)
    for g in range(count):
        own = inputs[groups == g]
        low, high = np.minimum(own.min(0), 0), np.maximum(own.max(0), 0)
        scales[g] = (high - low) / most
        zeros[g] = np.clip(np.round(-low / scales[g].astype(np.float32)), 0, most)
    return on_grid(inputs, scales[groups], zeros[groups], most), zeros, scales


def on_grid(inputs: np.ndarray, scales: np.ndarray, zeros: np.ndarray, most: int) -> np.ndarray:
    return np.clip(np.round(inputs / scales.astype(np.float32) + zeros), 0, most).astype(np.int64)


def stream(codes: np.ndarray, bits: int) -> Tensor:
    """Each column as one long number, the first code in its lowest bits, cut into words of 32 bits."""
    words = np.zeros((codes.shape[0] * bits // 32, codes.shape[1]), np.uint32)
    for column in range(codes.shape[1]):
        number = sum(int(code) << (bits * i) for i, code in enumerate(codes[:, column]))
        for i in range(len(words)):
            words[i, column] = number >> (32 * i) & 0xFFFFFFFF
    return torch.from_numpy(words.view(np.int32))


def eight_outputs(codes: np.ndarray) -> Tensor:
    words = np.zeros((codes.shape[0], codes.shape[1] // 8), np.uint32)
    for place, output in enumerate(AWQ_ORDER):
        words |= (codes[:, output::8] << (4 * place)).astype(np.uint32)
    return torch.from_numpy(words.view(np.int32))


def meaning(codes: np.ndarray, zeros: np.ndarray, scales: np.ndarray, groups: np.ndarray) -> Tensor:
    return torch.from_numpy(((codes - zeros[groups]) * scales[groups].astype(np.float32)).T.copy())


def groups_of(inputs: int, size: int, mixed: bool) -> np.ndarray:
    groups = np.arange(inputs) // size
    return np.random.default_rng(1).permutation(groups) if mixed else groups


def gptq(bits: int, size: int, mixed: bool, less: int, transposed: bool = False) -> Any:
    def quantise(_: str, w: Tensor) -> Quantised:
        w = w.mT if transposed else w
        groups = groups_of(w.shape[1], size, mixed)
        codes, zeros, scales = grid(w, groups, bits)
        stored = (zeros - less) % 2**bits
        parts = {
            "qweight": stream(codes, bits), "qzeros": stream(stored.T, bits).T, "scales": torch.from_numpy(scales),
            "g_idx": torch.from_numpy(groups).int(),
        }  # fmt: skip
        found = meaning(codes, zeros, scales, groups)
        return parts, found.mT if transposed else found

    return quantise


def awq(size: int) -> Any:
    def quantise(_: str, w: Tensor) -> Quantised:
        groups = groups_of(w.shape[1], size, False)
        codes, zeros, scales = grid(w, groups, 4)
        parts = {"qweight": eight_outputs(codes), "qzeros": eight_outputs(zeros), "scales": torch.from_numpy(scales)}
        return parts, meaning(codes, zeros, scales, groups)

    return quantise


def wide() -> Any:
    return llama(hidden_size=64, intermediate_size=96)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("count", [32, 96])
def test_words(bits: int, count: int) -> None:
    codes = np.random.default_rng(0).integers(0, 2**bits, (count, 5))
    words = stream(codes, bits)
    assert torch.equal(unpack(words, bits), torch.from_numpy(codes).to(torch.uint8))
    assert torch.equal(pack(torch.from_numpy(codes).to(torch.uint8), bits), words)


@pytest.mark.parametrize(
    ("bits", "size", "mixed", "version"),
    [(4, 16, False, "gptq"), (4, 32, True, "gptq"), (3, 32, False, "gptq"), (8, 96, False, "gptq_v2"), (2, 16, True, "gptq_v2")],
)
def test_gptq(bits: int, size: int, mixed: bool, version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"quant_method": "gptq", "bits": bits, "group_size": size, "desc_act": mixed, "checkpoint_format": version}
    base, dense = quantised_by(gptq(bits, size, mixed, int(version == "gptq")), config, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)
    codes_are_nearest(*requantised(base, dense, folder, tmp_path), bits, int(version == "gptq"))
    same_in_pieces(base, folder, tmp_path, monkeypatch)


def codes_are_nearest(
    found: dict[str, Tensor], wanted: dict[str, Tensor], merge: StreamMerge, bits: int, less: int, transposed: bool = False
) -> None:
    for key, w in wanted.items():
        owner, inputs = key.removesuffix(".weight"), w.numpy() if transposed else w.numpy().T
        groups = found[f"{owner}.g_idx"].numpy()
        zeros = (unpack(found[f"{owner}.qzeros"].mT, bits).mT.numpy().astype(np.int64) + less) % 2**bits
        scales = found[f"{owner}.scales"].numpy()
        own = unpack(found[f"{owner}.qweight"], bits).numpy()
        # The sums of two ways may part at the middle between two codes.
        assert (on_grid(inputs, scales[groups], zeros[groups], 2**bits - 1) != own).mean() < 0.001
        error = (meaning(own, zeros, scales, groups).mT - torch.from_numpy(inputs)).norm() / w.norm()
        assert merge.rounding[key].of_weight == pytest.approx(error.item(), rel=1e-3)


def test_gptq_of_gpt2(tmp_path: Path) -> None:
    """Its layers keep ``(in, out)``."""

    def which(key: str) -> bool:
        return key.endswith(("c_attn.weight", "c_fc.weight", "c_proj.weight"))

    def make() -> Any:
        return gpt2(hidden_size=32)

    base, dense = quantised_by(gptq(4, 16, False, 1, transposed=True), {"quant_method": "gptq", "bits": 4}, tmp_path, make, which=which)
    folder = both_dequantised(base, dense, tmp_path, ("c_attn", "c_fc"))
    codes_are_nearest(*requantised(base, dense, folder, tmp_path), 4, 1, transposed=True)


def test_awq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}
    base, dense = quantised_by(awq(32), config, tmp_path, wide)
    folder = both_dequantised(base, dense, tmp_path)
    found, wanted, merge = requantised(base, dense, folder, tmp_path)
    for key, w in wanted.items():
        owner = key.removesuffix(".weight")
        scales, words = found[f"{owner}.scales"].numpy(), found[f"{owner}.qzeros"].numpy().view(np.uint32)
        zeros = np.zeros(scales.shape, np.int64)
        for place, output in enumerate(AWQ_ORDER):
            zeros[:, output::8] = words >> (4 * place) & 15
        groups = groups_of(w.shape[1], 32, False)
        codes = on_grid(w.numpy().T, scales[groups], zeros[groups], 15)
        assert (found[f"{owner}.qweight"] != eight_outputs(codes)).float().mean() < 0.01
        error = (meaning(codes, zeros, scales, groups) - w).norm() / w.norm()
        assert merge.rounding[key].of_weight == pytest.approx(error.item(), rel=1e-3)
    same_in_pieces(base, folder, tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "gptq, in the order of 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "awq, 4 bits in the order of 'gemv'"),
    ],
)
def test_other_orders_are_refused_with_the_remedy(config: dict[str, Any], said: str, tmp_path: Path) -> None:
    base, dense = quantised_by(awq(32), config, tmp_path, wide)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=f"{said}.*cannot be read.*--base-dtype original"):
        StreamMerge(base, [folder], base_dtype="dequantized")


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_on_the_command_line(into: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, dense = quantised_by(awq(32), {"quant_method": "awq", "bits": 4}, tmp_path, wide)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    words = ["merge", str(base), "--adapter", str(folder), "--out", str(tmp_path / "out"), "--base-dtype", into, "--verify", "--json"]
    assert run(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found.get("quantised") == ("awq 4 bits" if into == "requantized" else None)
    assert found["error"] < (0.5 if into == "requantized" else 5e-3)
