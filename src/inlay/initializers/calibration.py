"""What starts from data has in common: the layers that are meant, their inputs in a pass of the model, and files of results."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ..core.method import Method
    from ..core.site import Site

Progress = Callable[[int, int], object]


def targets(model: nn.Module, config: Method) -> dict[str, Site]:
    """The weights that a configuration means, by name.

    Raises:
        ValueError: it means none, or some that cannot take the method.
    """
    from ..core.targets import find_targets

    config.prepare(model)
    return {target.name: target.site for target in find_targets(model, config)}


class SameInput:
    """Tells layers that are given one and the same tensor, as the projections of an attention are."""

    def __init__(self) -> None:
        self.last: ref[Tensor] | None = None
        self.value: Any = None

    def __call__(self, x: Tensor, compute: Callable[[], Any]) -> Any:
        """What was computed for this very tensor when it was last met, or is now."""
        if self.last is None or self.last() is not x:
            self.value, self.last = compute(), ref(x)
        return self.value


@contextmanager
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, tuple[Any, ...]], object]) -> Iterator[None]:
    """Call ``see`` with the name and the arguments of each of these modules when it is called."""

    def hook(name: str) -> Callable[..., None]:
        def met(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            see(name, args or tuple(kwargs.values()))

        return met

    handles = [module.register_forward_pre_hook(hook(name), with_kwargs=True) for name, module in modules.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def stored(path: str | None, device: torch.device) -> dict[str, Tensor] | None:
    """Tensors that an earlier run left in a file; nothing else is read from it."""
    if path is None or not os.path.isfile(path) or not os.path.getsize(path):
        return None
    return torch.load(path, map_location=device, weights_only=True)


def store(path: str | None, tensors: Mapping[str, Tensor]) -> None:
    if path is not None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        torch.save(dict(tensors), path)
