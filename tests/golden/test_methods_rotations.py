"""Rotations, and updates in blocks and shards, to and from the real library."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F

import inlay

from .models import MODELS
from .support import WEIGHTS, both_ways, close, jitter, outputs, same_steps

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "boft": ("llama", "BOFTConfig", {"boft_block_size": 4}),
    "boft-count": ("llama", "BOFTConfig", {"boft_block_size": 0, "boft_block_num": 4, "target_modules": ["q_proj", "down_proj"]}),
    "boft-bias": ("bert", "BOFTConfig", {"boft_block_size": 8, "bias": "boft_only", "init_weights": False}),
    "road-1": ("llama", "RoadConfig", {"group_size": 4, "target_modules": ["q_proj", "down_proj"]}),
    "road-2": ("bert", "RoadConfig", {"group_size": 8, "variant": "road_2", "target_modules": ["query", "value"]}),
    "road-4": ("bert", "RoadConfig", {"group_size": 4, "variant": "road_4", "target_modules": ["query", "value"]}),
    "psoft": ("llama", "PsoftConfig", {"r": 4, "psoft_alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "psoft-pissa": ("llama", "PsoftConfig", {"r": 4, "ab_svd_init": "pissa_init", "psoft_mag_a": False, "target_modules": ["q_proj"]}),
    "psoft-free": ("llama", "PsoftConfig", {"r": 4, "psoft_orth": False, "psoft_mag_b": False, "target_modules": ["q_proj"]}),
    "psoft-lowrank": ("llama", "PsoftConfig", {"r": 4, "psoft_svd": "lowrank", "random_seed": 3, "target_modules": ["q_proj"]}),
    "psoft-series": (
        "llama",
        "PsoftConfig",
        {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 6, "cayley_neumann_eps": 0.1, "target_modules": ["q_proj"]},
    ),
    "psoft-one-term": (
        "llama",
        "PsoftConfig",
        {"r": 4, "use_cayley_neumann": True, "num_cayley_neumann_terms": 1, "target_modules": ["q_proj"]},
    ),
    "miss": ("llama", "MissConfig", {"r": 4, "target_modules": ["q_proj", "down_proj"]}),
    "miss-rest": ("llama", "MissConfig", {"r": 5, "target_modules": ["q_proj", "down_proj"]}),
    "miss-random": ("llama", "MissConfig", {"r": 4, "init_weights": False, "target_modules": ["q_proj"]}),
    "miss-bat": ("llama", "MissConfig", {"r": 4, "init_weights": "bat", "target_modules": ["q_proj", "down_proj"]}),
    "miss-mini": ("llama", "MissConfig", {"r": 4, "mini_r": 8, "init_weights": "mini", "target_modules": ["q_proj", "down_proj"]}),
    "miss-bias": ("bert", "MissConfig", {"r": 4, "bias": "miss_only", "target_modules": ["query", "value"]}),
    "gralora": ("llama", "GraloraConfig", {"r": 4, "alpha": 6, "target_modules": ["q_proj", "down_proj"]}),
    "gralora-hybrid": ("llama", "GraloraConfig", {"r": 8, "gralora_k": 4, "hybrid_r": 3, "target_modules": ["q_proj"]}),
    "gralora-conv1d": ("gpt2", "GraloraConfig", {"r": 4, "fan_in_fan_out": True, "target_modules": ["c_attn"]}),
    "gralora-bias": ("bert", "GraloraConfig", {"r": 4, "bias": "gralora_only", "target_modules": ["query"], "init_weights": False}),
    "glora": ("llama", "GloraConfig", {"r": 3, "target_modules": ["q_proj", "v_proj"]}),
    "glora-vector": (
        "bert",
        "GloraConfig",
        {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "target_modules": ["query", "value"]},
    ),
    "glora-constant": ("bert", "GloraConfig", {"config_A_B": "constant", "target_modules": ["query", "value"]}),
    "glora-random": ("bert", "GloraConfig", {"r": 3, "init_weights": False, "bias": "glora_only", "target_modules": ["query"]}),
}
# Where a part is switched off, the real library writes the zeros that it holds in its place.
ZEROS = {
    "glora-no-bias": ("llama", "GloraConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "glora-bias-alone": ("llama", "GloraConfig", {"config_A_B": "none", "config_C": "vector", "target_modules": ["q_proj"]}),
    "glora-weight-alone": ("llama", "GloraConfig", {"config_C": "none", "config_D_E": "none", "target_modules": ["q_proj"]}),
}
# On all linear layers of the blocks, which have a bias in the attention and none in the rest.
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "oft": ("OFTConfig", {"oft_block_size": 4}),
    "oft-exact": ("OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "hra": ("HRAConfig", {"r": 4}),
    "hra-odd": ("HRAConfig", {"r": 3}),
    "boft": ("BOFTConfig", {"boft_block_size": 4}),
    "road-1": ("RoadConfig", {"group_size": 4}),
    "road-2": ("RoadConfig", {"group_size": 8, "variant": "road_2"}),
    "road-4": ("RoadConfig", {"group_size": 2, "variant": "road_4"}),
    "psoft": ("PsoftConfig", {"r": 8}),
    "psoft-free": ("PsoftConfig", {"r": 8, "psoft_orth": False, "psoft_mag_b": False}),
    "miss": ("MissConfig", {"r": 4}),
    "miss-bat": ("MissConfig", {"r": 4, "init_weights": "bat"}),
    "miss-mini": ("MissConfig", {"r": 5, "mini_r": 4, "init_weights": "mini"}),
    "gralora": ("GraloraConfig", {"r": 4}),
    "gralora-hybrid": ("GraloraConfig", {"r": 4, "hybrid_r": 2}),
    "glora": ("GloraConfig", {"r": 3}),
    "glora-vector": ("GloraConfig", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
}


@pytest.mark.parametrize("case", CASES)
def test_method(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    both_ways(model, method, tmp_path, **options)


@pytest.mark.parametrize("case", ZEROS)
def test_parts_that_are_switched_off(case: str, tmp_path: Path) -> None:
    model, method, options = ZEROS[case]
    both_ways(model, method, tmp_path, exact_files=False, **options)


@pytest.mark.parametrize("case", STEPS)
def test_training(case: str, tmp_path: Path) -> None:
    method, options = STEPS[case]
    same_steps("llama", method, tmp_path, target_modules=ALL, **options)


# ---- where the real library is wrong, against the mathematics ------------------------------------------------------------------
def test_files_of_bone_are_those_of_miss(tmp_path: Path) -> None:
    """The real library has no class for the earlier name any more; its files differ in names only."""
    build, example = MODELS["llama"]
    kinds: dict[str, bool | Literal["bat"]] = {"plain": True, "bat": "bat"}
    for name, init in kinds.items():
        folder = tmp_path / name
        theirs: Any = peft.get_peft_model(build(), peft.MissConfig(target_modules=["q_proj"], r=4, init_weights=init))  # type: ignore[arg-type]
        jitter(theirs)
        theirs.save_pretrained(str(folder))
        tensors = load_file(folder / WEIGHTS)
        save_file({k.replace("miss_block", "bone_block"): t for k, t in tensors.items()}, folder / WEIGHTS)
        config = folder / "adapter_config.json"
        stored = json.loads(config.read_text()) | {"peft_type": "BONE"}
        config.write_text(json.dumps({k: v for k, v in stored.items() if k not in ("miss_dropout", "mini_r")}))
        ours = inlay.PeftModel.from_pretrained(build(), folder)
        close(outputs(ours, example()), outputs(theirs, example()))
        ours.save_pretrained(folder / "again")
        assert load_file(folder / "again" / WEIGHTS).keys() == load_file(folder / WEIGHTS).keys()


class Dilated(nn.Module):
    """A convolution whose options the real library drops."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.conv = nn.Conv2d(4, 6, 3, stride=(1, 2), padding=(2, 1), dilation=(1, 2), groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


