"""compressed-tensors: torch's own layers with a scheme, whose weight is in packed pieces until the model's first call unpacks it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import SCHEME, store
from ..formats.packed import Packed, compressed_tensors
from ..formats.streaming import Entry
from .as_in_files import NO_FILES, AsInFiles, InMemory, Kept


@store(SCHEME)
class Compressed(AsInFiles):
    backend = "compressed-tensors"
    names = ("weight", "weight_scale", "weight_zero_point", "weight_g_idx")

    def scales(self, module: nn.Module) -> Tensor:
        own = module._parameters.get("weight")
        return own if _is_dense(own) else module._parameters["weight_scale"]  # type: ignore[return-value]

    def restored(self, host: Any) -> Tensor:
        own = host._parameters.get("weight")
        return own.detach() if _is_dense(own) else _unpacked(host, {})

    def put(self, module: nn.Module, name: str, held: Kept) -> None:
        # What was held may have been unpacked since.
        if _is_dense(module._parameters.get("weight")) and "weight" in held.tensors and not _is_dense(held.tensors["weight"]):
            dense = nn.Parameter(_unpacked(module, held.tensors), requires_grad=False)
            held = held._replace(tensors={**held.tensors, "weight": dense})
        super().put(module, name, held)

    def packed(self, parts: Mapping[str, Entry], module: nn.Module) -> Iterator[Packed]:
        asked: Any = getattr(getattr(module, SCHEME), "weights", None)
        if "weight" not in parts or "weight_scale" not in parts or asked is None:
            raise NotImplementedError
        codes = parts["weight"]
        if codes.torch_dtype.itemsize > 1:
            # The model has been called. The codes are those that the layer would be saved as.
            kind = torch.float8_e4m3fn if asked.type == "float" else torch.int8
            codes = InMemory.of("weight", torch.empty(codes.shape, dtype=kind, device=self.device(module, "weight")))
        named = {"codes": codes, "scale": parts["weight_scale"], "zero": parts.get("weight_zero_point")}
        found = compressed_tensors.weight("weight", named, self.dtype(module, "weight"), asked.num_bits)
        if "weight_g_idx" not in parts and not getattr(asked, "actorder", None):
            yield found

    def _apart(self, entry: Packed, module: nn.Module, own: Tensor) -> float:
        # Of a dense weight there are no codes to compare it with.
        return 0.0 if _is_dense(module._parameters.get("weight")) else super()._apart(entry, module, own)

    def _made(self, module: nn.Module, entry: Packed, made: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        if not _is_dense(module._parameters.get("weight")):
            return made
        again = {name: InMemory.of(part.key, made[part.key]) for name, part in entry.parts.items()}
        return {**made, "weight": replace(entry, parts=again).read(NO_FILES).to(self.device(module, "weight"))}


def _is_dense(weight: Tensor | None) -> bool:
    return weight is not None and weight.dtype.itemsize > 1


@torch.no_grad()
def _unpacked(module: nn.Module, tensors: Mapping[str, Tensor]) -> Tensor:
    """The weight as the library unpacks it, with these in place of the module's own tensors."""
    from ..core.inlaid import bare
    from ..core.place import host_class

    twin: Any = bare(module) if host_class(module) is not type(module) else copy.copy(module)
    # What is unpacked goes into tables of the copy's own.
    twin.__dict__ |= {"_parameters": {**module._parameters, **tensors}, "_buffers": dict(module._buffers)}
    sys.modules["compressed_tensors"].compressors.base.decompress_module(twin)
    return twin._parameters["weight"].detach()
