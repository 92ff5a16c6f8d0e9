"""HQQ: ``HQQLinear``, whose codes ``W_q`` go with a dictionary ``meta`` of scales and zeros."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.site import Linear, layout
from ..core.stores import store
from .frozen import Quantised


class HeldHQQ(NamedTuple):
    """The codes and what they mean, with the host that can read them."""

    codes: Any
    meta: dict[str, Any]
    host: Any


@store("hqq.core.quantize.HQQLinear")
class HQQ(Quantised):
    backend = "HQQ"

    def scales(self, module: nn.Module) -> Tensor:
        return module._parameters["W_q"]  # type: ignore[return-value]

    def held(self, module: nn.Module, name: str) -> HeldHQQ:
        return HeldHQQ(module._parameters["W_q"], module.meta, module)  # type: ignore[arg-type]

    @torch.no_grad()
    def read_tensor(self, stored: Any) -> Tensor:
        module, now = stored.host, (stored.host._parameters["W_q"], stored.host.meta)
        module._parameters["W_q"], module.meta = stored.codes, stored.meta
        try:
            return module.dequantize()
        finally:
            module._parameters["W_q"], module.meta = now

    def unwritable(self, module: nn.Module, name: str) -> str:
        known = getattr(module, "quant_config", None)
        return "" if known else "This HQQLinear does not know how it was quantised; use merge_and_unload(base='dequantized')."

    def put(self, module: nn.Module, name: str, held: Any) -> None:
        module._parameters["W_q"], module.meta = held.codes, held.meta

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        from ..core.place import host_class

        host: Any = module
        old = host._parameters["W_q"]
        config = host.quant_config | {"offload_meta": host.offload_meta}
        cls: Any = host_class(module)
        made = cls(None, config, compute_dtype=host.compute_dtype, device=str(old.device), initialize=False)
        made.quantize(weight.detach().to(old.device, torch.float32), **host.quant_config)
        self.put(module, name, HeldHQQ(made._parameters["W_q"], made.meta, module))


layout("hqq.core.quantize.HQQLinear")(Linear)
