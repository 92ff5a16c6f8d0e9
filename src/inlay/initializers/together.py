"""Decompositions of many layers: those of one shape in one call, as many as memory takes, and the rest of them later."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .started import Started

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.method import Method
    from ..core.site import Site
    from .calibration import Progress

# How many numbers of weights are decomposed at once. A CPU goes through a stack one by one, and better with one in its cache.
AT_ONCE = {"cpu": 2**20}
AT_ONCE_ELSEWHERE = 2**24


class Together(nn.Module):
    """What is found for layers, computed when the first of a kind is asked for, for others of its kind along with it.

    Args:
        sites: the layers by name.
        progress: called with the number of layers that are done, and of all.
    """

    def __init__(self, sites: Mapping[str, Site], progress: Progress | None = None) -> None:
        super().__init__()
        self.sites, self.progress, self.total, self.done = dict(sites), progress, len(sites), 0
        self.found: dict[str, tuple[Tensor, ...]] = {}

    def kind(self, path: str) -> object:
        """Layers of which this is the same are computed in one call."""
        return self.sites[path].shape, self.sites[path].device

    def numbers(self, path: str) -> int:
        """How many numbers there are to hold of a layer."""
        return self.sites[path].shape.numel()

    def find(self, paths: Sequence[str]) -> tuple[Tensor, ...]:
        """What is looked for, of layers of one kind, one behind another."""
        raise NotImplementedError

    def __contains__(self, path: str) -> bool:
        return path in self.sites or path in self.found

    @torch.no_grad()
    def take(self, path: str) -> tuple[Tensor, ...]:
        """What was found for one layer, which is forgotten here."""
        if path not in self.found:
            paths = self._like(path)
            found = self.find(paths)
            self.found |= {one: tuple(t[i] for t in found) for i, one in enumerate(paths)}
            for one in paths:
                del self.sites[one]
            self.done += len(paths)
            if self.progress is not None:
                self.progress(self.done, self.total)
        return self.found.pop(path)

    def _like(self, path: str) -> list[str]:
        most, own = AT_ONCE.get(self.sites[path].device.type, AT_ONCE_ELSEWHERE) // max(1, self.numbers(path)), self.kind(path)
        return [path, *islice((other for other in self.sites if other != path and self.kind(other) == own), max(1, most) - 1)]


class Computed(Started):
    """Mixed in front of a method whose start is computed from the weights: those of one shape in one call."""

    def kind(self, site: Site) -> object:
        """Layers of which this is the same, and the shape, are computed in one call."""
        return type(self), self.rank_at(site), self.scaling, self.init

    def compute(self, sites: Sequence[Site], paths: Sequence[str], known: bool) -> tuple[Tensor, ...]:
        """What the start needs, of layers of one kind, one behind another.

        Args:
            known: the trained tensors came from a file, so only what is in none is needed.
        """
        raise NotImplementedError

    def computed(self, p: Adapter, *, known: bool = False) -> tuple[Tensor, ...]:
        """What `compute` gives for one layer."""
        waiting = isinstance(p.shared, Starts) and p.path in p.shared
        starts = p.shared if waiting else Starts({p.path: p.site}, lambda _: self)
        starts.known = known
        return starts.take(p.path)


class Starts(Together):
    """The starts of all layers of one adapter.

    Args:
        method_of: the method as it is for a name.

    Attributes:
        known: whether the adapter's trained tensors came from a file.
    """

    def __init__(self, sites: Mapping[str, Site], method_of: Callable[[str], Method], progress: Progress | None = None) -> None:
        methods = {path: m for path in sites if isinstance(m := method_of(path), Computed)}
        super().__init__({path: sites[path] for path in methods}, progress)
        self.methods, self.known = methods, False

    def kind(self, path: str) -> object:
        return super().kind(path), self.methods[path].kind(self.sites[path])

    def find(self, paths: Sequence[str]) -> tuple[Tensor, ...]:
        method = self.methods[paths[0]]
        found = method.compute([self.sites[path] for path in paths], paths, self.known)
        for path in paths:
            del self.methods[path]
        return found


def weights(sites: Sequence[Site]) -> Tensor:
    """The weights of sites of one shape, ``(sites, *batch, out, in)``. One by itself may be large, and is not copied."""
    return stacked([site.read()[0].detach() for site in sites])


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    return tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(list(tensors))
