"""What quantised hosts have in common, and hosts that do not say what their weight is: their forward on an identity matrix does."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import Store


class Quantised(Store):
    """A linear layer of ``in_features`` and ``out_features``."""

    dense = False

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return torch.Size((module.out_features, module.in_features))  # type: ignore[arg-type]

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        found: Any = getattr(module, "compute_dtype", None) or self.scales(module).dtype
        return found if found.itemsize > 1 else torch.float32

    def device(self, module: nn.Module, name: str) -> torch.device:
        return self.scales(module).device

    def scales(self, module: nn.Module) -> Tensor:
        """A tensor of the host that says where it is and, unless the host has a ``compute_dtype``, in which dtype it computes."""
        found = [t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None and t.is_floating_point()]
        return found[0] if found else next(t for t in (*module._parameters.values(), *module._buffers.values()) if t is not None)

    def unwritable(self, module: nn.Module, name: str) -> str:
        return (
            f"{self.backend} fits its numbers to data, or has no way to make them from a weight again, so nothing can be merged into this "
            f"{host_of(module).__name__}; use merge_and_unload(base='dequantized') or base='original'."
        )


class Probed(Quantised):
    """A host that has no way to give its weight back."""

    def held(self, module: nn.Module, name: str) -> Any:
        return module

    def read_tensor(self, stored: Any) -> Tensor:
        return probed(stored, self.dtype(stored, "weight"), self.device(stored, "weight"))


@torch.no_grad()
def probed(module: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A host's weight by its forward: the rows of an identity matrix go in, the columns of the weight come out."""
    from ..core.inlaid import bare
    from ..core.place import host_class

    host: Any = bare(module) if host_class(module) is not type(module) else module
    bias = host._parameters.get("bias", host._buffers.get("bias", getattr(host, "bias", None)))
    training = host.training
    eye = torch.eye(host.in_features, dtype=dtype, device=device)
    try:
        host.training = False
        columns = type(host).forward(host, eye)
    finally:
        host.training = training
    # The bias is in each row once.
    return (columns if bias is None else columns - bias).mT.contiguous()


def host_of(module: nn.Module) -> type[nn.Module]:
    from ..core.place import host_class

    return host_class(module)
