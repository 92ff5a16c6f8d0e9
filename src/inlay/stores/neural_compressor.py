"""Intel neural-compressor: the layers that it patches for eight-bit floating point, whose weight lies transposed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.site import Linear, layout
from ..core.stores import store
from .frozen import Probed

HOST = "neural_compressor.torch.algorithms.fp8_quant._quant_common.helper_modules.PatchedLinear"


@store(HOST)
class NeuralCompressor(Probed):
    backend = "neural-compressor"

    def _own(self, module: nn.Module) -> Tensor:
        return module._parameters["weight"]  # type: ignore[return-value]

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        own = self._own(module)
        return own.shape if own.dtype.itemsize > 1 else own.mT.shape

    def scales(self, module: nn.Module) -> Tensor:
        return self._own(module)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        m: Any = module
        options = getattr(getattr(m, "_mod_extra_config", None), "config_params", {})
        return options.get("hp_dtype") or super().dtype(module, name)

    def read_tensor(self, stored: Any) -> Tensor:
        own = self._own(stored)
        if own.dtype.itemsize > 1:
            # It measures yet, and has not been converted.
            return own.detach()
        if not hasattr(stored, "in_features"):
            stored.out_features, stored.in_features = self.shape(stored, "weight")
        return super().read_tensor(stored)


layout(HOST)(Linear)
