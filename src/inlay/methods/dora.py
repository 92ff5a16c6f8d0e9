"""DoRA: ``W' = m * V / |V|`` by rows with ``V = W + s B A`` (Liu et al. 2024, arXiv 2402.09353), a variant of LoRA.

The paper treats ``|V|`` as a constant in the backward pass. ``V`` is never formed on the way through a layer: its norms follow
from ``|V|^2 = |W|^2 + s <2 W A' + s B (A A'), B>`` by rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.method import Method, full, lengths
from ..core.param import Param, zeros
from ..core.site import Embedding, Site
from ..kernels.decomposed import linear_decomposed, row_squares
from .lora import LoraConfig

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


class Dora(LoraConfig):
    """LoRA with ``use_dora=True``."""

    def params(self, site: Site) -> dict[str, Param]:
        in_file = (1, -1, *(1 for _ in site.kernel)) if site.kernel else None
        return super().params(site) | {"lora_magnitude_vector": Param(("out",), zeros, file_shape=in_file)}

    def start(self, p: Adapter) -> None:
        w, _ = p.site.read()
        p.lora_magnitude_vector.data.copy_(row_norms(w, *self.factors(p), self.scaling))

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v = w + self.delta(p)
        adapted = (p.lora_magnitude_vector / lengths(v).detach()).unsqueeze(-1) * v
        return adapted if p.strength == 1 else torch.lerp(w, adapted, p.strength), b

    def apart(self, site: Site) -> tuple[str, ...]:
        # The length of a row is one of all its columns.
        return ("out",)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if isinstance(site, Embedding) or site.size("channel") != site.size("out"):
            return Method.around(self, p, inner, x)
        a, b = self.factors(p)
        w, bias = inner.params()
        scale = self.scaling
        gain = p.lora_magnitude_vector / kept_norms(p, w, a, b, scale)
        drops = self.dropout and p.training
        if inner.dense is not None and p.strength == 1:
            return linear_decomposed(x, *inner.dense, a, b, gain, scale, self.dropout if drops else 0.0)
        y = inner(x)
        plain = y if bias is None else y - site.rows(bias).to(y.dtype)
        if drops:
            # As in HF: what is left out of the input is missing from all of the rescaled part.
            x = F.dropout(x, self.dropout)
            plain = site.apply(x, w.to(x.dtype))
        x, a, b = meet(x, a, b)
        gain = site.rows(gain)
        return add(y, (gain - 1) * plain + gain * scale * site.up(site.down(x, a), b), p.strength)


def row_norms(w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``|W + scale B A|`` by rows, ``(*batch, out)``, without forming the sum; no gradient flows through it."""
    with torch.no_grad():
        square = row_squares(w)
        w, a, b = full(w), full(a), full(b)
        across = (w @ a.mT).mul_(2).add_(b @ (a @ a.mT), alpha=scale)
        return torch.add(square, across.mul_(b).sum(-1), alpha=scale).clamp_min_(0).sqrt_()


# ---- caching --------------------------------------------------------------------------------------------------------------
class Cache:
    """The norms of adapters that are not being trained, while someone asks for them to be kept (`inlay.helpers.DoraCaching`)."""

    def __init__(self) -> None:
        self.on = False
        self.norms: WeakKeyDictionary[Adapter, tuple[tuple[Any, ...], Tensor]] = WeakKeyDictionary()


cache = Cache()


def kept_norms(p: Adapter, w: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`row_norms`, from the cache where that is on, the adapter is in evaluation and no tensor was written to."""
    own = w if w._base is None else w._base
    known = cache.on and not p.training and not torch.compiler.is_compiling() and isinstance(own, nn.Parameter)
    if not known or any(t.is_inference() for t in (own, a, b)):
        cache.norms.pop(p, None)
        return row_norms(w, a, b, scale)
    state = (scale, *(v for t in (own, a, b) for v in (t._version, t.data_ptr())))
    found = cache.norms.get(p)
    if found is None or found[0] != state:
        found = cache.norms[p] = state, row_norms(w, a, b, scale)
    return found[1]
