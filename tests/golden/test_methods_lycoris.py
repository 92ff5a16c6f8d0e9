"""LoHa and LoKr, to and from the real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay

from .models import MODELS
from .support import WEIGHTS, both_ways, close, jitter, merged, outputs, same_steps

LLAMA = ["q_proj", "v_proj", "down_proj"]
CONVOLUTIONS = ["line", "plane", "plain", "head"]

LOHA: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("llama", {}),
    "alpha": ("llama", {"r": 3, "alpha": 7, "target_modules": LLAMA}),
    "wide": ("llama", {"r": 12, "target_modules": LLAMA}),
    "patterns": ("llama", {"r": 2, "target_modules": LLAMA, "rank_pattern": {"down_proj": 4}, "alpha_pattern": {"^.*0.*q_proj": 3}}),
    "random": ("llama", {"r": 2, "init_weights": False, "target_modules": "all-linear"}),
    "dropouts": ("llama", {"r": 2, "rank_dropout": 0.2, "module_dropout": 0.1}),
    "bert": ("bert", {"r": 2, "task_type": "SEQ_CLS"}),
    "convolutions": ("convolutions", {"r": 2, "target_modules": CONVOLUTIONS}),
    "cores": ("convolutions", {"r": 2, "alpha": 3, "target_modules": CONVOLUTIONS, "use_effective_conv2d": True}),
    "grouped": ("grouped", {"r": 2, "target_modules": ["line", "plane"]}),
    "grouped-cores": ("grouped", {"r": 2, "target_modules": ["line", "plane"], "use_effective_conv2d": True}),
}
LOKR: dict[str, tuple[str, dict[str, Any]]] = {
    "defaults": ("llama", {}),
    "low-rank": ("llama", {"r": 1, "alpha": 3, "target_modules": LLAMA}),
    "lycoris": ("llama", {"r": 1, "init_weights": "lycoris", "target_modules": LLAMA}),
    "random": ("llama", {"r": 1, "init_weights": False, "target_modules": LLAMA}),
    "factor": ("llama", {"r": 2, "decompose_factor": 2, "target_modules": LLAMA}),
    "factor-not-dividing": ("llama", {"r": 1, "decompose_factor": 5, "target_modules": LLAMA}),
    "factor-above-root": ("llama", {"r": 1, "decompose_factor": 8, "target_modules": LLAMA}),
    "both": ("llama", {"r": 1, "decompose_both": True, "target_modules": LLAMA}),
    "patterns": ("llama", {"r": 1, "target_modules": LLAMA, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"v_proj": 3}}),
    "dropouts": ("llama", {"r": 1, "rank_dropout": 0.2, "module_dropout": 0.1, "rank_dropout_scale": True}),
    "bert": ("bert", {"r": 1, "task_type": "SEQ_CLS"}),
    "convolutions": ("convolutions", {"r": 1, "target_modules": CONVOLUTIONS, "decompose_factor": 1}),
    "convolutions-whole": ("convolutions", {"r": 8, "target_modules": ["plane", "plain", "head"]}),
    "cores": ("convolutions", {"r": 1, "target_modules": CONVOLUTIONS, "decompose_factor": 1, "use_effective_conv2d": True}),
    "grouped": ("grouped", {"r": 1, "target_modules": ["line", "plane"], "decompose_factor": 1}),
    "grouped-cores": ("grouped", {"r": 1, "target_modules": ["plane"], "decompose_factor": 2, "use_effective_conv2d": True}),
}


class Grouped(nn.Module):
    """Convolutions with groups, which HF's LoHa and LoKr see as one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(4, 8, 3, padding=1, groups=2)
        self.plane = nn.Conv2d(8, 12, (3, 2), padding=1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.plane(torch.tanh(self.line(x)).unsqueeze(-1)).flatten(1)


@pytest.fixture(autouse=True)
def grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    def build() -> nn.Module:
        torch.manual_seed(5)
        return Grouped().eval()

    def example() -> dict[str, Tensor]:
        return {"x": torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(7))}

    monkeypatch.setitem(MODELS, "grouped", (build, example))


