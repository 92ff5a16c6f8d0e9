"""Methods whose layers share a bank, to and from the real library."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans

from inlay.methods.adamss import _k_means

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
    "randlora-gpt2": ("gpt2", "RandLoraConfig", {"r": 5, "randlora_alpha": 10, **GPT2}),
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
    "lily": ("llama", "LilyConfig", {"r": 3, "target_modules": TWO}),
    "lily-shared": ("llama", "LilyConfig", {"r": 3, "target_modules": ["q_proj", "up_proj", "gate_proj"], "stride_A": 2, "num_B": 3}),
    "lily-bert": ("bert", "LilyConfig", {"r": 3, "scaling": 0.5, "target_modules": ["query", "value"]}),
    "frod": ("llama", "FrodConfig", {"sparse_rate": 0.1, "target_modules": TWO, "progressbar": False}),
    "frod-seed-only": ("llama", "FrodConfig", {"sparse_rate": 0.1, "save_projection": False, "target_modules": TWO}),
    "frod-gpt2": ("gpt2", "FrodConfig", {"sparse_rate": 0.1, **GPT2}),
    "frod-bias": ("bert", "FrodConfig", {"bias": "frod_only"}),
    "frod-no-rotations": ("llama", "FrodConfig", {"sparse_rate": 0.0, "target_modules": TWO}),
    "adamss": ("llama", "AdamssConfig", {"r": 6, "num_subspaces": 3, "target_modules": TWO}),
    "adamss-ranks": ("llama", "AdamssConfig", {"r": 8, "num_subspaces": 2, "subspace_rank": 3, "target_modules": TWO}),
    "adamss-bias-column": ("bert", "AdamssConfig", {"r": 6, "num_subspaces": 4, "target_modules": ["query", "intermediate.dense"]}),
    "adamss-dynamic": ("llama", "AdamssConfig", {"r": 9, "subspace_rank": 3, "use_dynamic_rank": True, "svd_threshold": 0.5}),
}
# What is written differs by rounding from what was read: mixtures are kept as logits. And we write no empty tensors.
ROUNDED = ("vblora-mixtures", "vblora-many-vectors", "frod-no-rotations")


@pytest.mark.parametrize("case", CASES)
def test_method(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    both_ways(model, method, tmp_path, exact_files=case not in ROUNDED, **options)


# By case, how far a step goes: that something is learned in five of them, and not too much.
RATES = {
    "vblora": 0.5, "randlora": 0.05, "randlora-gpt2": 0.05, "unilora": 50.0, "tinylora": 20.0, "tinylora-tied": 5.0,
    "tinylora-embedding": 2.0, "frod": 2.0, "adamss": 2.0, "adamss-ranks": 2.0, "lily": 2.0, "lily-shared": 2.0,
}  # fmt: skip


@pytest.mark.parametrize("case", RATES)
def test_steps(case: str, tmp_path: Path) -> None:
    model, method, options = CASES[case]
    same_steps(model, method, tmp_path, rate=RATES[case], **options)


@pytest.mark.parametrize("count", [1, 3, 6])
@pytest.mark.parametrize("seed", range(5))
def test_k_means_is_that_of_scikit_learn(count: int, seed: int) -> None:
    """AdaMSS' groups are in no file: the real library takes for granted that they come out the same."""
    points = torch.randn(40, 5, generator=torch.Generator().manual_seed(seed))
    known = KMeans(n_clusters=count, init="random", n_init=1, max_iter=10, random_state=123456789)
    assert np.array_equal(_k_means(points, count, 10).numpy(), known.fit_predict(points.numpy()))
