"""Stores: how a host keeps its weight. One class a backend, found by the host's class, so no backend is ever imported."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

STORES: dict[str, Store] = {}
# The attribute by which compressed-tensors marks a layer of torch that it has compressed.
SCHEME = "quantization_scheme"
Registered = TypeVar("Registered", bound="type[Store]")


def store(*hosts: str) -> Callable[[Registered], Registered]:
    """Class decorator: hosts of these classes, or of this class of weight, keep their weight so. Names may be dotted."""

    def register(cls: Registered) -> Registered:
        made: Store = cls()  # type: ignore[assignment]
        STORES.update(dict.fromkeys(hosts, made))
        return cls

    return register


class Store:
    """Plain floating-point parameters.

    Attributes:
        dense: the weight can be read and written as it is, and kernels may stand for the host's forward.
        in_formulas: the stored tensor takes part in torch's operations as a dense one does, so that kernels may stand for the forward.
        backend: what a user knows the backend by.
    """

    dense = True
    in_formulas = False
    backend = ""

    # ---- looking ------------------------------------------------------------------------------------------------------
    def tensor(self, module: nn.Module, name: str) -> Tensor:
        """The tensor as it is stored. A host that computes its weight (a parametrization) is asked for it."""
        stored = module._parameters.get(name)
        return getattr(module, name) if stored is None else stored

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        return self.tensor(module, name).shape

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        """The dtype in which the host computes."""
        return self.tensor(module, name).dtype

    def device(self, module: nn.Module, name: str) -> torch.device:
        """Where `read` puts the weight."""
        return self.tensor(module, name).device

    # ---- reading and writing ------------------------------------------------------------------------------------------
    def read(self, module: nn.Module, name: str) -> Tensor:
        """The weight in floating point."""
        return self.read_tensor(self.held(module, name))

    def read_tensor(self, stored: Any) -> Tensor:
        """What `held` gave, also while it is not in its host, in floating point."""
        return stored

    def bias(self, stored: Tensor) -> Tensor:
        """The bias, as it is stored, in the form of what `read` gives."""
        return stored

    def held(self, module: nn.Module, name: str) -> Any:
        """All that makes up the stored weight, to be put back by `put`: the very same tensors."""
        return self.tensor(module, name)

    def put(self, module: nn.Module, name: str, held: Any) -> None:
        """Put back what `held` gave."""
        module._parameters[name] = held

    def unwritable(self, module: nn.Module, name: str) -> str:
        """Why no other weight can be put in the place of the host's; empty where it can."""
        if name in module._parameters:
            return ""
        return f"The {name} of this {type(module).__name__} is computed (parametrized); make it plain before merging."

    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        """Replace the weight by a new tensor in the dtype and memory layout, or with the settings of quantisation, of the old one.

        Args:
            weight: of the raw shape, in any floating dtype; it is rounded once.
        """
        old = self.tensor(module, name)
        new = self.like(old, weight)
        if name in module._parameters:
            module._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
        else:
            setattr(module, name, new)

    def like(self, old: Tensor, new: Tensor) -> Tensor:
        """New values in the dtype and the memory layout of old ones."""
        return torch.empty_like(old, requires_grad=False).copy_(new.detach())

    # ---- on hosts that are not dense ------------------------------------------------------------------------------------
    def adopt(self, module: nn.Module) -> None:
        """Called for each host of a model that gets its first adapter."""

    def exact(self, module: nn.Module) -> bool:
        """Whether the host, given an input in its own dtype, multiplies by exactly the weight that `read` gives."""
        return False

    def plain(self, module: nn.Module, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        """A dense module of this weight and bias that takes the host's place; the host itself where only its parameter changes.

        Args:
            name: of the weight in the host.
            weight: of the raw shape.
        """
        made: nn.Module
        if isinstance(module, nn.Embedding):
            made = nn.Embedding(*weight.shape, padding_idx=module.padding_idx, device="meta")
        else:
            made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
        made._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made._parameters["bias"] = nn.Parameter(bias, requires_grad=False)
        return made.train(module.training)


DENSE = Store()


def alike(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors lie in memory in the same way."""
    return type(a) in (Tensor, nn.Parameter) and (a.dtype, a.device, a.shape, a.stride()) == (b.dtype, b.device, b.shape, b.stride())


@cache
def _known() -> dict[str, Store]:
    import_module("inlay.stores")
    return STORES


def store_of(module: nn.Module, name: str = "weight") -> Store:
    """The store of a host: one of its own (weights that are still on disk), or by the names of its classes, or of its weight's."""
    own = module.__dict__.get("_inlay_store")
    if own is not None:
        return own
    known, weight = _known(), module._parameters.get(name)
    kinds = type(module).__mro__ if type(weight) in (nn.Parameter, Tensor, type(None)) else (*type(module).__mro__, *type(weight).__mro__)
    for cls in kinds:
        found = known.get(cls.__name__) or known.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found
    return known[SCHEME] if SCHEME in vars(module) and SCHEME in known else DENSE
