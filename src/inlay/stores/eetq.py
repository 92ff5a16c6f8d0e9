"""EETQ: columns of whole numbers in the order of a CUDA kernel, which alone can read them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.site import Linear, layout
from ..core.stores import store
from .frozen import Probed

HOSTS = ("transformers.integrations.eetq.EetqLinear", "eetq.modules.qlinear.EetqLinear")


@store(*HOSTS)
class EETQ(Probed):
    backend = "EETQ"

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return module._parameters["weight"].mT.shape if "weight" in module._parameters else super().shape(module, name)  # type: ignore[union-attr]

    def scales(self, module: nn.Module) -> Tensor:
        m: Any = module
        return m.weight_scales

    def read_tensor(self, stored: Any) -> Tensor:
        if not hasattr(stored, "in_features"):
            stored.out_features, stored.in_features = self.shape(stored, "weight")
        return super().read_tensor(stored)


layout(*HOSTS)(Linear)
