"""What the matrices of a stack of experts multiply. Hosts read them one by one, so while the model runs an object stands in for the
stack that sees each expert go into a product."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.site import Stack

See = Callable[[int, Tensor], object]
PRODUCTS = {F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__}
OF_STACKS = {torch.bmm, Tensor.bmm, torch.matmul, Tensor.matmul, Tensor.__matmul__}


@contextmanager
def each_expert(site: Stack, see: See) -> Iterator[None]:
    """Call ``see`` with the number of an expert and the rows that it multiplies, whenever it does."""
    module, name = site.module, site.name
    parameters: dict[str, Any] = module._parameters
    held, config = parameters[name], getattr(module, "config", None)
    way = getattr(config, "_experts_implementation", None)
    parameters[name] = _Watched(held, see)
    if config is not None and way is not None:
        # The other ways have all experts in one product.
        config._experts_implementation = "eager"
    try:
        yield
    finally:
        parameters[name] = held
        if config is not None and way is not None:
            config._experts_implementation = way


class _Watched:
    """A stack, or one expert of it; torch's functions take the tensor in its place."""

    def __init__(self, tensor: Tensor, see: See, expert: int | None = None) -> None:
        self.tensor, self.see, self.expert = tensor, see, expert

    def __getitem__(self, index: Any) -> Any:
        found = self.tensor[index]
        one = isinstance(index, int) or (isinstance(index, Tensor) and not index.ndim)
        return _Watched(found, self.see, int(index)) if one and self.expert is None else found

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tensor, name)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if len(args) > 1 and isinstance(w := args[1], cls):
            if w.expert is not None and func in PRODUCTS:
                w.see(w.expert, args[0].detach())
            elif w.expert is None and func in OF_STACKS:
                for i, rows in enumerate(args[0].detach()):
                    w.see(i, rows)
        return func(*(a.tensor if isinstance(a, cls) else a for a in args), **kwargs)
