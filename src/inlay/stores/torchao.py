"""torchao: a plain ``nn.Linear`` whose weight is a tensor of a class of its own, which knows its settings."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import Store, store


@store(
    "Int8Tensor",
    "Float8Tensor",
    "Int4Tensor",
    "Int4PreshuffledTensor",
    "Int4TilePackedTo4dTensor",
    "Int4PlainInt32Tensor",
    "IntxUnpackedToInt8Tensor",
    "TorchAOBaseTensor",
)
class TorchAO(Store):
    dense = False
    backend = "torchao"

    def read_tensor(self, stored: Any) -> Tensor:
        return stored.detach().dequantize()

    def unwritable(self, module: nn.Module, name: str) -> str:
        kind = type(module._parameters[name]).__name__
        if kind in MAKERS:
            return ""
        return f"torchao has no way to make a {kind} from a weight again; use merge_and_unload(base='dequantized')."

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        old: Any = module._parameters[name]
        new = MAKERS[type(old).__name__](old, weight.detach().to(old.device, old.dtype).contiguous())
        module._parameters[name] = nn.Parameter(new, requires_grad=False)


def _granularity(old: Any) -> Any:
    """Which numbers share a scale, from the size of the blocks."""
    kinds, block, shape = sys.modules["torchao.quantization.granularity"], tuple(old.block_size), tuple(old.shape)
    if block == shape:
        return kinds.PerTensor()
    return kinds.PerRow() if block[-1] == shape[-1] else kinds.PerGroup(block[-1])


def _int8(old: Any, w: Tensor) -> Tensor:
    given = {k: v for k in ("act_quant_kwargs", "act_quant_scale", "act_quant_zero_point", "act_pre_scale", "reduce_range")
             if (v := getattr(old, k, None)) is not None}  # fmt: skip
    return type(old).from_hp(w, _granularity(old), **given)


def _float8(old: Any, w: Tensor) -> Tensor:
    return type(old).from_hp(
        w,
        old.qdata.dtype,
        _granularity(old),
        mm_config=old.mm_config,
        kernel_preference=old.kernel_preference,
        act_quant_kwargs=old.act_quant_kwargs,
    )


def _blocks(old: Any, w: Tensor) -> Tensor:
    return type(old).from_hp(w, list(old.block_size))


def _few_bits(old: Any, w: Tensor) -> Tensor:
    return type(old).from_hp(w, tuple(old.block_size), old.target_dtype, activation_quantization=old.activation_quantization)


MAKERS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "Int8Tensor": _int8,
    "Float8Tensor": _float8,
    "Int4Tensor": _blocks,
    "Int4PreshuffledTensor": _blocks,
    "Int4TilePackedTo4dTensor": _blocks,
    "Int4PlainInt32Tensor": _blocks,
    "IntxUnpackedToInt8Tensor": _few_bits,
}
