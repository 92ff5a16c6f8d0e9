"""The declaration of an adapter's tensors: shapes in the sizes of a layer, initial values, and how they lie in a file."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from .site import Site

Init = Callable[[Tensor, torch.Generator], Any]


def zeros(tensor: Tensor, _: torch.Generator) -> None:
    tensor.zero_()


def ones(tensor: Tensor, _: torch.Generator) -> None:
    tensor.fill_(1)


def constant(value: float) -> Init:
    return lambda tensor, _: tensor.fill_(value)


def normal(std: float = 1.0) -> Init:
    return lambda tensor, generator: tensor.normal_(0, std, generator=generator)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """The default of ``nn.Linear``: uniform within ``1 / sqrt(fan_in)``, fan_in being the last axis."""
    bound = tensor.shape[-1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Param:
    """The declaration of one tensor of an adapter; nothing is allocated by it.

    Args:
        axes: ``"out"``, ``"in"``, ``"channel"`` or numbers, behind the batch axes of the site.
        init: fills a float32 tensor in place, with a generator of its own.
        key: the end of its key in a file; None stands for the parameter's name.
        file_shape: its shape in a file, where the layout's own (`Site.in_file`) is not what HF writes.
        trainable: a parameter, or a buffer.
        persistent: goes to the file and the state dict.
        batched: the batch axes of the site go before the axes.
        dtype: a dtype of its own (indices); None follows the policy.
        optional: a file may lack it; `Method.derive` gives it then.
    """

    axes: tuple[str | int, ...]
    init: Init = zeros
    key: str | None = None
    file_shape: tuple[int, ...] | None = None
    trainable: bool = True
    persistent: bool = True
    batched: bool = True
    dtype: torch.dtype | None = None
    optional: bool = False

    def shape(self, site: Site) -> tuple[int, ...]:
        return (*(site.batch if self.batched else ()), *map(site.size, self.axes))

    def to_file(self, site: Site, tensor: Tensor) -> Tensor:
        if self.file_shape is not None:
            return tensor.reshape(self.file_shape)
        return site.in_file(self.axes, tensor) if self.batched else tensor

    def from_file(self, site: Site, tensor: Tensor) -> Tensor:
        if self.file_shape is not None or not self.batched:
            return tensor.reshape(self.shape(site))
        return site.from_file(self.axes, tensor)

    def shape_in_file(self, site: Site) -> tuple[int, ...]:
        return tuple(self.to_file(site, torch.empty(self.shape(site), device="meta")).shape)


def generator_for(seed: int | None, *path: str) -> torch.Generator:
    """A generator of its own for each tensor: it depends on the seed and the tensor's name, on nothing that ran before."""
    # torch's generator on the CPU looks at 32 bits of its seed, so all of it has to go into those.
    return torch.Generator().manual_seed(zlib.crc32("/".join((str(seed or 0), *path)).encode()))


def count(declared: dict[str, Param], site: Site) -> int:
    """How many numbers the trainable parameters hold."""
    return sum(prod(q.shape(site)) for q in declared.values() if q.trainable)
