"""Methods whose layers share a bank, to and from the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from .support import both_ways, same_steps

TWO = ["q_proj", "down_proj"]
GPT2 = {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "pvera": ("llama", "PveraConfig", {"r": 4, "target_modules": TWO}),
    "pvera-seed-only": ("llama", "PveraConfig", {"r": 4, "save_projection": False, "projection_prng_key": 3}),
    "pvera-gpt2": ("gpt2", "PveraConfig", {"r": 3, **GPT2}),
    "pvera-bias": ("bert", "PveraConfig", {"r": 4, "bias": "pvera_only", "d_initial": 0.3}),
    "vblora": ("llama", "VBLoRAConfig", {"num_vectors": 9, "vector_length": 4}),
    "vblora-three": ("llama", "VBLoRAConfig", {"num_vectors": 9, "vector_length": 8, "topk": 3, "r": 2, "target_modules": TWO}),
    "vblora-mixtures": ("llama", "VBLoRAConfig", {"num_vectors": 9, "vector_length": 8, "save_only_topk_weights": True}),
    "vblora-many-vectors": ("llama", "VBLoRAConfig", {"num_vectors": 256, "vector_length": 8, "save_only_topk_weights": True}),
    "vblora-gpt2": ("gpt2", "VBLoRAConfig", {"num_vectors": 9, "vector_length": 8, **GPT2}),
    "vblora-bias": ("bert", "VBLoRAConfig", {"num_vectors": 9, "vector_length": 8, "bias": "vblora_only"}),
    "randlora": ("llama", "RandLoraConfig", {"r": 5, "target_modules": [*TWO, "up_proj"], "randlora_alpha": 10}),
    "randlora-seed-only": ("llama", "RandLoraConfig", {"r": 4, "save_projection": False, "projection_prng_key": 3}),
    "randlora-sparse": ("llama", "RandLoraConfig", {"r": 5, "sparse": True, "target_modules": TWO, "save_projection": False}),
    "randlora-very-sparse": ("llama", "RandLoraConfig", {"r": 5, "very_sparse": True, "target_modules": TWO, "save_projection": False}),
    "randlora-gpt2": ("gpt2", "RandLoraConfig", {"r": 5, **GPT2}),
    "randlora-bias": ("bert", "RandLoraConfig", {"r": 5, "bias": "randlora_only"}),
    "unilora": ("llama", "UniLoraConfig", {"theta_d_length": 20, "target_modules": TWO}),
    "unilora-indices": ("llama", "UniLoraConfig", {"theta_d_length": 20, "target_modules": TWO, "save_indices": True, "proj_seed": 1}),
    "unilora-long": ("llama", "UniLoraConfig", {"theta_d_length": 2000}),
    "unilora-gpt2": ("gpt2", "UniLoraConfig", {"theta_d_length": 20, "r": 3, **GPT2}),
    "unilora-bias": ("bert", "UniLoraConfig", {"theta_d_length": 20, "bias": "unilora_only"}),
    "tinylora": ("llama", "TinyLoraConfig", {"u": 7, "target_modules": TWO}),
    "tinylora-tied": ("llama", "TinyLoraConfig", {"u": 7, "target_modules": TWO, "weight_tying": 1.0, "r": 3}),
    "tinylora-half-tied": ("llama", "TinyLoraConfig", {"u": 7, "target_modules": TWO, "weight_tying": 0.4, "init_weights": "uniform"}),
    "tinylora-seed-only": ("llama", "TinyLoraConfig", {"u": 7, "save_projection": False, "projection_seed": 5}),
    "tinylora-gpt2": ("gpt2", "TinyLoraConfig", {"u": 7, **GPT2}),
    "tinylora-embedding": ("llama", "TinyLoraConfig", {"u": 7, "target_modules": ["embed_tokens", "q_proj"]}),
    "tinylora-bias": ("bert", "TinyLoraConfig", {"u": 7, "bias": "tinylora_only"}),
    "frod": ("llama", "FrodConfig", {"sparse_rate": 0.1, "target_modules": TWO, "progressbar": False}),
    "frod-seed-only": ("llama", "FrodConfig", {"sparse_rate": 0.1, "save_projection": False, "target_modules": TWO}),
    "frod-gpt2": ("gpt2", "FrodConfig", {"sparse_rate": 0.1, **GPT2}),
    "frod-bias": ("bert", "FrodConfig", {"bias": "frod_only"}),
    "frod-no-rotations": ("llama", "FrodConfig", {"sparse_rate": 0.0, "target_modules": TWO}),
    "adamss": ("llama", "AdamssConfig", {"r": 6, "num_subspaces": 3, "target_modules": TWO}),
    "adamss-ranks": ("llama", "AdamssConfig", {"r": 8, "num_subspaces": 2, "subspace_rank": 3, "target_modules": TWO}),
    "adamss-all-directions": ("bert", "AdamssConfig", {"num_subspaces": 4, "target_modules": ["query", "dense"]}),
    "adamss-dynamic": ("llama", "AdamssConfig", {"r": 9, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.5}),
}
MERGEABLE = [case for case in CASES if "lily" not in case]


@pytest.mark.parametrize("case", CASES)
def test_method(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    both_ways(model, method, tmp_path, **options)


@pytest.mark.parametrize(
    "case",
    ["vblora", "randlora", "randlora-gpt2", "unilora", "tinylora", "tinylora-tied", "tinylora-embedding", "frod", "adamss", "adamss-ranks"],
)
def test_steps(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    same_steps(model, method, tmp_path, **options)
