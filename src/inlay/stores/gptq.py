"""GPTQ and AWQ, as gptqmodel runs them: many classes of layer, one a kernel, all of one base class."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.site import Linear, layout
from ..core.stores import store
from .frozen import Probed, Quantised


@store("gptqmodel.nn_modules.qlinear.BaseQuantLinear")
class GPTQ(Probed):
    """AWQ's layers, and those whose kernel has an order of its own, are asked by an identity matrix."""

    backend = "gptqmodel"


@store("gptqmodel.nn_modules.qlinear.PackableQuantLinear")
class PackedGPTQ(Quantised):
    """The layers that unpack their codes themselves."""

    backend = "gptqmodel"

    def held(self, module: Any, name: str) -> Any:
        return module

    @torch.no_grad()
    def read_tensor(self, stored: Any) -> Tensor:
        return stored.dequantize_weight().mT.contiguous()


layout("gptqmodel.nn_modules.qlinear.BaseQuantLinear")(Linear)
