"""The search for the directions of all layers' inputs in one stream of data, and what part of a budget of ranks each of them is worth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from .calibration import Progress, watching
from .directions import StreamedDirections

if TYPE_CHECKING:
    from ..core.site import Site


@dataclass
class Search:
    """The principal directions of what layers multiply, found while a model runs.

    Args:
        sites: the layers by name.
        rows: gives what a layer multiplies, ``(*batch, n, in)``, from the arguments of its call, what `prepare` found, and its name.
        ranks: how many directions each is to have; ``most`` how many it may get where ranks are moved.
        movable: the layers whose ranks are moved.
        tau: a direction counts as found when the cosine between two steps is at least this.
        prepare: what `rows` needs to know of a batch.
        gather: take the rows of all processes.
    """

    sites: Mapping[str, Site]
    rows: Mapping[str, Callable[..., Tensor]]
    ranks: Mapping[str, int]
    most: dict[str, int]
    movable: set[str]
    tau: float
    prepare: Callable[[Any], Any]
    gather: bool = False
    # How many of its directions each layer gets, as it looks so far.
    wanted: dict[str, int] = field(default_factory=dict)
    # Of layers that are given one tensor, the first looks for all.
    leaders: dict[str, str] = field(default_factory=dict)
    streams: dict[str, StreamedDirections] = field(default_factory=dict)

    def run(self, forward: Callable[[Any], object], batches: Iterable[Any], progress: Progress | None) -> dict[str, StreamedDirections]:
        """What was found for each layer; `wanted` says how many of the directions are its own.

        Raises:
            ValueError: there is no data, or not enough, or a layer was not called.
        """
        device, sites = next(iter(self.sites.values())).device, self.sites
        for batch in _again_and_again(batches, lambda: sum(s.count for s in self.streams.values())):
            batch = _moved(batch, device)
            prepared = self.prepare(batch)
            if not self.streams:
                self._meet(forward, batch)
            open_ = {name for name, stream in self.streams.items() if not self._found(stream, self.wanted[name])}
            if progress is not None:
                progress(sum(self.leaders[name] not in open_ for name in sites), len(sites))
            if not open_:
                break

            def see(name: str, args: tuple[Any, ...], prepared: Any = prepared) -> None:
                rows = self.rows[name](args, prepared, name)
                self.streams[name].add(_gathered(rows) if self.gather else rows)

            with watching({name: sites[name].module for name in open_}, see):
                forward(batch)
            if all(stream.directions is not None for stream in self.streams.values()):
                self.wanted = self._distributed()
        return {name: self.streams[self.leaders[name]] for name in sites}

    def _meet(self, forward: Callable[[Any], object], batch: Any) -> None:
        """Find out which layers are given the same tensor."""
        met: dict[str, ref[Tensor]] = {}

        def meet(name: str, args: tuple[Any, ...]) -> None:
            for other, tensor in met.items():
                if tensor() is args[0] and self.rows[other] is self.rows[name]:
                    self.leaders[name] = other
                    return
            met[name], self.leaders[name] = ref(args[0]), name

        with watching({name: site.module for name, site in self.sites.items()}, meet):
            forward(batch)
        absent = next((name for name in self.sites if name not in self.leaders), None)
        if absent is not None:
            raise ValueError(f"{absent!r} was not called in a forward pass; take it out of the targets.")
        for name, leader in self.leaders.items():
            self.most[leader] = max(self.most[leader], self.most[name])
        self.most = {name: self.most[self.leaders[name]] if name in self.movable else self.most[name] for name in self.sites}
        self.wanted = dict(self.most)
        self.streams = {name: StreamedDirections(self.most[name]) for name in self.sites if self.leaders[name] == name}

    def _found(self, stream: StreamedDirections, count: int) -> bool:
        if count == 0:
            return stream.directions is not None
        return stream.cosines is not None and bool((stream.cosines[..., :count] >= self.tau).all())

    def _distributed(self) -> dict[str, int]:
        order = [name for name in (*self.streams, *(n for n in self.sites if n not in self.streams)) if name in self.movable]
        shares = {name: self.streams[self.leaders[name]].shares[: self.most[name]] for name in order}
        return {**self.ranks, **distribute(shares, sum(self.ranks[name] for name in order))}


def distribute(shares: Mapping[str, Tensor], budget: int) -> dict[str, int]:
    """Ranks for layers: the ``budget`` directions that explain the largest shares of their layers' variance, wherever they are."""
    owners = [name for name, values in shares.items() for _ in values]
    if not owners:
        return {}
    order = torch.cat([values.cpu() for values in shares.values()]).argsort(descending=True, stable=True)
    ranks = dict.fromkeys(shares, 0)
    for i in order[:budget].tolist():
        ranks[owners[i]] += 1
    return ranks


# ---- batches --------------------------------------------------------------------------------------------------------------
def _gathered(rows: Tensor) -> Tensor:
    """The rows ``(*, n, in)`` of all processes."""
    dist, rows = torch.distributed, rows.movedim(-2, 0)
    counts = [torch.zeros(1, dtype=torch.long, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(c) for c in counts)
    padded = torch.cat((rows, rows.new_zeros(most - len(rows), *rows.shape[1:])))
    found = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(found, padded)
    return torch.cat([part[: int(c)] for part, c in zip(found, counts, strict=True)]).movedim(0, -2)


def _moved(inputs: Any, device: torch.device) -> Any:
    if hasattr(inputs, "to"):
        return inputs.to(device)
    if isinstance(inputs, Mapping):
        return {k: _moved(v, device) for k, v in inputs.items()}
    if isinstance(inputs, (list, tuple)):
        return type(inputs)(_moved(v, device) for v in inputs)
    return inputs


def _again_and_again(batches: Iterable[Any], heard: Callable[[], int]) -> Iterator[Any]:
    """The batches, pass after pass.

    Raises:
        ValueError: there are none, or a whole pass had less rows than directions are looked for.
    """
    while True:
        before, empty = heard(), True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ValueError("The dataloader is empty.")
        if heard() == before:
            raise ValueError(
                "A whole pass through the data has less rows than directions are looked for; give more data, or lower r or rho."
            )
