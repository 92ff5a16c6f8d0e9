"""compressed-tensors: torch's own layers with a scheme, whose weight is in packed pieces until the model's first call unpacks it."""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import SCHEME, store
from .frozen import Quantised


@store(SCHEME)
class Compressed(Quantised):
    backend = "compressed-tensors"

    def scales(self, module: nn.Module) -> Tensor:
        own = module._parameters.get("weight")
        return own if own is not None and own.dtype.itemsize > 1 else module._parameters["weight_scale"]  # type: ignore[return-value]

    def held(self, module: nn.Module, name: str) -> Any:
        return module

    @torch.no_grad()
    def read_tensor(self, stored: Any) -> Tensor:
        own = stored._parameters.get("weight")
        if own is not None and own.dtype.itemsize > 1:
            return own.detach()
        from ..core.inlaid import bare
        from ..core.place import host_class

        twin: Any = bare(stored) if host_class(stored) is not type(stored) else copy.copy(stored)
        # What is unpacked goes into tables of the copy's own.
        twin.__dict__ |= {"_parameters": dict(stored._parameters), "_buffers": dict(stored._buffers)}
        sys.modules["compressed_tensors"].compressors.base.decompress_module(twin)
        return twin._parameters["weight"].detach()
