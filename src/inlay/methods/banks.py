"""What methods have in common whose layers share a bank."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..core.site import Site


class Corners(nn.Module):
    """What layers use of a bank's tensors that are much larger.

    Attributes:
        shapes: of the whole tensors, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.shapes: dict[str, tuple[int, ...]] = {}


def widest(sites: Iterable[Site]) -> tuple[int, int]:
    """The most outputs and the most inputs of any layer."""
    sizes = [(site.size("out"), site.size("in")) for site in sites]
    return max(out for out, _ in sizes), max(inp for _, inp in sizes)


def uniform_of_fan(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Kaiming's uniform numbers for ReLU, within ``sqrt(6 / fan_in)``, fan_in being the last axis."""
    bound = (6 / shape[-1]) ** 0.5
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


def corner(bank: Tensor, site: Site, rows: int, columns: int, like: Tensor) -> Tensor:
    """What a layer uses of a bank's matrix, one copy for each matrix of a batch."""
    part = bank[:rows, :columns].to(like)
    return part.expand(*site.batch, *part.shape)
