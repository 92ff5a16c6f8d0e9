"""Merging on disk takes no more memory than three times the largest tensor and 300 MB."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from inlay import LoraConfig, RandLoraConfig, get_peft_model, quantize_
from inlay.core.method import METHODS
from inlay.formats.streaming import Checkpoint

from .bases import PIECEWISE, adapter, llama, mixtral, moved, saved

# The kernel's own mark of this process; what `resource` says is at least that of the process that started it.
MEASURE = """
import sys
from inlay.operations.stream_merge import StreamMerge
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
merge = StreamMerge(sys.argv[1], [sys.argv[2]])
before = peak()
merge.run(sys.argv[3])
print(peak() - before)
"""


def test_peak_memory_is_that_of_a_slice(tmp_path: Path) -> None:
    model = llama(hidden_size=512, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=8, vocab_size=64)
    base = saved(model, tmp_path / "base", max_shard_size="100MB")
    folder = adapter(base, tmp_path / "a", LoraConfig(r=4, target_modules="all-linear"))
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    words = [sys.executable, "-c", MEASURE, str(base), str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    largest = max(e.nbytes for e in Checkpoint.open(base).tensors.values())
    # What waits to be written, and has not been by a slow disk, counts as well.
    assert size > 400e6
    assert grown < min(3 * largest + 300e6, size / 2)


MEASURE_ALL = (
    MEASURE[: MEASURE.index("merge = ")]
    + """
import shutil
plans = [StreamMerge(sys.argv[1], [folder], base_dtype=sys.argv[3] or None) for folder in sys.argv[4:]]
for merge, folder in zip(plans, sys.argv[4:]):
    before = peak()
    merge.run(sys.argv[2])
    print(folder.rpartition("/")[2], peak(), before)
    shutil.rmtree(sys.argv[2])
