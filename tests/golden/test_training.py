"""Training from one file: after the same steps both libraries have the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .support import same_steps

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "lora-bias": ("llama", "LoraConfig", {"r": 4, "bias": "lora_only", "use_rslora": True}),
    "dora": ("llama", "LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "lora-embedding": ("llama", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-tokens-tied": ("llama-tied", "LoraConfig", {"r": 4, "trainable_token_indices": [3, 17, 38]}),
    "lora-head": ("llama", "LoraConfig", {"r": 4, "modules_to_save": ["lm_head"]}),
    "lora-experts": ("mixtral", "LoraConfig", {"r": 2, "target_parameters": ["experts.down_proj"], "target_modules": []}),
    "lora-convolutions": ("convolutions", "LoraConfig", {"r": 3, "target_modules": ["line", "plane", "space", "head"]}),
    "dora-convolutions": ("convolutions", "LoraConfig", {"r": 3, "target_modules": ["plane", "space"], "use_dora": True}),
    "ia3": ("llama", "IA3Config", {}),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 4}),
    "oft-exact": ("llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-ball": ("llama", "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.05}),
    "oft-shared": ("llama", "OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "hra": ("llama", "HRAConfig", {"r": 4}),
    "hra-gram-schmidt": ("llama", "HRAConfig", {"r": 3, "apply_GS": True}),
    "hra-convolutions": ("convolutions", "HRAConfig", {"r": 4, "target_modules": ["plane", "plain", "head"]}),
    "vera": ("gpt2", "VeraConfig", {"r": 4, "fan_in_fan_out": True}),
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": [3, 7, 38]}),
}


@pytest.mark.parametrize("case", CASES)
def test_same_steps(case: str, tmp_path: Path) -> None:
    name, method, options = CASES[case]
    same_steps(name, method, tmp_path, **options)
