"""Tied weights: the adapter of the input embedding, seen from the output head that shares its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from .method import LowRank, Method, Param, add, meet
from .site import Site

if TYPE_CHECKING:
    from .inlaid import Adapter, Inner


@dataclass
class Tied(Method):
    """What another adapter does to the transposed weight. It has no parameters of its own, so both ends stay one weight."""

    source: Adapter | None = None

    @property
    def _of(self) -> Adapter:
        assert self.source is not None
        return self.source

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        folded, _ = self._of.method.fold(self._of, w.mT, None)
        return folded.mT, b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        method = self._of.method
        if type(method).around is LowRank.around and method.delta_bias(self._of) is None:  # type: ignore[attr-defined]
            a, b = method.factors(self._of)  # type: ignore[attr-defined]
            x, a, b = meet(x, a, b)
            return add(inner(x.to(inner.site.dtype)), F.linear(F.linear(x, b.mT), a.mT), method.scaling * self._of.strength)  # type: ignore[attr-defined]
        tied = getattr(method, "around_transposed", None)
        return super().around(p, inner, x) if tied is None else tied(self._of, inner, x)
