"""LoRA and its options, to and from the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import inlay
from inlay.core.inlaid import places

from .models import MODELS
from .support import both_ways, close, jitter, outputs, same_files

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "linear": ("llama", {"r": 4, "lora_alpha": 7}),
    "all-linear": ("llama", {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "regex": ("llama", {"r": 4, "target_modules": r".*\.0\.mlp\.(up|down)_proj"}),
    "layers": ("llama", {"r": 4, "layers_to_transform": [1], "target_modules": ["k_proj", "o_proj"]}),
    "excluded": ("llama", {"r": 4, "target_modules": ["q_proj", "v_proj"], "exclude_modules": r".*\.1\..*"}),
    "rslora": ("llama", {"r": 4, "lora_alpha": 3, "use_rslora": True}),
    "bias-all": ("llama", {"r": 4, "bias": "all"}),
    "bias-only": ("llama", {"r": 4, "bias": "lora_only"}),
    "lora-bias": ("llama", {"r": 4, "lora_bias": True, "target_modules": ["q_proj", "k_proj"]}),
    "patterns": (
        "llama",
        {
            "r": 4,
            "target_modules": ["q_proj", "v_proj", "down_proj"],
            "rank_pattern": {"v_proj": 2, r"model.layers.1.self_attn.q_proj": 6},
            "alpha_pattern": {"down_proj": 20, "^model.layers.0.self_attn.v_proj": 3},
        },
    ),
    "head-retrained": ("llama", {"r": 4, "modules_to_save": ["lm_head"]}),
    "norm-retrained": ("llama", {"r": 4, "modules_to_save": ["input_layernorm"]}),
    "embedding": ("llama", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "embedding-tied": ("llama-tied", {"r": 4, "target_modules": ["embed_tokens"]}),
    "retrained-kept-tied": (
        "llama-tied",
        {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "tokens": ("llama", {"r": 4, "trainable_token_indices": [3, 17, 38]}),
    "tokens-named": ("llama", {"r": 4, "trainable_token_indices": {"embed_tokens": [3, 17], "lm_head": [4]}}),
    "tokens-tied": ("llama-tied", {"r": 4, "trainable_token_indices": [3, 17, 38]}),
    "dora": ("llama", {"r": 4, "use_dora": True, "lora_alpha": 6}),
    "dora-embedding": ("llama", {"r": 4, "use_dora": True, "target_modules": ["embed_tokens", "up_proj"]}),
    "gpt2": ("gpt2", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "gpt2-dora": ("gpt2", {"r": 4, "target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
    "bert-classifier": ("bert", {"r": 4, "task_type": "SEQ_CLS"}),
    "bert-bias": ("bert", {"r": 4, "bias": "all", "target_modules": ["query", "dense"]}),
    "convolutions": ("convolutions", {"r": 3, "target_modules": ["line", "plane", "plain", "space", "head"]}),
    "convolutions-bias": ("convolutions", {"r": 3, "target_modules": ["plane", "space"], "bias": "lora_only"}),
    "convolutions-lora-bias": ("convolutions", {"r": 3, "target_modules": ["line", "plane", "space"], "lora_bias": True}),
    "convolutions-dora": ("convolutions", {"r": 3, "target_modules": ["line", "plane", "space"], "use_dora": True}),
    "conv1d-gpt2": ("attention", {"r": 3, "target_modules": ["mixed"]}),
    "experts": ("mixtral", {"r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": ["q_proj"]}),
    "experts-alone": ("mixtral", {"r": 2, "target_parameters": ["experts.down_proj"], "target_modules": []}),
    "experts-transposed": ("gpt-oss", {"r": 2, "target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}),
    "orthogonal": ("llama", {"r": 4, "init_lora_weights": "orthogonal"}),
    "gaussian": ("llama", {"r": 4, "init_lora_weights": "gaussian"}),
}


@pytest.mark.parametrize("case", CASES)
def test_lora(case: str, tmp_path: Path) -> None:
    model, options = CASES[case]
    both_ways(model, "LoraConfig", tmp_path, **options)


@pytest.mark.parametrize("end", ["embed_tokens", "lm_head"])
def test_one_adapter_for_tied_weights(end: str, tmp_path: Path) -> None:
    """The real library registers the factors of both ends as parameters, which counts one storage twice."""
    exact = end == "embed_tokens"  # beside a targeted head it leaves out the base's embedding, which it writes beside the other
    both_ways(
        "llama-tied",
        "LoraConfig",
        tmp_path,
        same_count=False,
        exact_files=exact,
        r=4,
        target_modules=[end],
        ensure_weight_tying=True,
    )


def doubled_at_the_output(model: Any, example: dict[str, Tensor]) -> Tensor:
    """The real library adds the update of an attention's output projection twice, in its forward and in its merge."""
    place = next(p for p in places(model) if p.path.endswith("out_proj"))
    place.adapters["default"].strength = 2.0
    try:
        return outputs(model, example)
    finally:
        place.adapters["default"].strength = 1.0


@pytest.mark.parametrize("options", [{}, {"use_rslora": True, "lora_alpha": 5}], ids=["", "rslora"])
def test_attention(options: dict[str, Any], tmp_path: Path) -> None:
    build, example = MODELS["attention"]
    options = {"r": 3, "target_modules": ["attention"], **options}
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**options))
    jitter(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(build(), tmp_path / "theirs")
    close(doubled_at_the_output(ours, example()), outputs(theirs, example()))
    ours.save_pretrained(tmp_path / "ours")
    same_files(tmp_path / "ours", tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours")
    close(outputs(again, example()), outputs(theirs, example()))


def test_several_adapters_on_experts(tmp_path: Path) -> None:
    """Two parameters of one module under two adapters: each file goes to its own, in either library."""
    build, example = MODELS["mixtral"]
    target = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"], "target_modules": []}
    expected = {}
    for name, rank in (("one", 2), ("two", 3)):
        theirs = peft.get_peft_model(build(), peft.LoraConfig(r=rank, **target))
        jitter(theirs)
        theirs.save_pretrained(tmp_path / name)
        expected[name] = outputs(theirs, example())
    assert not torch.allclose(expected["one"], expected["two"])
    ours = inlay.PeftModel.from_pretrained(build(), tmp_path / "one", adapter_name="one")
    ours.load_adapter(tmp_path / "two", adapter_name="two")
    for name in ("two", "one"):
        ours.set_adapter(name)
        close(outputs(ours, example()), expected[name])
    ours.save_pretrained(tmp_path / "ours")
    for name in ("one", "two"):
        same_files(tmp_path / "ours" / name, tmp_path / name)
        again = peft.PeftModel.from_pretrained(build(), tmp_path / "ours" / name)
        close(outputs(again, example()), expected[name])
