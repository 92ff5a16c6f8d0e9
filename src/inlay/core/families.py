"""Families of methods that need more than `Method` and the low-rank ones: what they have in common, written once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .additive import meet
from .method import Method, full
from .site import Embedding, Linear, Site, TransposedLinear

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner


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

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

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


def skew(vectors: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices ``(*, size, size)`` of what is above their diagonals, row by row: ``(*, size (size - 1) / 2)``."""
    upper, lower = torch.triu_indices(size, size, 1, device=vectors.device)
    half = vectors.new_zeros(*vectors.shape[:-1], size, size)
    half[..., upper, lower] = vectors
    return half - half.mT


def cayley(q: Tensor) -> Tensor:
    """``(I - Q) inv(I + Q)``: a rotation for each skew-symmetric ``Q``."""
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    return torch.linalg.solve(eye + q, eye - q, left=False)


def cayley_series(q: Tensor, terms: int) -> Tensor:
    """The series ``I + 2 Q + 2 Q^2 + ... + Q^m`` of ``(I + Q) inv(I - Q)``, cut off; it needs no inverse.

    Args:
        terms: HF's count, which from four on is one more than the highest power; three terms are the same as four.
    """
    total = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms == 1:
        return total.expand_as(q)
    total = total + 2 * q
    if terms == 2:
        return total
    power = q
    for _ in range(2, max(terms - 1, 3)):
        power = power @ q
        total = total + 2 * power
    return total + power @ q


def nearest_divisor(width: int, asked: int, multiple: int = 1) -> int:
    """The divisor of ``width`` that is a multiple of ``multiple`` and nearest to what was asked for; of two as near, the smaller.
    0 where there is none."""
    for distance in range(max(width, asked)):
        for d in (asked - distance, asked + distance):
            if multiple <= d <= width and d % multiple == 0 and width % d == 0:
                return d
    return 0
