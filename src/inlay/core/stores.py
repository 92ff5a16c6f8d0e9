"""Stores: how a host keeps its weight. One class a backend, found by the host's class name, so no backend is ever imported."""

from __future__ import annotations

import torch
from torch import Tensor, nn

STORES: dict[str, Store] = {}


class Store:
    """Plain floating-point parameters."""

    dense = True

    def tensor(self, module: nn.Module, name: str) -> Tensor:
        """The tensor as it is stored. A host that computes its weight (a parametrization) is asked for it."""
        stored = module._parameters.get(name)
        return getattr(module, name) if stored is None else stored

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return self.tensor(module, name).shape

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        return self.tensor(module, name).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        """Where `read` puts the weight."""
        return self.tensor(module, name).device

    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight in floating point."""
        return self.read_tensor(self.tensor(module, name))

    def read_tensor(self, stored: Tensor) -> Tensor:
        """A stored tensor, also one that is not in its host at the moment, in floating point."""
        return stored

    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Replace the weight by a new tensor in the dtype and memory layout of the old one.

        Args:
            weight: of the raw shape, in any floating dtype; it is rounded once.
        """
        old = self.tensor(module, name)
        new = torch.empty_like(old, requires_grad=False).copy_(weight.detach())
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            setattr(module, name, new)


DENSE = Store()


def store_of(module: nn.Module) -> Store:
    """The store of a host: one of its own (weights that are still on disk), or by the names of its classes."""
    own = module.__dict__.get("_inlay_store")
    if own is not None:
        return own
    return next((STORES[cls.__name__] for cls in type(module).__mro__ if cls.__name__ in STORES), DENSE)
