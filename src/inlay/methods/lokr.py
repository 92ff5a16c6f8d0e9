"""LoKr: ``W + s kron(w1, w2)``, with ``w2 = a b`` of low rank where that is smaller (Yeh et al. 2023, arXiv 2309.14859).

Where ``out = l k`` and ``in = m q``, w1 is ``(l, m)`` and w2 ``(k, q)``. The Kronecker product is not formed on the way through a
linear layer: on an input seen as ``X (m, q)`` it is ``w1 X w2'``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from torch import Tensor
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, padded, register
from ..core.param import Init, Param, kaiming_uniform, zeros
from ..core.part import blocks_of
from ..core.site import Site
from ..kernels.kronecker import kronecker, linear_plus_kronecker, plus_kronecker, times_kronecker
from .lycoris import Frame, Lycoris, as_matrix, core_uniform, tensor_of, tucker

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


class Shapes(NamedTuple):
    """The shapes of w1 ``(l, m)`` and w2 ``(k, q)``, and which of them are products of low rank."""

    l: int  # noqa: E741  the letters of the formula
    m: int
    k: int
    q: int
    splits_w1: bool
    splits_w2: bool


@register
@dataclass
class LoKrConfig(Lycoris):
    """Kronecker products.

    Args:
        decompose_both: let w1 be a product of low rank, too, where that is smaller.
        decompose_factor: the size of w1's axes, where it divides the layer's; else the largest divisor up to it. -1 stands for
            the divisor nearest to the square root.
    """

    peft_type: str | None = PeftType.LOKR
    decompose_both: bool = field(default=False, metadata={"help": "Let w1 be a product of low rank, too."})
    decompose_factor: int = field(default=-1, metadata={"help": "The size of w1's axes; -1 for the square root's."})

    prefix: ClassVar[str] = "lokr_"
    paper: ClassVar[str] = "2309.14859"
    count_formula: ClassVar[str] = "about r·(sqrt(in) + sqrt(out))"
    equation: ClassVar[str] = "W + s kron(w1, w2)"
    ours: ClassVar[frozenset[str]] = Method.ours
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 1, "alpha": 3},
        "whole": {"r": 4, "use_scalar": True},
        "both": {"r": 1, "decompose_both": True, "decompose_factor": 4},
        "core": {"r": 1, "use_effective_conv2d": True, "init_weights": "lycoris"},
        "dora": {"r": 1, "use_dora": True},
        "dropout": {"r": 1, "rank_dropout": 0.3, "module_dropout": 0.2, "rank_dropout_scale": True},
        "input-dropout": {"r": 1, "input_dropout": 0.3, "use_effective_conv2d": True},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decompose_factor != -1 and self.decompose_factor <= 0:
            raise ValueError(f"`decompose_factor` is a positive size or -1, not {self.decompose_factor!r}.")

    def shapes(self, frame: Frame) -> Shapes:
        m, q = factorization(frame.columns, self.decompose_factor)
        l, k = factorization(frame.rows, self.decompose_factor)  # noqa: E741
        return Shapes(l, m, k, q, self.decompose_both and self.r < max(l, m) / 2, self.r < max(k, q) / 2)

    def params(self, site: Site) -> dict[str, Param]:
        frame, r = Frame.of(site), self.r
        shapes = self.shapes(frame)
        left, right = self._starts()

        def declare(*axes: int, init: Init = kaiming_uniform, core: bool = False) -> Param:
            return tensor_of(site, *axes, init=init, core=core)

        if shapes.splits_w1:
            declared = {"lokr_w1_a": declare(shapes.l, r, init=left), "lokr_w1_b": declare(r, shapes.m)}
        else:
            declared = {"lokr_w1": declare(shapes.l, shapes.m, init=left)}
        unrolled = frame.width // shapes.m
        if not shapes.splits_w2:
            whole = core_uniform if right is kaiming_uniform else right
            declared["lokr_w2"] = declare(shapes.k, shapes.q, *frame.kernel, init=whole)
        elif self.decomposes(frame):
            declared["lokr_t2"] = declare(r, r, *frame.kernel, init=core_uniform, core=True)
            declared |= {"lokr_w2_a": declare(r, shapes.k), "lokr_w2_b": declare(r, shapes.q, init=right)}
        else:
            declared |= {"lokr_w2_a": declare(shapes.k, r), "lokr_w2_b": declare(r, unrolled, init=right)}
        return declared | self.scalar()

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """From some rank on a factor is one matrix: then the product of the smaller adapter's two."""
        method, values, same = small.method, {}, []
        assert isinstance(method, LoKrConfig)
        for name, whole in (("lokr_w1", method.ungated), ("lokr_w2", method._w2)):
            if name in p.declared and name not in small.declared:
                made = whole(small).detach().unflatten(-1, (-1, *p.site.kernel)) if name == "lokr_w2" else whole(small).detach()
                values[name] = padded(made, getattr(p, name).shape)
            else:
                same += [n for n in p.declared if n == name or n.startswith((f"{name}_", f"{name.replace('w', 't')}"))]
        same += [n for n in p.declared if n not in values and n not in same]
        missing = [n for n in same if n not in small.declared]
        if missing:
            raise ValueError(f"one of them has {missing[0]}, the other not")
        return values | {n: padded(getattr(small, n), getattr(p, n).shape) for n in same}

    def _starts(self) -> tuple[Init, Init]:
        """What w1's and w2's last tensor start from: one of them from zero, if anything has to."""
        if not self.init_weights or self.use_scalar:
            return kaiming_uniform, kaiming_uniform
        return (kaiming_uniform, zeros) if self.init_weights == "lycoris" else (zeros, kaiming_uniform)

    def _w1(self, p: Adapter) -> Tensor:
        """``(*batch, l, m)``."""
        return self.gated(p, self.ungated(p))

    def ungated(self, p: Adapter) -> Tensor:
        """w1 without the trained factor."""
        return p.lokr_w1 if "lokr_w1" in p.declared else p.lokr_w1_a @ p.lokr_w1_b

    def _w2(self, p: Adapter) -> Tensor:
        """``(*batch, k, q * kernel)``."""
        if "lokr_w2" in p.declared:
            return p.lokr_w2.flatten(1) if p.site.kernel else p.lokr_w2
        if "lokr_t2" in p.declared:
            return tucker(p.lokr_t2, p.lokr_w2_a, p.lokr_w2_b).flatten(1)
        return p.lokr_w2_a @ p.lokr_w2_b

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta(self, p: Adapter) -> Tensor:
        return self._delta(p)

    def _delta(self, p: Adapter, kept: Tensor | None = None) -> Tensor:
        w1, w2 = full(self._w1(p)), full(self._w2(p))
        if p.all_rows:
            product = kronecker(w1, w2)
        else:
            # Only the rows of w1 that the rows are made of.
            blocks, rows = blocks_of(p, w2.shape[-2])
            product = kronecker(w1[blocks], w2)[rows]
        return self.scaling * as_matrix(p.site, product if kept is None else product * kept.unsqueeze(-1))

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        if p.site.kernel or not p.all_rows:
            return super().plus_delta(p, w)
        return plus_kronecker(w, full(self._w1(p)).to(w.dtype), full(self._w2(p)).to(w.dtype), self.scaling * p.strength)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        kept = self.kept(p)
        if not acts_on_last_axis(inner.site):
            return self.with_delta(p, inner, x, self._delta(p, kept))
        a, b = (p.lokr_w2, None) if "lokr_w2" in p.declared else (p.lokr_w2_a, p.lokr_w2_b)
        w1, scale, rate = self._w1(p), self.scaling * p.strength, self.dropout if p.training else 0.0
        if inner.dense is not None:
            return linear_plus_kronecker(x, *inner.dense, w1, a, b, kept, scale, rate)
        y = inner(x)
        x, w1, a = meet(F.dropout(x, rate) if rate else x, w1, a)
        h = times_kronecker(x, w1, a, None if b is None else b.to(a.dtype))
        return add(y, h if kept is None else h * kept, scale)


def factorization(dimension: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of a number, as LoKr splits an axis.

    Args:
        dimension: the number.
        factor: the first of the two, where it divides the number. Else the two are as near to each other as they can be, the smaller
            one first and at most ``factor``; no limit where -1.
    """
    if factor > 0 and dimension % factor == 0:
        return factor, dimension // factor
    limit = dimension if factor == -1 else factor
    small = max((d for d in range(1, isqrt(dimension) + 1) if dimension % d == 0 and d <= limit), default=1)
    return small, dimension // small