@pytest.mark.parametrize("case", LOHA)
def test_loha(case: str, tmp_path: Path) -> None:
    model, options = LOHA[case]
    both_ways(model, "LoHaConfig", tmp_path, **options)


@pytest.mark.parametrize("case", LOKR)
def test_lokr(case: str, tmp_path: Path) -> None:
    model, options = LOKR[case]
    both_ways(model, "LoKrConfig", tmp_path, **options)


@pytest.mark.parametrize("case", ["alpha", "wide", "convolutions", "cores", "grouped"])
def test_loha_steps(case: str, tmp_path: Path) -> None:
    model, options = LOHA[case]
    same_steps(model, "LoHaConfig", tmp_path, **options)


@pytest.mark.parametrize("case", ["defaults", "low-rank", "both", "convolutions", "cores", "grouped"])
def test_lokr_steps(case: str, tmp_path: Path) -> None:
    model, options = LOKR[case]
    same_steps(model, "LoKrConfig", tmp_path, **options)


def test_lokr_with_a_whole_w2_on_conv1d(tmp_path: Path) -> None:
    """HF gives `torch.kron` a matrix and a tensor of three axes, which puts the matrix on columns and kernel and not on rows and
    columns; LyCORIS, where the method comes from, and its own Conv2d put it on rows and columns. So does Inlay."""
    build, example = MODELS["convolutions"]
    config = peft.LoKrConfig(r=8, alpha=80, target_modules=["line"])
    theirs = peft.get_peft_model(build(), config)
    jitter(theirs)
    theirs.save_pretrained(str(tmp_path))
    ours = inlay.PeftModel.from_pretrained(build(), tmp_path)
    w1, w2 = (load_file(tmp_path / WEIGHTS)[f"base_model.model.line.lokr_{name}"] for name in ("w1", "w2"))
    expected = build()
    by_tap = torch.stack([torch.kron(w1, w2[..., tap]) for tap in range(3)], -1)
    expected.get_parameter("line.weight").data += 80 / 8 * by_tap
    close(outputs(ours, example()), outputs(expected, example()))
    assert not torch.allclose(outputs(theirs, example()), outputs(expected, example()), atol=1e-3)


@pytest.mark.parametrize("method", ["LoHaConfig", "LoKrConfig"])
def test_padding_by_reflection_is_what_the_real_library_merges(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its forward pads what the update is applied to with zeros, whatever the layer's own mode is."""

    def build() -> nn.Module:
        torch.manual_seed(5)
        return nn.Sequential(nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect")).eval()

    example = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(7))
    monkeypatch.setitem(MODELS, "reflecting", (build, lambda: {"input": example}))
    both_ways("reflecting", method, tmp_path, by=merged, r=1, target_modules=["0"])


@pytest.mark.parametrize(("method", "prefix"), [("LoHaConfig", "hada"), ("LoKrConfig", "lokr")])
def test_files_with_options_of_ours(method: str, prefix: str, tmp_path: Path) -> None:
    build, example = MODELS["llama"]
    options = {"r": 1, "use_scalar": True, "use_dora": True, "input_dropout": 0.1, "target_modules": LLAMA}
    model = inlay.get_peft_model(build(), getattr(inlay, method)(**options))
    jitter(model)
    model.save_pretrained(tmp_path)
    names = {key.rpartition(".")[2] for key in load_file(tmp_path / WEIGHTS)}
    assert {f"{prefix}_scalar", f"{prefix}_magnitude_vector"} <= names
    saved = json.loads((tmp_path / "adapter_config.json").read_text())
    assert saved["use_scalar"] is True
    assert saved["use_dora"] is True
    again = inlay.PeftModel.from_pretrained(build(), tmp_path)
    assert torch.equal(outputs(again, example()), outputs(model, example()))
    assert not torch.allclose(outputs(again, example()), outputs(build(), example()), atol=1e-3)
