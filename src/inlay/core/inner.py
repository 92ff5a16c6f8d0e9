"""What a method finds around it: the layer with the adapters that act before it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .adapter import Adapter
from .method import Method, biased, folded
from .site import Site


class Inner:
    """The layer so far: what it does to an input, and which weight and bias that amounts to.

    Attributes:
        dense: weight and bias of an ordinary linear layer, for which a kernel may stand.
        bias: gives the bias without the weight, which a quantised host would have to restore.
        stored: what gives the weight of a quantised linear layer, and its bias, where its forward is that of an ordinary one.
        args, kwargs: what the host was called with beside its input.
    """

    __slots__ = ("args", "bias", "call", "dense", "kwargs", "params", "site", "stored")

    def __init__(
        self,
        site: Site,
        call: Callable[[Tensor], Tensor],
        params: Callable[[], tuple[Tensor, Tensor | None]],
        dense: tuple[Tensor, Tensor | None] | None = None,
        bias: Callable[[], Tensor | None] | None = None,
        further: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
        stored: tuple[Callable[[], Tensor], Tensor | None] | None = None,
    ) -> None:
        self.site, self.call, self.params, self.dense, self.stored = site, call, params, dense, stored
        self.bias = (lambda: params()[1]) if bias is None else bias
        self.args, self.kwargs = further

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)

    def under(self, p: Adapter, x: Tensor) -> Tensor:
        """This layer with one more adapter on it, on ``x``."""
        inner = self if p.trained_bias is None else self._with_bias_of(p)
        method = p.method
        if p.strength == 1 or method.scales_itself or method.unmergeable:
            return method.around(p, inner, x)
        return Method.around(method, p, inner, x)

    def then(self, p: Adapter) -> Inner:
        """This layer with one more adapter on it."""

        def params() -> tuple[Tensor, Tensor | None]:
            w, b = self.params()
            return folded(p, w, biased(p, b))

        return Inner(self.site, lambda x: self.under(p, x), params, further=(self.args, self.kwargs))

    def _with_bias_of(self, p: Adapter) -> Inner:
        def call(x: Tensor) -> Tensor:
            y, old = self.call(x), self.bias()
            new = biased(p, old)
            assert new is not None
            return y + self.site.rows(new if old is None else new - old.to(new.dtype)).to(y.dtype)

        def params() -> tuple[Tensor, Tensor | None]:
            w, b = self.params()
            return w, biased(p, b)

        return Inner(self.site, call, params, bias=lambda: biased(p, self.bias()), further=(self.args, self.kwargs))
