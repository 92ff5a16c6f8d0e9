"""Linear layers of the quantisation backends that are installed here: ``{name: how one is made of a dense layer}``."""

from __future__ import annotations

import copy
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn


def bitsandbytes4(dense: nn.Linear, **options: Any) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(dense.in_features, dense.out_features, dense.bias is not None, **{"compute_dtype": torch.float32, **options})
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")


def bitsandbytes8(dense: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    made = bnb.nn.Linear8bitLt(dense.in_features, dense.out_features, dense.bias is not None, has_fp16_weights=False)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu")


def torchao(dense: nn.Linear, config: str, **options: Any) -> nn.Module:
    import torchao.quantization as q

    holder = nn.Sequential(copy.deepcopy(dense))
    q.quantize_(holder, getattr(q, config)(**options))
    return holder[0]


def hqq(dense: nn.Linear, bits: int = 4) -> nn.Module:
    from hqq.core.quantize import BaseQuantizeConfig, HQQBackend, HQQLinear

    HQQLinear.set_backend(HQQBackend.PYTORCH)
    config = BaseQuantizeConfig(nbits=bits, group_size=64)
    return HQQLinear(copy.deepcopy(dense), config, compute_dtype=torch.float32, device="cpu")


Make = Callable[[nn.Linear], nn.Module]

# Each backend once: every method is tested on these.
BACKENDS: dict[str, Make] = {
    "bitsandbytes-nf4": lambda d: bitsandbytes4(d, quant_type="nf4"),
    "bitsandbytes-int8": bitsandbytes8,
    "torchao-int8": lambda d: torchao(d, "Int8WeightOnlyConfig", version=2),
}
# Their further settings.
SETTINGS: dict[str, Make] = {
    "bitsandbytes-fp4": lambda d: bitsandbytes4(d, quant_type="fp4"),
    "bitsandbytes-nf4-plain": lambda d: bitsandbytes4(d, quant_type="nf4", compress_statistics=False),
    "bitsandbytes-nf4-in-bfloat16": lambda d: bitsandbytes4(d, quant_type="nf4", quant_storage=torch.bfloat16),
    "torchao-float8": lambda d: torchao(d, "Float8WeightOnlyConfig"),
    "torchao-int4": lambda d: torchao(d, "IntxWeightOnlyConfig", weight_dtype=torch.int4),
    "torchao-int8-dynamic": lambda d: torchao(d, "Int8DynamicActivationInt8WeightConfig", version=2),
}
if find_spec("hqq"):
    BACKENDS["hqq-int4"] = hqq
    SETTINGS["hqq-int8"] = lambda d: hqq(d, 8)

# What rounding takes of a weight of normally distributed numbers, at most.
LOSS = {"nf4": 0.11, "fp4": 0.14, "int4": 0.14, "int8": 0.015, "float8": 0.04}


def loss(backend: str) -> float:
    return LOSS[backend.split("-")[1]]


def state(module: nn.Module) -> dict[str, Tensor]:
    """Every tensor of a host, however it is kept, with its own pieces."""
    found: dict[str, Tensor] = {}

    def look(name: str, value: Any) -> None:
        if isinstance(value, Tensor):
            for attribute, piece in vars(value).items() if type(value) is not nn.Parameter else ():
                look(f"{name}.{attribute}", piece)
            whole = value.dequantize() if hasattr(value, "qdata") else value.detach()
            # Codes that are kept as floating-point numbers may happen to be none.
            found[name] = whole.view(torch.uint8) if whole.dtype == torch.bfloat16 else whole
        elif isinstance(value, dict):
            for key, piece in value.items():
                look(f"{name}.{key}", piece)
        elif type(value).__name__ == "QuantState":
            look(name, vars(value))

    for name, value in [*module._parameters.items(), *module._buffers.items(), ("meta", vars(module).get("meta"))]:
        look(name, value)
    return {name: t.clone() for name, t in found.items()}
