"""Weights that are split over devices (torch.distributed's ``DTensor``): adapters see them whole."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..core.parallel import placed_like, whole
from ..core.stores import Store, store


@store("torch.distributed.tensor.DTensor")
class Split(Store):
    def read_tensor(self, stored: Any) -> Tensor:
        return whole(stored)

    def bias(self, stored: Tensor) -> Tensor:
        return whole(stored)

    def like(self, old: Tensor, new: Tensor) -> Tensor:
        return placed_like(old, new)
