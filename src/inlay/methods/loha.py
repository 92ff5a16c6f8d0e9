"""LoHa: ``W + s (A1 B1) * (A2 B2)`` by elements, of rank up to ``r^2`` (Hyeon-Woo et al. 2021, arXiv 2108.06098).

The product by elements is itself a product of low rank: row ``o`` of its left factor holds all ``r^2`` products of row ``o`` of A1
with row ``o`` of A2, and likewise for the right one (Khatri-Rao).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Init, Param, kaiming_uniform, normal, zeros
from ..core.site import Conv, Site
from ..kernels.hadamard import hadamard, khatri_rao, linear_plus_hadamard
from .lycoris import Frame, Lycoris, as_matrix, core_uniform, tensor_of, tucker

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class LoHaConfig(Lycoris, LowRank):
    """Products by elements of two low-rank matrices.

    Args:
        rank_dropout_scale: as in `Lycoris`; HF's LoHa always does so and has no option for it.
    """

    peft_type: str | None = PeftType.LOHA
    rank_dropout_scale: bool = field(
        default=True, metadata={"help": "Scale the rows that are kept, to make up for the others.", "ours": True}
    )

    prefix: ClassVar[str] = "hada_"
    paper: ClassVar[str] = "2108.06098"
    count_formula: ClassVar[str] = "2·r·in + 2·out·r"
    equation: ClassVar[str] = "W + s (A1 B1) * (A2 B2)"
    ours: ClassVar[frozenset[str]] = Method.ours
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 2, "alpha": 3},
        "wide": {"r": 4, "use_scalar": True},
        "core": {"r": 2, "use_effective_conv2d": True, "init_weights": "lycoris"},
        "dora": {"r": 2, "use_dora": True},
        "dropout": {"r": 2, "rank_dropout": 0.3, "module_dropout": 0.2, "input_dropout": 0.1, "use_effective_conv2d": True},
    }

    def params(self, site: Site) -> dict[str, Param]:
        frame, r, start = Frame.of(site), self.r, self._starts()
        with_core = self.decomposes(frame)
        declared = {}
        for k in ("1", "2"):
            if with_core:
                declared[f"hada_t{k}"] = tensor_of(site, r, r, *frame.kernel, init=start["t"], core=True)
            # A convolution's tensor has the matrix's rows in front, but where it is transposed or in groups.
            rows = "out" if not frame.kernel or (isinstance(site, Conv) and not site.batch) else frame.rows
            declared[f"hada_w{k}_a"] = tensor_of(site, *((r, rows) if with_core else (rows, r)), init=start[f"w{k}_a"])
            declared[f"hada_w{k}_b"] = tensor_of(site, r, frame.columns if with_core else frame.width, init=start[f"w{k}_b"])
        return declared | self.scalar()

    def _starts(self) -> dict[str, Init]:
        identity = bool(self.init_weights) and not self.use_scalar
        if self.init_weights == "lycoris":
            return {"t": normal(0.1), "w1_a": normal(0.1), "w1_b": normal(), "w2_a": zeros if identity else normal(0.1), "w2_b": normal()}
        last = zeros if identity else kaiming_uniform
        return {"t": core_uniform, "w1_a": kaiming_uniform, "w1_b": kaiming_uniform, "w2_a": kaiming_uniform, "w2_b": last}

    def _first(self, p: Adapter, kept: Tensor | None = None) -> Tensor:
        """A1 with all that multiplies rows of the update."""
        a = self.gated(p, p.hada_w1_a)
        if kept is None:
            return a
        return a * (kept if self.decomposes(Frame.of(p.site)) else kept.unsqueeze(-1))

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta(self, p: Adapter) -> Tensor:
        return self._delta(p, self._first(p))

    def _delta(self, p: Adapter, a1: Tensor) -> Tensor:
        a1, b1, a2, b2 = map(full, (a1, p.hada_w1_b, p.hada_w2_a, p.hada_w2_b))
        if self.decomposes(Frame.of(p.site)):
            product = tucker(full(p.hada_t1), a1, b1) * tucker(full(p.hada_t2), a2, b2)
        else:
            product = hadamard(a1, b1, a2, b2)
        return self.scaling * as_matrix(p.site, product)

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        if p.site.kernel:
            return super().plus_delta(p, w)
        a1, b1, a2, b2 = (full(t).to(w.dtype) for t in (self._first(p), p.hada_w1_b, p.hada_w2_a, p.hada_w2_b))
        return torch.addcmul(w, a1 @ b1, a2 @ b2, value=self.scaling * p.strength)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return khatri_rao(self._first(p), p.hada_w1_b, p.hada_w2_a, p.hada_w2_b)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        a1 = self._first(p, self.kept(p))
        others = p.hada_w1_b, p.hada_w2_a, p.hada_w2_b
        if inner.dense is not None:
            rate = self.dropout if p.training else 0.0
            return linear_plus_hadamard(x, *inner.dense, a1, *others, self.scaling * p.strength, rate)
        rows, columns = a1.shape[-2], p.hada_w1_b.shape[-1]
        if not p.site.kernel and self.r**2 * (rows + columns) < rows * columns:
            return self.with_factors(p, inner, x, *khatri_rao(a1, *others))
        return self.with_delta(p, inner, x, self._delta(p, a1))
