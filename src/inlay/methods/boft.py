"""BOFT: ``diag(s) W M'`` with ``M`` a butterfly of block-diagonal rotations (Liu et al. 2023, arXiv 2311.06243).

``M`` is a product of factors ``P B P'``: ``B`` has rotations on its diagonal, each the Cayley transform ``(I - Q) inv(I + Q)``, and
``P`` permutes halves of blocks, so that each factor mixes what lies twice as far apart as the one before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import meet
from ..core.config import PeftType
from ..core.families import Rotation, acts_on_last_axis, cayley, in_full_precision
from ..core.method import Method, full, register
from ..core.param import Param, normal, ones, zeros
from ..core.site import Site
from ..kernels.turned import Order, linear_turned, multiplied, turn

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class BOFTConfig(Rotation):
    """Butterflies of rotations, and a scale for each output.

    Args:
        boft_block_size: size of the rotations; then ``boft_block_num`` is 0.
        boft_block_num: how many there are in a factor; then ``boft_block_size`` is 0.
        boft_n_butterfly_factor: how many factors. One is OFT. Each more needs twice as many blocks, and even ones.
        boft_dropout: the chance of a rotation to be left out in training.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start from the identity; False starts from random rotations, for tests.

    Raises:
        ValueError: not exactly one of ``boft_block_size`` and ``boft_block_num`` is given, or another option is out of its range.
    """

    peft_type: str | None = PeftType.BOFT
    boft_block_size: int = field(default=4, metadata={"help": "Size of the rotations, or 0."})
    boft_block_num: int = field(default=0, metadata={"help": "Number of rotations in a factor, or 0."})
    boft_n_butterfly_factor: int = field(default=1, metadata={"help": "Number of factors.", "positive": True})
    boft_dropout: float = field(default=0.0, metadata={"help": "Chance of a rotation to be left out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the identity."})

    prefix: ClassVar[str] = "boft_"
    paper: ClassVar[str] = "2311.06243"
    count_formula: ClassVar[str] = "boft_n_butterfly_factor·in·boft_block_size + out"
    equation: ClassVar[str] = "diag(s) W (P1 B1 P1' ... Pm Bm Pm')', B block-diagonal and orthogonal"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"boft_block_size": 2},
        "butterfly": {"boft_block_size": 2, "boft_n_butterfly_factor": 2},
        "count": {"boft_block_size": 0, "boft_block_num": 2, "bias": "boft_only"},
        "dropout": {"boft_block_size": 2, "boft_dropout": 0.4},
    }
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        size, number = self.boft_block_size, self.boft_block_num
        if min(size, number) != 0 or max(size, number) <= 0:
            raise ValueError(
                f"Give one of `boft_block_size` and `boft_block_num` and set the other to 0, not boft_block_size={size}, "
                f"boft_block_num={number}."
            )

    def _blocks(self, site: Site) -> tuple[int, int]:
        """How many rotations in a factor, of which size."""
        width = site.size("in")
        return (width // self.boft_block_size, self.boft_block_size) if self.boft_block_size else (
            self.boft_block_num, width // self.boft_block_num
        )  # fmt: skip

    def refuses(self, site: Site) -> str | None:
        width, (number, size) = site.size("in"), self._blocks(site)
        name, value = ("boft_block_size", self.boft_block_size) if self.boft_block_size else ("boft_block_num", self.boft_block_num)
        if number * size != width:
            return f"{name}={value} does not divide its {width} inputs"
        if size < 2:
            return f"there is nothing to turn in blocks of one out of {width}"
        further = 2 ** (self.boft_n_butterfly_factor - 1)
        if further > 1 and (number % further or size % 2):
            return (
                f"boft_n_butterfly_factor={self.boft_n_butterfly_factor} needs blocks of an even size in a multiple of {further}, "
                f"and its {width} inputs have {number} of size {size}"
            )
        return None

    def params(self, site: Site) -> dict[str, Param]:
        number, size = self._blocks(site)
        # HF writes the scales of a convolution as a row and all others as a column.
        count = site.batch.numel() * site.size("channel")
        in_file = (1, count) if site.kernel else (count, 1)
        rotations, scales = (zeros, ones) if self.init_weights else (normal(0.1), _near_one)
        return {
            "boft_R": Param((self.boft_n_butterfly_factor, number, size, size), rotations),
            "boft_s": Param(("channel",), scales, file_shape=in_file),
        }

    def rotations(self, p: Adapter, training: bool = False) -> Tensor:
        """The blocks of all factors, ``(*batch, factors, blocks, size, size)``, those that act first on the input in front."""
        with in_full_precision(p):
            q = full(p.boft_R)
            blocks = cayley((q - q.mT) / 2)
            if training and self.boft_dropout:
                eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
                left_out = torch.rand(*q.shape[:-2], 1, 1, device=q.device) < self.boft_dropout
                blocks = torch.where(left_out, eye, blocks)
            return blocks.flip(-4) if self.boft_n_butterfly_factor > 1 else blocks

    def orders(self, p: Adapter) -> tuple[Order, ...]:
        """The permutations of all factors; the last factor, whose blocks are next to one another, has none."""
        half = p.boft_R.shape[-1] // 2
        return *((2**i, half) for i in range(self.boft_n_butterfly_factor - 1, 0, -1)), None

    def turn(self, p: Adapter, rows: Tensor, *, inverse: bool = False, training: bool = False) -> Tensor:
        blocks, orders = multiplied(self.rotations(p, training).to(rows.dtype), self.orders(p))
        if inverse:
            # Rows that are turned are one matrix, as the layer's input is.
            return turn(rows, blocks, orders)
        return turn(rows, blocks.flip(-4).mT, orders[::-1])

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._scaled(p, self.turn(p, w)), b

    def _scaled(self, p: Adapter, w: Tensor) -> Tensor:
        return w * p.site.spread(full(p.boft_s)).unsqueeze(-1)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if not acts_on_last_axis(site):
            w, b = inner.params()
            turned = self._scaled(p, self.turn(p, full(w), training=p.training))
            return site.apply(x, turned.to(site.dtype), None if b is None else b.to(site.dtype))
        if inner.dense is not None:
            return linear_turned(x, *inner.dense, self.rotations(p, p.training), self.orders(p), p.boft_s)
        bias = inner.bias()
        rows, _ = meet(x, p.boft_R)
        turned = self.turn(p, rows.reshape(-1, x.shape[-1]), inverse=True, training=p.training)
        y = inner(turned.reshape(x.shape).to(x.dtype))
        z = y if bias is None else y - bias
        # The bias is not scaled.
        scaled = z * p.boft_s if bias is None else torch.addcmul(bias.to(p.boft_s.dtype), z, p.boft_s)
        return scaled.to(y.dtype)


def _near_one(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.normal_(1, 0.1, generator=generator)
