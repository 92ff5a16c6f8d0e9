"""Any method on weights as LoRA: what comes out acts as what went in, and the errors are those reported."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.operations import convert
from inlay.operations.convert import conversion
from inlay.operations.cutting import cut
from inlay.operations.effects import Update, effects

from ..law.layouts import Layout
from ..law.support import BY_NAME, acting, adapted, close, each
from ..tiny import stir

LINEAR = BY_NAME["linear"]
LAYOUTS = ("linear", "conv1d-gpt2", "conv2d-groups", "transpose2d-groups", "embedding", "layer-norm", "experts", "attention", "tied")
SOME = acting(*LAYOUTS, once=True)


def converted(model: nn.Module, layout: Layout, rank: float | None) -> nn.Module:
    """The bare model with the adapter as LoRA."""
    found = conversion(model, rank, "a")
    fresh = layout.model(torch.float32)
    attach(fresh, found.config, "default")
    inlay.set_peft_model_state_dict(fresh, found.tensors)
    return fresh.eval()


@pytest.mark.parametrize(("case", "layout"), [each(pair) for pair in SOME])
def test_every_method_on_every_layout(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout, torch.float32), layout.example(torch.float32)
    with torch.no_grad():
        close(converted(model, layout, 1.0)(*example), model(*example), 1e-3)


@pytest.mark.parametrize(
    "options", [{"use_rslora": True, "lora_alpha": 9}, {"lora_bias": True}, {"bias": "lora_only"}, {"init_lora_weights": "pissa"}]
)
def test_low_rank_needs_no_rank(options: dict[str, Any]) -> None:
    model, example = adapted("LORA", LINEAR, torch.float32, **options), LINEAR.example(torch.float32)
    found = conversion(model, None, "a")
    assert [(x.name, x.error) for x in found.layers] == [("host", 0.0)]
    with torch.no_grad():
        close(converted(model, LINEAR, None)(*example), model(*example), 1e-5)


@pytest.mark.parametrize("case", ["FULL", "HRA", "LORA"])
@pytest.mark.parametrize("rank", [2, 0.8])
def test_errors_are_the_best_and_the_reported(case: str, rank: float) -> None:
    model = adapted(case, LINEAR, torch.float32)
    whole = next(iter(effects(model, ("a",))[0].weights.values())).matrix()
    found = conversion(model, rank, "a")
    a, b = (found.tensors[f"host.lora_{x}.weight"] for x in "AB")
    s = torch.linalg.svdvals(whole)
    (layer,) = found.layers
    assert layer.norm == pytest.approx(whole.norm().item(), rel=1e-5)
    assert layer.rank == a.shape[0] == (rank if isinstance(rank, int) else int((s.square().cumsum(0) < rank * s.square().sum()).sum()) + 1)
    assert layer.error == pytest.approx((s[layer.rank :].norm() / s.norm()).item(), rel=1e-3, abs=1e-6)
    assert layer.error == pytest.approx(((whole - b @ a).norm() / whole.norm()).item(), rel=1e-3, abs=1e-6)


def test_a_folder_of_it(tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = {"0": nn.Linear(6, 8), "1": nn.Linear(8, 4)}
    model: Any = inlay.get_peft_model(nn.Sequential(*base.values()), inlay.LoHaConfig(r=2, target_modules=["0"], modules_to_save=["1"]))
    for q in model.parameters():
        if q.requires_grad:
            q.data += 0.3 * torch.randn_like(q)
    x = torch.randn(3, 6)
    expected = model.eval()(x)
    inlay.save_as_lora(tmp_path / "lora", model, 4)
    assert sorted(p.name for p in (tmp_path / "lora").iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    session = session_of(model.get_base_model())
    assert session is not None
    assert list(session.configs) == ["default"]
    bare = nn.Sequential(*base.values())
    model.unload()
    loaded = inlay.PeftModel.from_pretrained(bare, tmp_path / "lora")
    assert loaded.peft_config["default"].modules_to_save == ["1"]  # type: ignore[attr-defined]
    with torch.no_grad():
        close(loaded(x), expected, 1e-5)


@pytest.mark.parametrize(
    ("rank", "message"),
    [
        (0, "positive integer"),
        (-3, "positive integer"),
        (1.5, r"\(0, 1\]"),
        (0.0, r"\(0, 1\]"),
        (9, "larger than"),
        (None, "a rank is needed"),
    ],
)
def test_ranks_that_cannot_be(rank: float | None, message: str) -> None:
    model = adapted("FULL", LINEAR, torch.float32)
    with pytest.raises(ValueError, match=message):
        conversion(model, rank, "a")


def test_what_is_no_function_of_the_weight_is_refused() -> None:
    model = LINEAR.model(torch.float32)
    attach(model, inlay.LilyConfig(r=2, target_modules=["host"]), "a")
    with pytest.raises(TypeError, match="weight"):
        conversion(model, 2, "a")
    with pytest.warns(UserWarning, match="already a LoRA"):
        inlay.convert_to_lora(adapted("LORA", LINEAR, torch.float32), 2, "a")


def test_of_all_changes_one_is_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[weakref.ref[Tensor]] = []

    def watched(update: Update, rank: float) -> tuple[Update, float]:
        assert update.dense is not None
        made.append(weakref.ref(update.dense))
        assert sum(t() is not None for t in made) == 1
        return cut(update, rank)

    monkeypatch.setattr(convert, "cut", watched)
    host = nn.Sequential(*(nn.Linear(6, 6) for _ in range(4)))
    model = inlay.get_peft_model(host, inlay.HRAConfig(r=2, target_modules=["0", "1", "2", "3"]))
    stir(model)
    found = conversion(model, 2)
    assert len(made) == 4
    assert max(layer.error for layer in found.layers) < 1e-5
    assert min(layer.norm for layer in found.layers) > 1e-3
