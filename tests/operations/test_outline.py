"""Outlines of models are what transformers makes of the same files; where they would not be, there are none."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import rename_source_key

from inlay import LoraConfig
from inlay.core.site import site_of
from inlay.formats.streaming import Checkpoint
from inlay.operations.outline import BLOCKS, TIED, Outline, outline
from inlay.operations.stream_merge import StreamMerge

from .bases import SIZES, adapter, check_same, in_memory, llama, load, saved


def small(name: str, folder: Path, **more: Any) -> Path:
    cls: Any = getattr(transformers, name)
    torch.manual_seed(0)
    return saved(cls(cls.config_class(**{**SIZES, "num_key_value_heads": 1, "head_dim": 12, "pad_token_id": 0, **more})), folder)


def found(folder: Path, **changed: Any) -> Outline | None:
    config = json.loads((folder / "config.json").read_text()) | changed
    return outline({k: v for k, v in config.items() if v != "absent"}, Checkpoint.open(folder))


def described(model: nn.Module) -> list[tuple[str, str, dict[str, tuple[int, ...]]]]:
    """Each module with parameters, in order: its path, its layout, and what its parameters are."""
    modules = [(path, m) for path, m in model.named_modules() if any(q is not None for q in m._parameters.values())]
    shapes = [{n: tuple(q.shape) for n, q in m._parameters.items() if q is not None} for _, m in modules]
    return [(path, type(site_of(m)).__name__, own) for (path, m), own in zip(modules, shapes, strict=True)]


def ties(model: nn.Module) -> list[list[str]]:
    by_tensor: dict[int, list[str]] = {}
    for name, q in model.named_parameters(remove_duplicate=False):
        by_tensor.setdefault(id(q), []).append(name)
    return [names for names in by_tensor.values() if len(names) > 1]


@pytest.mark.parametrize(
    "other", [{}, {"attention_bias": True, "mlp_bias": True}, {"tie_word_embeddings": True}, {"tie_word_embeddings": False}]
)
@pytest.mark.parametrize("name", BLOCKS)
def test_modules_are_those_of_transformers(name: str, other: dict[str, Any], tmp_path: Path) -> None:
    folder = small(name, tmp_path / "base", **other)
    real, made = load(folder), found(folder)
    assert type(real).__name__ == name
    ignored = other.get("mlp_bias", False) and not any(key.endswith("down_proj.bias") for key in real.state_dict())
    if ignored:
        # The configuration speaks of biases that this architecture does not have.
        made = found(folder, mlp_bias=False)
        if made is None:
            assert not any(key.endswith("o_proj.bias") for key in real.state_dict())
            made = found(folder, mlp_bias=False, attention_bias=False)
    assert made is not None
    assert type(made).__name__ == name
    assert described(made) == described(real)
    assert ties(made) == ties(real)
    assert made.get_input_embeddings() is made.get_submodule("model.embed_tokens")
    assert real.get_output_embeddings() is real.get_submodule("lm_head")
    assert all(q.device.type == "meta" for q in made.parameters())


@pytest.mark.parametrize("name", BLOCKS)
def test_files_are_read_as_they_are(name: str, tmp_path: Path) -> None:
    """What transformers renames or converts has no outline."""
    folder = small(name, tmp_path / "base")
    real: Any = load(folder)
    assert (name in TIED) == real.config.tie_word_embeddings
    transforms = get_model_conversion_mapping(real)
    renamings = [t for t in transforms if isinstance(t, transformers.core_model_loading.WeightRenaming)]
    converters = [t for t in transforms if not isinstance(t, transformers.core_model_loading.WeightRenaming)]
    for key in Checkpoint.open(folder).tensors:
        assert rename_source_key(key, renamings, converters, real.base_model_prefix, real.state_dict()) == (key, None)


@pytest.mark.parametrize(
    "changed",
    [
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": None},
        {"hidden_size": 32},
        {"hidden_size": "absent"},
        {"vocab_size": 41},
        {"num_hidden_layers": 3},
        {"num_key_value_heads": 2},
        {"intermediate_size": 12},
        {"attention_bias": True},
        {"tie_word_embeddings": True},
    ],
)
def test_what_config_and_files_do_not_agree_on(changed: dict[str, Any], tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "base")
    assert found(folder) is not None
    assert found(folder, **changed) is None


def test_a_tied_head_that_is_in_the_files_as_well(tmp_path: Path) -> None:
    folder = saved(llama(), tmp_path / "base")
    assert "lm_head.weight" in Checkpoint.open(folder).tensors
    assert found(folder, tie_word_embeddings=True) is None


@pytest.mark.parametrize("name", ["Qwen3ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"])
def test_merging_gives_the_bits_of_memory(name: str, tmp_path: Path) -> None:
    base = small(name, tmp_path / "base")
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules="all-linear"))
    merge = StreamMerge(base, [folder])
    assert isinstance(merge.base.model, Outline)
    assert merge.model_class == name
    reference = in_memory(base, [folder], tmp_path / "reference")
    linear = 4 if name == "Phi3ForCausalLM" else 7
    assert len(check_same(base, merge.run(tmp_path / "out"), reference)) == 2 * linear


def test_a_merge_starts_without_transformers(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    program = (
        "import sys; from inlay.operations.stream_merge import StreamMerge; StreamMerge(*sys.argv[1:2], [sys.argv[2]]).run(sys.argv[3]);"
        "sys.exit('transformers' in sys.modules or 'torch._dynamo' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(base), str(folder), str(tmp_path / "out")], check=True)
    check_same(base, tmp_path / "out", in_memory(base, [folder], tmp_path / "reference"))
