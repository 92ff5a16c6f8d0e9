"""transformers' own linear layers in eight-bit floating point: a scale for the whole weight, for each block of it, or for each row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.stores import store
from ..kernels.scaled import spread, to_float8
from .frozen import Quantised


class Scaled(NamedTuple):
    codes: Any
    scale: Any
    # (rows, columns) of a block that has one scale.
    block: tuple[int, int]
    dtype: torch.dtype


@store("transformers.integrations.finegrained_fp8.FP8Linear")
class Float8(Quantised):
    backend = "transformers FP8"
    scale_name = "weight_scale_inv"

    def block(self, module: nn.Module) -> tuple[int, int]:
        found: Any = getattr(module, "block_size", None)
        return tuple(self.shape(module, "weight")) if found is None else tuple(found)  # type: ignore[return-value]

    def scales(self, module: nn.Module) -> Tensor:
        return module._parameters["weight"]  # type: ignore[return-value]

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        own = self.scales(module)
        if own.dtype.itemsize > 1:
            return own.dtype
        bias = module._parameters.get("bias")
        return torch.bfloat16 if bias is None or bias.dtype == torch.float32 else bias.dtype

    def held(self, module: nn.Module, name: str) -> Scaled:
        own = module._parameters
        return Scaled(own["weight"], own[self.scale_name], self.block(module), self.dtype(module, name))

    def put(self, module: nn.Module, name: str, held: Any) -> None:
        module._parameters["weight"], module._parameters[self.scale_name] = held.codes, held.scale

    @torch.no_grad()
    def read_tensor(self, stored: Any) -> Tensor:
        if stored.codes.dtype.itemsize > 1:
            return stored.codes.detach()
        scale = stored.scale.float()
        return stored.codes.float() * spread(scale.reshape(scale.shape if scale.ndim == 2 else (1, 1)), stored.block, stored.codes.shape)

    def unwritable(self, module: nn.Module, name: str) -> str:
        own = module._parameters
        if own["weight"].is_floating_point() and own[self.scale_name].dtype == torch.float32:  # type: ignore[union-attr]
            return ""
        return super().unwritable(module, name)

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        old = self.held(module, name)
        codes, scale = to_float8(weight.detach().to(old.codes.device, torch.float32), old.block, old.codes.dtype)
        made = nn.Parameter(codes, requires_grad=False), nn.Parameter(scale.reshape(old.scale.shape), requires_grad=False)
        self.put(module, name, Scaled(*made, old.block, old.dtype))


@store("transformers.integrations.fbgemm_fp8.FbgemmFp8Linear")
class RowsFloat8(Float8):
    scale_name = "weight_scale"

    def block(self, module: nn.Module) -> tuple[int, int]:
        return 1, self.shape(module, "weight")[1]
