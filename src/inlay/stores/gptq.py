"""GPTQ and AWQ, as gptqmodel runs them: many classes of layer, one a kernel, all of one base class."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.site import Linear, layout
from ..core.stores import store
from ..formats.packed import Packed, awq, gptq
from ..formats.streaming import Entry
from .as_in_files import AsInFiles
from .frozen import probed


@store("gptqmodel.nn_modules.qlinear.BaseQuantLinear")
class GPTQ(AsInFiles):
    """AWQ's layers, and those whose kernel has an order of its own, are asked by an identity matrix."""

    backend = "gptqmodel"
    names = ("qweight", "qzeros", "scales", "g_idx")

    def restored(self, host: Any) -> Tensor:
        return probed(host, self.dtype(host, "weight"), self.device(host, "weight"))

    def packed(self, parts: Mapping[str, Entry], module: nn.Module) -> Iterator[Packed]:
        dtype = self.dtype(module, "weight")
        # A kernel may have added the one that the first version of the format takes off the zeros.
        for kind, more in ((awq, ()), (gptq, (0,)), (gptq, (1,))):
            try:
                yield kind.weight("weight", parts, dtype, *more)
            except NotImplementedError:
                continue


@store("gptqmodel.nn_modules.qlinear.PackableQuantLinear")
class PackedGPTQ(GPTQ):
    """The layers that unpack their codes themselves."""

    @torch.no_grad()
    def restored(self, host: Any) -> Tensor:
        return host.dequantize_weight().mT.contiguous()


layout("gptqmodel.nn_modules.qlinear.BaseQuantLinear")(Linear)
