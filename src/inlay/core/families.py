"""Families of methods that need more than `Method` and the low-rank ones: what they have in common, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .method import Method, full, meet
from .site import Embedding, Linear, Site, TransposedLinear

if TYPE_CHECKING:
    from .inlaid import Adapter, Inner


class Rotation(Method):
    """A method that turns what goes into the weight: ``W R``. It gives `turn`.

    A linear layer is handed the turned input instead, ``(x R') W'``, and its weight stays as it is.
    """

    def turn(self, p: Adapter, rows: Tensor, *, inverse: bool = False, training: bool = False) -> Tensor:
        """``rows R``, or ``rows R'`` for the inverse.

        Args:
            rows: ``(*batch, n, in)``.
            training: draw what is left out in training.
        """
        raise NotImplementedError

    def refuses(self, site: Site) -> str | None:
        return "there is nothing to turn in one dimension" if site.size("in") < 2 else None

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.turn(p, w), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if acts_on_last_axis(inner.site):
            rows, _ = meet(x, next(p.parameters()))
            turned = self.turn(p, rows.reshape(-1, x.shape[-1]), inverse=True, training=p.training)
            return inner(turned.reshape(x.shape).to(x.dtype))
        w, b = inner.params()
        dtype = inner.site.dtype
        return inner.site.apply(x, self.turn(p, full(w), training=p.training).to(dtype), None if b is None else b.to(dtype))


def acts_on_last_axis(site: Site) -> bool:
    """Whether the host multiplies the last axis of its input by the matrix."""
    return isinstance(site, (Linear, TransposedLinear)) and not isinstance(site, Embedding)


def in_full_precision(p: Adapter) -> torch.autocast:
    """No autocast within: small matrices that are inverted, or that differ little from one another, need all their digits."""
    return torch.autocast(next(p.parameters()).device.type, enabled=False)
