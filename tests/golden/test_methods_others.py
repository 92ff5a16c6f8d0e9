"""The other methods on weights, to and from the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .support import both_ways, merged

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "ia3-llama": ("llama", "IA3Config", {}),
    "ia3-gpt2": ("gpt2", "IA3Config", {"fan_in_fan_out": True}),
    "ia3-bert": ("bert", "IA3Config", {"task_type": "SEQ_CLS"}),
    "ia3-named": ("llama", "IA3Config", {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": ["up_proj"]}),
    "ia3-outputs": ("llama", "IA3Config", {"target_modules": ["q_proj", "up_proj"], "feedforward_modules": []}),
    "ia3-convolutions": (
        "convolutions",
        "IA3Config",
        {"target_modules": ["plane", "plain", "space", "head"], "feedforward_modules": ["plain", "space"]},
    ),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 4}),
    "oft-default": ("llama", "OFTConfig", {"target_modules": ["q_proj", "down_proj"]}),
    "oft-nearest-divisor": ("llama", "OFTConfig", {"oft_block_size": 7, "target_modules": ["q_proj", "down_proj"]}),
    "oft-count": ("llama", "OFTConfig", {"r": 2, "oft_block_size": 0}),
    "oft-exact": ("llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-terms-2": ("llama", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 2}),
    "oft-terms-3": ("llama", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 3}),
    "oft-terms-4": ("llama", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 4}),
    "oft-terms-7": ("llama", "OFTConfig", {"oft_block_size": 8, "num_cayley_neumann_terms": 7}),
    "oft-ball": ("llama", "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.3}),
    "oft-shared": ("llama", "OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "oft-shared-ball": ("llama", "OFTConfig", {"oft_block_size": 4, "block_share": True, "coft": True, "eps": 0.3}),
    "oft-bias": ("bert", "OFTConfig", {"oft_block_size": 4, "bias": "oft_only"}),
    "oft-embedding": ("llama", "OFTConfig", {"oft_block_size": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "hra": ("llama", "HRAConfig", {"r": 4}),
    "hra-odd": ("llama", "HRAConfig", {"r": 3, "target_modules": ["q_proj", "down_proj"]}),
    "hra-gram-schmidt": ("llama", "HRAConfig", {"r": 3, "apply_GS": True}),
    "hra-bias": ("bert", "HRAConfig", {"r": 4, "bias": "hra_only"}),
    "hra-convolutions": ("convolutions", "HRAConfig", {"r": 4, "target_modules": ["plane", "plain", "head"]}),
    "vera-conv1d": ("gpt2", "VeraConfig", {"r": 4, "fan_in_fan_out": True}),
    "vera-seed-only": ("gpt2", "VeraConfig", {"r": 4, "save_projection": False, "projection_prng_key": 3, "fan_in_fan_out": True}),
    "vera-two-widths": ("gpt2", "VeraConfig", {"r": 4, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "vera-bias": ("gpt2", "VeraConfig", {"r": 4, "bias": "vera_only", "d_initial": 0.3, "fan_in_fan_out": True}),
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": [3, 7, 38]}),
    "tokens-tied": ("llama-tied", "TrainableTokensConfig", {"token_indices": [3, 7, 38]}),
    "tokens-named": ("llama", "TrainableTokensConfig", {"token_indices": [3, 7], "target_modules": ["embed_tokens"]}),
}


@pytest.mark.parametrize("case", CASES)
def test_method(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    both_ways(model, method, tmp_path, **options)


def test_oft_on_convolutions_is_what_the_real_library_merges(tmp_path: Path) -> None:
    """Its forward on a convolution cuts and adds patches of the input, which moves the output without any rotation."""
    both_ways("convolutions", "OFTConfig", tmp_path, by=merged, oft_block_size=3, target_modules=["plane", "head"])


def test_vera_on_linear_layers(tmp_path: Path) -> None:
    both_ways("llama", "VeraConfig", tmp_path, r=4, target_modules=["q_proj", "down_proj"])


def test_vera_draws_the_same_projection(tmp_path: Path) -> None:
    import peft

    import inlay

    from .models import MODELS

    build, _ = MODELS["gpt2"]
    options = {"r": 5, "projection_prng_key": 11, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}
    theirs = peft.get_peft_model(build(), peft.VeraConfig(**options))
    ours = inlay.get_peft_model(build(), inlay.VeraConfig(**options))
    found = inlay.get_peft_model_state_dict(ours)
    for name in ("vera_A", "vera_B"):
        assert torch.equal(found[f"base_model.{name}"], getattr(theirs.base_model, name)["default"])
