"""Of a weight that others quantised, no more is in memory in full precision than some rows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from inlay import LoraConfig

from .bases import linear, written

Parts = dict[str, Tensor]
SIZE: dict[str, Any] = {
    "num_key_value_heads": 1,
    "hidden_size": 4096,
    "intermediate_size": 8192,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "vocab_size": 64,
}
MEASURE = """
import resource, sys, time
import torch
torch.set_num_threads(1)
from inlay import LoraConfig
from inlay.operations.stream_merge import StreamMerge
def peak():
    for line in open("/proc/self/status"):
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
merge = StreamMerge(sys.argv[1], [sys.argv[2]], base_dtype=sys.argv[4])
before, start = peak(), time.process_time()
merge.run(sys.argv[3])
print(peak() - before, time.process_time() - start)
"""


def words(*shape: int) -> Tensor:
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)


def scales(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return (torch.rand(shape) * 0.01 + 0.001).to(dtype)


def gptq(out: int, inputs: int) -> Parts:
    groups = torch.arange(inputs, dtype=torch.int32) // 128
    found = {"qweight": words(inputs // 8, out), "qzeros": words(inputs // 128, out // 8), "scales": scales(inputs // 128, out)}
    return found | {"g_idx": groups}


def awq(out: int, inputs: int) -> Parts:
    return {"qweight": words(inputs, out // 8), "qzeros": words(inputs // 128, out // 8), "scales": scales(inputs // 128, out)}


def fp8(out: int, inputs: int) -> Parts:
    codes = torch.randint(0, 120, (out, inputs), dtype=torch.uint8).view(torch.float8_e4m3fn)
    return {"weight": codes, "weight_scale_inv": scales(out // 128, inputs // 128, dtype=torch.float32)}


def fp8_as_one(out: int, inputs: int) -> Parts:
    return fp8(out, inputs) | {"weight_scale_inv": scales(1, dtype=torch.float32).view(())}


def torchao(out: int, inputs: int) -> Parts:
    codes = torch.randint(-128, 128, (out, inputs), dtype=torch.int8)
    return {"_weight_qdata": codes, "_weight_scale": scales(out, 1), "_weight_zero_point": torch.zeros(out, 1, dtype=torch.int8)}


def hqq(out: int, inputs: int) -> Parts:
    def text(said: str) -> Tensor:
        return torch.tensor(list(said.encode()), dtype=torch.uint8)

    groups = out * inputs // 64
    numbers = {"nbits": 4, "group_size": 64, "axis": 1, "view_as_float": 0, "quant_scale": 0, "quant_zero": 0}
    found = {
        "W_q": torch.randint(0, 256, (groups // 2, 64), dtype=torch.uint8),
        "scale": scales(groups, 1),
        "zero": scales(groups, 1) + 7.5,
    }
    found |= {name: torch.tensor(value) for name, value in numbers.items()}
    return found | {"shape": torch.tensor([out, inputs]), "packing": text("4bit_u8"), "compute_dtype": text("torch.float16")}


CONFIGS: dict[Callable[[int, int], Parts], dict[str, Any]] = {
    gptq: {"quant_method": "gptq", "bits": 4, "group_size": 128},
    awq: {"quant_method": "awq", "bits": 4, "version": "gemm"},
    fp8: {"quant_method": "fp8", "weight_block_size": [128, 128]},
    fp8_as_one: {"quant_method": "fp8"},
    torchao: {"quant_method": "torchao"},
    hqq: {"quant_method": "hqq"},
}


@pytest.mark.slow
@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize("make", CONFIGS, ids=lambda f: f.__name__)
def test_peak_memory(make: Callable[[int, int], Parts], into: str, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**SIZE))
    found, described = {}, {}
    for key, w in model.state_dict().items():
        parts = make(*w.shape) if linear(key) else {key.rpartition(".")[2]: torch.rand(w.shape).half()}
        found |= {f"{key.rpartition('.')[0]}.{end}": t for end, t in parts.items()}
        kind = {"_type": "Tensor"}
        if linear(key):
            kind = {"_type": "Int8Tensor", "_data": {"block_size": [1, w.shape[1]], "dtype": {"_type": "torch.dtype", "_data": "float16"}}}
        described[key] = json.dumps(kind)
    said = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "float16", "quantization_config": CONFIGS[make], **SIZE}
    metadata = described | {"tensor_names": json.dumps(list(described))} if make is torchao else None
    base = written(tmp_path / "base", said, found, metadata)
    LoraConfig(r=8, target_modules=["up_proj", "down_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path / "a")
    factors = {}
    for name, out, inputs in (("up_proj", 8192, 4096), ("down_proj", 4096, 8192)):
        path = f"base_model.model.model.layers.0.mlp.{name}"
        factors |= {f"{path}.lora_A.weight": scales(8, inputs), f"{path}.lora_B.weight": scales(out, 8)}
    save_file(factors, tmp_path / "a" / "adapter_model.safetensors")
    del found
    line = [sys.executable, "-c", MEASURE, str(base), str(tmp_path / "a"), str(tmp_path / "out"), into]
    shown = subprocess.run(line, capture_output=True, text=True, check=True).stdout
    print(make.__name__, into, shown)
    assert int(shown.split()[0]) < 3 * SIZE["hidden_size"] * SIZE["intermediate_size"] * 2 + 300e6