"""
)
OFTEN = ["LORA", "LOHA", "OFT"]
REST = [name for name in PIECEWISE if name not in OFTEN]


@pytest.mark.parametrize(
    ("to", "names", "width"),
    [
        ("", OFTEN, 6144),
        ("nf4", OFTEN, 6144),
        pytest.param("", REST, 6144, marks=pytest.mark.slow),
        pytest.param("nf4", REST, 6144, marks=pytest.mark.slow),
        pytest.param("", list(PIECEWISE), 24576, marks=pytest.mark.slow),
        pytest.param("nf4", list(PIECEWISE), 24576, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_where_the_largest_tensor_is_adapted(to: str, names: list[str], width: int, tmp_path: Path) -> None:
    """All of them one after another in one process, whose mark never falls: the sum of all growth is bound as that of each."""
    model = llama(hidden_size=4096, intermediate_size=width, num_hidden_layers=1, num_attention_heads=8, vocab_size=64)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")  # type: ignore[operator]
    largest = max(e.nbytes for e in Checkpoint.open(tmp_path / "base").tensors.values())
    folders = []
    for name in names:
        method, options = PIECEWISE[name]
        config = METHODS[method](target_modules=["up_proj", "down_proj"], **options)  # type: ignore[call-arg]
        tuned = get_peft_model(model, config)
        moved(tuned)
        tuned.save_pretrained(tmp_path / name)
        model = tuned.unload()
        folders.append(str(tmp_path / name))
    base = tmp_path / "base"
    if to:
        base = tmp_path / to
        quantize_(model, to).save_pretrained(base)  # type: ignore[operator]
    words = [sys.executable, "-c", MEASURE_ALL, str(base), str(tmp_path / "out"), "requantized" if to else "", *folders]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\n")[:-1]
    print(*lines, sep="\n")
    assert len(lines) == len(names)
    assert largest >= 50e6
    assert int(lines[-1].split()[1]) - int(lines[0].split()[2]) < 3 * largest + 300e6


WIDE = {"hidden_size": 4096, "num_hidden_layers": 1, "num_attention_heads": 8, "vocab_size": 64}
MLP = ["up_proj", "down_proj"]
EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}


def wide() -> nn.Module:
    return llama(**WIDE, intermediate_size=24576)


def words() -> nn.Module:
    return llama(**WIDE | {"vocab_size": 24576}, intermediate_size=64, tie_word_embeddings=True)


def two() -> nn.Module:
    return llama(**WIDE | {"vocab_size": 24576}, intermediate_size=64)


def experts() -> nn.Module:
    return mixtral(**WIDE, intermediate_size=12288)


def experts_and_words() -> nn.Module:
    return mixtral(**WIDE | {"vocab_size": 24576}, intermediate_size=6144)


RETRAINED = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}
# The base, how many adapters, their options, and those of the merge.
CASES: dict[str, tuple[Any, int, dict[str, Any], str]] = {
    "a head that becomes untied": (words, 1, {"target_modules": ["lm_head"]}, ""),
    "embeddings": (words, 1, {"target_modules": ["embed_tokens"]}, ""),
    "tokens": (words, 1, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}, ""),
    "a retrained head": (words, 1, RETRAINED, ""),
    "a retrained head of its own, and embeddings": (two, 1, RETRAINED | {"modules_to_save": ["embed_tokens", "lm_head"]}, ""),
    "retrained experts": (experts, 1, RETRAINED | {"modules_to_save": ["mlp"]}, ""),
    "linear of retrained heads": (words, 2, RETRAINED, "combine='linear'"),
    "ties of retrained heads": (words, 2, RETRAINED, "combine='ties'"),
    "dare_ties of retrained heads": (words, 2, RETRAINED, "combine='dare_ties'"),
    "sce of retrained heads": (words, 2, RETRAINED, "combine='sce'"),
    "karcher of retrained heads": (words, 2, RETRAINED, "combine='karcher'"),
    "ties of retrained experts": (experts_and_words, 2, RETRAINED | {"modules_to_save": ["mlp"]}, "combine='ties'"),
    "wider numbers": (wide, 1, {"target_modules": MLP}, "out_dtype=torch.float32"),
    "biases": (lambda: llama(**WIDE, intermediate_size=24576, mlp_bias=True), 1, {"target_modules": MLP, "bias": "all"}, ""),
    "experts one by one": (experts, 1, EXPERTS, ""),
    "experts one by one, reflected": (experts, 1, EXPERTS | {"method": "HRA"}, ""),
    "linear": (wide, 2, {"target_modules": MLP}, "combine='linear'"),
    "ties": (wide, 2, {"target_modules": MLP}, "combine='ties'"),
    "ties of changes": (wide, 2, {"target_modules": MLP}, "combine='ties_svd'"),
    "linear of LoHa": (wide, 2, {"method": "LOHA", "target_modules": MLP}, "combine='linear'"),
    "ties of LoHa": (wide, 2, {"method": "LOHA", "target_modules": MLP}, "combine='ties'"),
    "dare_ties of LoHa": (wide, 2, {"method": "LOHA", "target_modules": MLP}, "combine='dare_ties'"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_peak_memory_of_what_is_no_plain_weight(case: str, tmp_path: Path) -> None:
    make, count, fields, options = CASES[case]
    base = saved(make(), tmp_path / "base", max_shard_size="1GB", save_original_format=True)
    config = METHODS[fields.get("method", "LORA")](r=8, **{k: v for k, v in fields.items() if k != "method"})  # type: ignore[call-arg]
    folders = [str(adapter(base, tmp_path / str(i), config, seed=i)) for i in range(count)]
    program = MEASURE.replace("[sys.argv[2]])", f"sys.argv[2].split(','), {options})").replace("import sys", "import sys, torch")
    run = [sys.executable, "-c", program, str(base), ",".join(folders), str(tmp_path / "out")]
    grown = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    print(case, grown)
    assert grown < 3 * max(e.nbytes for e in Checkpoint.open(base).tensors.values()) + 300e6


WITH_ITS_PLAN = MEASURE.replace("merge = ", "from transformers import LlamaForCausalLM\nbefore = peak()\nmerge = ", 1)
WITH_ITS_PLAN = WITH_ITS_PLAN.replace("before = peak()\nmerge.run", "merge.run")


@pytest.mark.slow
def test_peak_memory_of_a_bank_that_no_layer_uses_as_a_whole(tmp_path: Path) -> None:
    """RandLoRA's is as wide as the widest input and as high as the widest output: here six times the largest tensor."""
    model = llama(hidden_size=2048, intermediate_size=12288, num_hidden_layers=1, num_attention_heads=8, vocab_size=64)
    base = saved(model.to(torch.bfloat16), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", RandLoraConfig(target_modules=MLP))
    largest = max(e.nbytes for e in Checkpoint.open(base).tensors.values())
    words = [sys.executable, "-c", WITH_ITS_PLAN, str(base), str(folder), str(tmp_path / "out")]
    grown = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    print("RandLoRA", grown)
    assert grown < 3 * largest + 300e6