@pytest.mark.parametrize(
    "config",
    [
        inlay.OFTConfig(target_modules=["conv"], oft_block_size=3),
        inlay.HRAConfig(target_modules=["conv"], r=4),
        inlay.BOFTConfig(target_modules=["conv"], boft_block_size=2),
    ],
    ids=lambda c: type(c).__name__,
)
def test_convolutions_keep_their_options(config: Any) -> None:
    """In the real library OFT moves the output of a convolution that is not turned at all, HRA and BOFT drop dilation, groups and the
    second of two paddings. Here a convolution is as before at the start, and then that of a weight whose groups are turned."""
    x = torch.randn(2, 4, 9, 8)
    base = Dilated()
    before = base(x).detach()
    model = inlay.get_peft_model(Dilated(), config)
    close(model(x), before)
    jitter(model)
    after = model(x)
    assert not torch.allclose(after, before, atol=1e-3)
    merged = model.merge_and_unload().conv
    w, own = merged.weight.flatten(1), base.conv.weight.flatten(1)
    conv = base.conv
    close(after, F.conv2d(x, merged.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups))
    # Turning keeps the angles between the filters of a group; BOFT scales each of them.
    for mine, its in zip(w.view(2, 3, 18), own.view(2, 3, 18), strict=True):
        mine, its = (F.normalize(t) if isinstance(config, inlay.BOFTConfig) else t for t in (mine, its))
        torch.testing.assert_close(mine @ mine.T, its @ its.T, rtol=0, atol=2e-3 if isinstance(config, inlay.OFTConfig) else 1e-5)
