"""Magnitude and direction trained apart, for any method that adds to the weight: ``diag(m) V / |V|`` by rows with ``V = W + D``.

Liu et al. 2024 (arXiv 2402.09353) do so for LoRA. ``|V|`` counts as a constant in the backward pass, as in the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .additive import Additive
from .method import Method, full, lengths
from .mixins import mixed_in
from .param import Param, zeros
from .site import Embedding, Site

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner


class Decomposed(Additive):
    """Mixed in front of an additive method by ``use_dora=True``."""

    @property
    def magnitude(self) -> str:
        return f"{self.prefix}magnitude_vector"

    def params(self, site: Site) -> dict[str, Param]:
        in_file = (1, -1, *(1 for _ in site.kernel)) if site.kernel else None
        return super().params(site) | {self.magnitude: Param(("out",), zeros, file_shape=in_file)}

    def start(self, p: Adapter) -> None:
        super().start(p)
        w, _ = p.site.read()
        getattr(p, self.magnitude).data.copy_(lengths(full(w) + full(self.delta(p))))

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v, b = super().fold(p, w, b)
        if p.strength not in (0, 1):
            v = w + (v - w) / p.strength
        adapted = (getattr(p, self.magnitude) / lengths(v).detach()).unsqueeze(-1) * v
        return (adapted if p.strength == 1 else torch.lerp(w, adapted, p.strength)), b

    def apart(self, site: Site) -> tuple[str, ...]:
        # The length of a row is one of all its columns.
        return ("out",)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if p.strength != 1 or isinstance(site, Embedding) or site.size("channel") != site.size("out"):
            return Method.around(self, p, inner, x)
        y = super().around(p, inner, x)
        w, bias = inner.params()
        with torch.no_grad():
            v, bias_v = super().fold(p, full(w), bias)
            norms = lengths(v)
        gain = site.rows(getattr(p, self.magnitude) / norms)
        if bias_v is None:
            return (y * gain).to(y.dtype)
        # The bias takes no part in the gain.
        extra = self.delta_bias(p)
        bias = bias_v if extra is None else (full(extra) + (0 if bias is None else bias))
        return (y * gain + site.rows(bias) * (1 - gain)).to(y.dtype)


def decomposed(method: type[Additive]) -> type[Additive]:
    """The class of a method's decomposed form."""
    return mixed_in(Decomposed, method)
