"""Tied weights: the adapter of the input embedding, seen from the output head that shares its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor
from torch.nn import functional as F

from .additive import LowRank, add, meet
from .method import Method, folded
from .param import Param
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner


@dataclass
class Tied(Method):
    """What another adapter does to the transposed weight. It has no parameters and no strength of its own, so both ends stay one
    weight."""

    source: Adapter | None = None

    scales_itself: ClassVar[bool] = True

    @property
    def _of(self) -> Adapter:
        assert self.source is not None
        return self.source

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        new, _ = folded(self._of, w.mT, None)
        return new.mT, b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        method = self._of.method
        if type(method).around is LowRank.around and method.delta_bias(self._of) is None:  # type: ignore[attr-defined]
            a, b = method.factors(self._of)  # type: ignore[attr-defined]
            x, a, b = meet(x, a, b)
            return add(inner(x.to(inner.site.dtype)), F.linear(F.linear(x, b.mT), a.mT), method.scaling * self._of.strength)  # type: ignore[attr-defined]
        tied = getattr(method, "around_transposed", None)
        if tied is None or (self._of.strength != 1 and not method.scales_itself):
            return super().around(p, inner, x)
        return tied(self._of, inner, x)
