"""What methods have in common whose low-rank update depends on the weight that it is added to."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..core.additive import add, meet
from ..core.method import Method, full
from ..kernels.lowrank import linear_plus_low_rank

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner
    from ..core.site import Site


class Conditioned(Method):
    """A method that makes ``W + B A`` of the weight, with `factors` that depend on it."""

    def factors(self, p: Adapter, w: Tensor) -> tuple[Tensor, Tensor]:
        """``A (*batch, r, in)`` and ``B (*batch, out, r)`` for the weight ``(*batch, out, in)``, in full precision."""
        raise NotImplementedError

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        right, left = self.factors(p, w)
        return w + left @ right, b

    def apart(self, site: Site) -> tuple[str, ...]:
        # The factors look at whole columns, at each by itself.
        return ("in",)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        w, _ = inner.params()
        return plus_low_rank(inner, x, *self.factors(p, full(w)))


def plus_low_rank(inner: Inner, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The layer on ``x`` with ``B A`` added to its weight."""
    if inner.dense is not None:
        return linear_plus_low_rank(x, *inner.dense, a, b, 1.0, 0.0)
    y = inner(x)
    x, a, b = meet(x, a, b)
    return add(y, inner.site.up(inner.site.down(x, a), b), 1.0)
