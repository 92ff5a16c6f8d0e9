"""Full: ``W + D`` and ``b + d``, all of a layer trained beside it (the "diff" of LyCORIS)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.additive import Additive
from ..core.method import register
from ..core.param import Param
from ..core.site import Site
from ..kernels.sums import linear_plus_matrix

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class FullConfig(Additive):
    """A trained matrix of the weight's own size. It can be switched, merged and saved like any other adapter.

    Args:
        train_bias: train a difference of the bias as well, where the layer has one.
    """

    peft_type: str | None = "FULL"
    train_bias: bool = field(default=True, metadata={"help": "Train a difference of the bias as well."})

    prefix: ClassVar[str] = "diff"
    paper: ClassVar[str] = "2309.14859"
    equation: ClassVar[str] = "W + D"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {},
        "weight-only": {"train_bias": False},
        "dora": {"use_dora": True},
        "dropout": {"input_dropout": 0.3},
    }

    def params(self, site: Site) -> dict[str, Param]:
        declared = {"diff": Param(("out", "in"))}
        if self.train_bias and site.bias() is not None:
            declared["diff_b"] = Param(("channel",))
        return declared

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta(self, p: Adapter) -> Tensor:
        return p.diff

    def delta_bias(self, p: Adapter) -> Tensor | None:
        if "diff_b" not in p.declared:
            return None
        return p.diff_b.flatten() if p.site.kernel else p.diff_b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None or (self.dropout and p.training):
            return super().around(p, inner, x)
        return linear_plus_matrix(x, *inner.dense, p.diff, self.delta_bias(p), p.strength)
