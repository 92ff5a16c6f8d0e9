"""What methods have in common whose update is dense and made of few numbers: frequencies, wavelets, circulants, single entries."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import Additive, add
from ..core.families import acts_on_last_axis
from ..core.method import full
from ..kernels.lowrank import takes_the_formula
from ..kernels.spread import linear_plus_spread, scattered

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@dataclass
class Spread(Additive):
    """An additive method that gives its trained `values`, how they `spread` over the weight, and the way back, `gather`."""

    def values(self, p: Adapter) -> tuple[Tensor, ...]:
        """The trained tensors."""
        raise NotImplementedError

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        """The delta ``(*batch, out, in)``."""
        raise NotImplementedError

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """The gradients of the values where the delta's is ``g' x``, without making that.

        Args:
            g: ``(rows, out)``. x: ``(rows, in)``.
        """
        raise NotImplementedError

    def delta(self, p: Adapter) -> Tensor:
        return self.spread(p, *self.values(p))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return self.with_spread(p, inner, x, partial(self.spread, p), partial(self.gather, p))

    def with_spread(
        self, p: Adapter, inner: Inner, x: Tensor, spread: Callable[..., Tensor], gather: Callable[..., tuple[Tensor, ...]]
    ) -> Tensor:
        """The layer on ``x`` with ``spread(*values)`` added to its weight."""
        values = self.values(p)
        if not self._takes_kernel(inner, x, values):
            return self.with_delta(p, inner, x, spread(*values))
        dtype = values[0].dtype
        rate = self.dropout if p.training else 0.0
        if inner.dense is not None and not rate and inner.dense[0].dtype == x.dtype == dtype:
            return linear_plus_spread(x, *inner.dense, p.strength, spread, gather, *values)
        y = inner(x)
        if rate:
            x = F.dropout(x, rate)
        return add(y, linear_plus_spread(x.to(dtype), None, None, 1.0, spread, gather, *values), p.strength)

    def _takes_kernel(self, inner: Inner, x: Tensor, values: tuple[Tensor, ...]) -> bool:
        """Whether the fused function stands for the formula: for linear layers, in the parameters' own precision."""
        if not acts_on_last_axis(inner.site) or torch.is_autocast_enabled(x.device.type):
            return False
        w, bias = inner.dense if inner.dense is not None else (values[0].detach(), None)
        return values[0].dtype in (torch.float32, torch.float64) and not takes_the_formula(x, w, bias)


def plus_entries(p: Adapter, w: Tensor, values: Tensor, places: Tensor) -> Tensor:
    """A weight with values at flat places added to it at the adapter's strength: a copy, and no matrix of zeros beside it."""
    values = p.strength * full(values).to(w.dtype)
    if not p.all_rows:
        return w + entries(p, values, places, w.shape[-1])
    return w.flatten(-2).scatter_add(-1, places.long().expand(values.shape), values).view(w.shape)


def entries(p: Adapter, values: Tensor, places: Tensor, width: int) -> Tensor:
    """The values at flat places among the rows of the weight, ``(*batch, out, width)``; of a part those in its rows."""
    shape = p.site.size("out"), width
    if p.all_rows:
        return scattered(values, places, shape)
    places = places.long() - p.first_row * width
    here = (places >= 0) & (places < shape[0] * width)
    return scattered(values[here], places[here], shape)
