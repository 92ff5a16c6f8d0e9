"""RoAd: ``R W`` and ``R b`` with ``R`` turning and scaling pairs of outputs (Liao and Monz 2024, arXiv 2409.00119).

Of a pair ``(u, v)`` of outputs it makes ``(c u - s v, c' v + s' u)`` with ``c = alpha cos(theta)`` and ``s = alpha sin(theta)``.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor

from ..core.config import PeftType, nearest
from ..core.families import in_full_precision, nearest_divisor
from ..core.method import Method, full, register
from ..core.param import Param, normal, ones, zeros
from ..core.site import AnyConv, Linear, Site, TransposedLinear
from ..kernels.pairs import formula, turn_pairs

if TYPE_CHECKING:
    import torch

    from ..core.adapter import Adapter
    from ..core.inner import Inner

# How many angles there are for each output.
VARIANTS = {"road_1": 0.5, "road_2": 1, "road_4": 2}


@register
@dataclass
class RoadConfig(Method):
    """Rotations of pairs of outputs.

    Args:
        variant: ``"road_1"`` (an angle and a scale for each pair), ``"road_2"`` (for each output), or ``"road_4"`` (for each
            entry of each pair's matrix).
        group_size: within groups of so many outputs the first of one half is paired with the first of the other, and so on.
            What does not divide a layer's outputs is moved to the nearest even divisor, with a warning.
        init_weights: start from the identity; False starts from random rotations, for tests.

    Raises:
        ValueError: the variant is unknown, or the group size no positive even number.
    """

    peft_type: str | None = PeftType.ROAD
    variant: str = field(default="road_1", metadata={"help": "road_1, road_2 or road_4."})  # type: ignore[assignment]
    group_size: int = field(default=64, metadata={"help": "Size of the groups within which outputs are paired."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the identity."})

    prefix: ClassVar[str] = "road_"
    paper: ClassVar[str] = "2409.00119"
    equation: ClassVar[str] = "R W and R b, R of scaled rotations of two outputs each"
    count_formula: ClassVar[str] = "out·(1, 2 or 4)"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"group_size": 2}, "2": {"variant": "road_2", "group_size": 2}, "4": {"variant": "road_4", "group_size": 4}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in VARIANTS:
            raise ValueError(f"Unknown variant={self.variant!r}.{nearest(str(self.variant), VARIANTS)} Known: {', '.join(VARIANTS)}.")
        if self.group_size <= 0 or self.group_size % 2:
            raise ValueError(f"`group_size` is to be cut in halves and should be a positive even number, not {self.group_size!r}.")

    def acting(self) -> Method:
        # HF's option has the name of the hook that finds the variant of other methods.
        return self

    def refuses(self, site: Site) -> str | None:
        width = site.size("channel")
        return f"its {width} outputs cannot be paired" if width % 2 else None

    def params(self, site: Site) -> dict[str, Param]:
        width = site.size("channel")
        if width % self.group_size:
            found = nearest_divisor(width, self.group_size, multiple=2)
            warnings.warn(f"group_size={self.group_size} does not divide the {width} outputs; group_size={found} is used there.")
        numbers = (int(VARIANTS[self.variant] * width),)
        theta, alpha = (zeros, ones) if self.init_weights else (normal(0.5), _near_one)
        return {"road_theta": Param(numbers, theta), "road_alpha": Param(numbers, alpha)}

    def group(self, site: Site) -> int:
        return nearest_divisor(site.size("channel"), self.group_size, multiple=2)

    def columns(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """What an output contributes to itself and to its partner: two vectors ``(*batch, channel)``."""
        with in_full_precision(p):
            theta, alpha = full(p.road_theta), full(p.road_alpha)
            half = self.group(p.site) // 2
            if self.variant == "road_1":
                theta, alpha = (t.unflatten(-1, (-1, 1, half)).expand(*t.shape[:-1], -1, 2, half).flatten(-3) for t in (theta, alpha))
            if self.variant == "road_4":
                (theta, other), (alpha, beta) = (
                    (u.flatten(-2), v.flatten(-2)) for u, v in (t.unflatten(-1, (-1, 2, 2 * half)).unbind(-2) for t in (theta, alpha))
                )
                return alpha * theta.cos(), beta * other.sin()
            return alpha * theta.cos(), alpha * theta.sin()

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        straight, across = self.columns(p)
        group = self.group(p.site)
        # The rows of one channel of a transposed convolution turn together.
        rows = w.reshape(*straight.shape, -1).mT
        turned = formula(rows, straight.unsqueeze(-2), across.unsqueeze(-2), group).mT.reshape(w.shape)
        return turned, None if b is None else formula(b.reshape(straight.shape), straight, across, group).reshape(b.shape)

    def apart(self, site: Site) -> tuple[str, ...]:
        # It turns columns.
        return ("in",)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if not isinstance(site, (Linear, TransposedLinear, AnyConv)):
            return super().around(p, inner, x)
        axis = -1 - len(site.kernel)
        straight, across = (t.flatten() for t in self.columns(p))
        y = inner(x)
        # Groups of a convolution lie one behind the other, and groups of outputs within them.
        return turn_pairs(y.movedim(axis, -1), straight, across, self.group(site)).movedim(-1, axis)


def _near_one(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(1, 0.5, generator=generator)
