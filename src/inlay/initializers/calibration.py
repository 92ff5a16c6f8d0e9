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

from ..core.families import acts_on_last_axis
from ..core.site import AnyConv

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


def is_multiplied(site: Site) -> bool:
    """Whether what a layer's matrix multiplies can be told from the layer's input: not where the host reads its weight itself."""
    return acts_on_last_axis(site) or isinstance(site, AnyConv)


def multiplied(site: Site, x: Tensor) -> Tensor:
    """What a layer's matrix multiplies, as rows ``(*batch, n, in)``: of a convolution patches of its input, group by group."""
    if acts_on_last_axis(site):
        return x.reshape(-1, x.shape[-1])
    # Convolved with each patch's unit vectors, the input is its patches, under any stride, dilation and padding.
    units = torch.eye(site.size("in"), dtype=x.dtype, device=x.device).expand(*site.batch, -1, -1)
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        patches = site.down(x, units)
    patches = patches.movedim(-1 - len(site.kernel), -1)
    return patches.reshape(-1, *site.batch, site.size("in")).movedim(0, -2)


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
