"""Methods that add to the weight, and among them those whose update has a low rank."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..kernels.lowrank import linear_plus_low_rank, restoring_pays
from .method import Method, full

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner
    from .site import Site


@dataclass
class Additive(Method):
    """A method that adds to the weight: it gives `delta`, and may give `delta_bias`.

    Args:
        use_dora: train the lengths of the adapted weight's rows apart from their directions (see `core.decomposed`).
        input_dropout: share of inputs that the added path leaves out in training, in [0, 1).
    """

    use_dora: bool = field(default=False, metadata={"help": "Train the rows' magnitudes apart.", "ours": True})
    input_dropout: float = field(
        default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True, "ours": True}
    )

    scales_itself: ClassVar[bool] = True
    # The option that is this share, where HF's class has one of its own.
    dropout_option: ClassVar[str] = "input_dropout"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.input_dropout and self.dropout_option != "input_dropout":
            raise ValueError(f"{type(self).__name__} has a dropout of its own; set that in place of `input_dropout`.")

    def variant(self) -> Method:
        from .decomposed import decomposed

        return self.become(decomposed(type(self))) if self.use_dora else self

    def delta(self, p: Adapter) -> Tensor:
        """What is added to the weight, ``(*batch, out, in)``, at strength 1."""
        raise NotImplementedError

    def delta_bias(self, p: Adapter) -> Tensor | None:
        """What is added to the bias, ``(out,)``."""
        return None

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out", "in")

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        """Along which axes `delta` follows from tensors that are cut as they are declared. Along others it is made whole, once."""
        return ("batch",) if site.batch else ()

    @property
    def dropout(self) -> float:
        """The share of inputs that the added path leaves out in training."""
        return getattr(self, self.dropout_option)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        extra = self.delta_bias(p)
        if extra is not None:
            extra = p.strength * full(extra)
            b = extra if b is None else b + extra
        return self.plus_delta(p, w), b

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        """The weight with `delta` at the adapter's strength, where there is a cheaper way than to add the two."""
        return torch.add(w, full(self.delta(p)), alpha=p.strength)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return self.with_delta(p, inner, x, self.delta(p))

    def with_delta(self, p: Adapter, inner: Inner, x: Tensor, delta: Tensor) -> Tensor:
        """The layer on ``x`` with this update: `delta`, or what training draws from it."""
        y = inner(x)
        extra = self.delta_bias(p)
        x, delta = meet(F.dropout(x, self.dropout, p.training) if x.is_floating_point() else x, delta)
        return add(y, inner.site.apply(x, delta, extra), p.strength)

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        """What training keeps of the change ``(*batch, out, in)`` of a weight that its host reads itself. The host's inputs are
        out of reach, so dropout takes whole input features, for all rows of the batch alike."""
        if not self.dropout:
            return change
        kept = torch.rand(change.shape[-1], device=change.device) >= self.dropout
        return change * kept / (1 - self.dropout)


class LowRank(Additive):
    """A method whose delta is ``scaling * B A``: it gives `factors`."""

    @property
    def scaling(self) -> float:
        return 1.0

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """``A (*batch, r, in)`` and ``B (*batch, out, r)``."""
        raise NotImplementedError

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        # Factors are small, and made whole.
        return ()

    def delta(self, p: Adapter) -> Tensor:
        a, b = self.factors(p)
        return self.scaling * (full(b) @ full(a))

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        if w.ndim > 2 or type(self).delta is not LowRank.delta:
            return super().plus_delta(p, w)
        a, b = (full(t).to(w.dtype) for t in self.factors(p))
        return torch.addmm(w, b, a, alpha=self.scaling * p.strength)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return self.with_factors(p, inner, x, *self.factors(p), self.trained(p) if torch.is_grad_enabled() else None)

    def trained(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        """A and B of a lower rank whose product differs from that of `factors` by a constant, where there are such: what is
        constant then costs nothing in the backward pass."""
        return None

    def with_factors(
        self, p: Adapter, inner: Inner, x: Tensor, a: Tensor, b: Tensor, trained: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The layer on ``x`` with this update: `factors`, or what training draws from them."""
        extra = self.delta_bias(p)
        scale = self.scaling * p.strength
        rate = self.dropout if p.training else 0.0
        dense = inner.dense
        if dense is not None and extra is None:
            return linear_plus_low_rank(x, *dense, a, b, scale, rate, trained)
        if inner.stored is not None and extra is None and restoring_pays(x, a, inner.site.dtype):
            return linear_plus_low_rank(x, *inner.stored, a, b, scale, rate, trained)
        y = inner(x)
        if rate and x.is_floating_point():
            x = F.dropout(x, rate)
        x, a, b = meet(x, a, b)
        if extra is not None:
            y = add(y, inner.site.rows(extra), p.strength)
        return add(y, inner.site.up(inner.site.down(x, a), b), scale)


def meet(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Input and parameters in one dtype: that of the parameters, or autocast's, which then does it without a copy of ours."""
    if not x.is_floating_point():
        return x, *params
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), *(q.to(dtype) for q in params)
    return x.to(params[0].dtype), *params


def add(y: Tensor, h: Tensor, scale: float) -> Tensor:
    """``y + scale * h`` in the dtype of ``y``, rounded once."""
    return torch.add(y, h, alpha=scale).to(y.dtype)
