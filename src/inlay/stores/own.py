"""Inlay's own: any host whose weight is a `QuantizedTensor` and that is in all else what it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import Store, store


@store("QuantizedTensor")
class Own(Store):
    dense = False
    in_formulas = True
    backend = "inlay"

    def read_tensor(self, stored: Any) -> Tensor:
        return stored.detach().dequantize()

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        old: Any = module._parameters[name]
        module._parameters[name] = nn.Parameter(old.again(weight.detach()), requires_grad=False)

    def exact(self, module: nn.Module) -> bool:
        return type(module).forward is nn.Linear.forward

    def plain(self, module: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        from ..quantize import hush_module

        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
        hush_module(module)
        return module
