"""GraLoRA: ``W + s D`` with an update of low rank in each of k x k blocks (Jung et al. 2025, arXiv 2505.20355).

Block (i, j) of D is ``B_ij A_ij`` of rank r / k. The A of one block column and the B of one block row are kept as one matrix each, so
there are as many numbers as in LoRA of rank r, and the whole has rank k r.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.additive import Additive, add, meet
from ..core.config import PeftType
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, padded, register
from ..core.param import Param, kaiming_uniform, zeros
from ..core.site import Site
from ..kernels.blocks import linear_plus_blocks, through_blocks, update_of_blocks

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class GraloraConfig(Additive):
    """Low rank in each block of the weight.

    Args:
        r: rank of a block times ``gralora_k``.
        hybrid_r: rank of an ordinary LoRA beside it; 0 for none.
        alpha: the update is scaled by ``alpha / (r + hybrid_r)``.
        gralora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        gralora_k: how many blocks in either direction.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start from the base; False starts from random factors, for tests.

    Raises:
        ValueError: a size is no positive integer, or ``gralora_k`` does not divide ``r``.
    """

    peft_type: str | None = PeftType.GRALORA
    r: int = field(default=32, metadata={"help": "Rank of a block times gralora_k."})
    hybrid_r: int = field(default=0, metadata={"help": "Rank of an ordinary LoRA beside it."})
    alpha: int = field(default=64, metadata={"help": "The update is scaled by alpha / (r + hybrid_r)."})
    gralora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    gralora_k: int = field(default=2, metadata={"help": "Number of blocks in either direction."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "gralora_"
    dropout_option: ClassVar[str] = "gralora_dropout"
    paper: ClassVar[str] = "2505.20355"
    count_formula: ClassVar[str] = "r·in + out·r"
    equation: ClassVar[str] = "W + s D, D of k x k blocks Bij Aij"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "alpha": 3},
        "hybrid": {"r": 2, "hybrid_r": 2, "alpha": 3, "bias": "gralora_only"},
        "dropout": {"r": 2, "gralora_dropout": 0.3},
    }
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("r", 1), ("hybrid_r", 0), ("gralora_k", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"`{name}` should be an integer of at least {least}, not {value!r}.")
        if self.r % self.gralora_k:
            raise ValueError(f"The rank is shared by the blocks: r={self.r} is not divisible by gralora_k={self.gralora_k}.")

    @property
    def scaling(self) -> float:
        return self.alpha / (self.r + self.hybrid_r)

    def refuses(self, site: Site) -> str | None:
        sizes = {"outputs": site.size("out"), "inputs": site.size("in")}
        rest = [f"{n} {name}" for name, n in sizes.items() if n % self.gralora_k]
        return f"its {' and '.join(rest)} cannot be cut into gralora_k={self.gralora_k} blocks" if rest else None

    def params(self, site: Site) -> dict[str, Param]:
        k, r = self.gralora_k, self.r
        start = zeros if self.init_weights else _by_inputs
        declared = {
            "gralora_A": Param((k, site.size("in") // k, r), _by_inputs),
            "gralora_B": Param((k, r, site.size("out") // k), start),
        }
        if self.hybrid_r:
            start = zeros if self.init_weights else kaiming_uniform
            declared["gralora_A_general"] = Param((self.hybrid_r, "in"), kaiming_uniform, "gralora_A_general.weight")
            declared["gralora_B_general"] = Param(("out", self.hybrid_r), start, "gralora_B_general.weight")
        return declared

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Each block's rank grows by itself."""
        k, scale = self.gralora_k, small.method.scaling / self.scaling  # type: ignore[attr-defined]
        if small.gralora_A.shape[-3] != k:
            raise ValueError(f"one of them cuts the weight into {small.gralora_A.shape[-3]} blocks, the other into {k}")
        values = super().padded(p, small)
        values["gralora_A"] = padded(small.gralora_A, p.gralora_A.shape, k)
        values["gralora_B"] = padded(small.gralora_B, p.gralora_B.shape, k, -2)
        return {name: value * scale if "_B" in name else value for name, value in values.items()}

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta(self, p: Adapter) -> Tensor:
        a, b = full(p.gralora_A), full(p.gralora_B)
        if p.all_rows:
            found = update_of_blocks(a, b)
        else:
            a, height, start = a.unflatten(-1, (self.gralora_k, -1)), b.shape[-1], p.first_row
            stop = start + p.site.size("out")
            rows = [
                update_of_blocks(a[..., i, :], b[i : i + 1, :, max(start - i * height, 0) : stop - i * height])
                for i in range(start // height, -(-stop // height))
            ]
            found = torch.cat(rows)
        if self.hybrid_r:
            found = found + full(p.gralora_B_general) @ full(p.gralora_A_general)
        return self.scaling * found

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not acts_on_last_axis(inner.site):
            return super().around(p, inner, x)
        rate, scale = self.dropout if p.training else 0.0, self.scaling * p.strength
        if inner.dense is not None and not rate and not self.hybrid_r:
            return linear_plus_blocks(x, *inner.dense, p.gralora_A, p.gralora_B, scale)
        y = inner(x)
        x, a, b = meet(F.dropout(x, rate), p.gralora_A, p.gralora_B)
        h = through_blocks(x, a, b)
        if self.hybrid_r:
            _, a, b = meet(x, p.gralora_A_general, p.gralora_B_general)
            h = h + F.linear(F.linear(x, a), b)
        return add(y, h, scale)


def _by_inputs(tensor: Tensor, generator: torch.Generator) -> None:
    """Uniform within ``1 / sqrt(fan_in)``, fan_in being the axis before the last."""
    bound = tensor.shape[-2] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)
