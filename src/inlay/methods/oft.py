"""OFT: ``W R'`` with ``R`` block-diagonal and orthogonal (Qiu et al. 2023, arXiv 2306.07280; Liu et al. 2023, arXiv 2311.06243).

Each block is the Cayley transform ``(I - Q) inv(I + Q)`` of a skew-symmetric ``Q``, or the cut-off series
``I + 2 Q + 2 Q^2 + ... + Q^m`` of ``(I + Q) inv(I - Q)``, which needs no inverse.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.config import PeftType
from ..core.families import Rotation, cayley, cayley_series, in_full_precision, nearest_divisor, skew
from ..core.method import Method, full, register
from ..core.param import Param, normal, zeros
from ..core.site import Embedding, Site
from ..kernels.turned import linear_turned

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@register
@dataclass
class OFTConfig(Rotation):
    """Orthogonal fine-tuning. What is turned is the input of a layer, or the output of an embedding.

    Args:
        r: the number of blocks; then ``oft_block_size`` is 0.
        oft_block_size: the size of a block; then ``r`` is 0. What does not divide the layer's width is moved to the nearest
            divisor, with a warning.
        module_dropout: the chance of a block to be left out in training.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start from the identity; False starts from random rotations, for tests.
        coft: keep each ``Q`` within a small ball.
        eps: the ball's radius, to be divided by the square root of the number of blocks.
        block_share: one block for all.
        use_cayley_neumann: the series instead of the inverse: faster, and orthogonal only up to the terms left out.
        num_cayley_neumann_terms: where to cut the series.

    Raises:
        ValueError: not exactly one of ``r`` and ``oft_block_size`` is given, or another option is out of its range.
    """

    peft_type: str | None = PeftType.OFT
    r: int = field(default=0, metadata={"help": "Number of blocks, or 0."})
    oft_block_size: int = field(default=32, metadata={"help": "Size of a block, or 0."})
    module_dropout: float = field(default=0.0, metadata={"help": "Chance of a block to be left out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the identity."})
    coft: bool = field(default=False, metadata={"help": "Keep the rotation within a small ball."})
    eps: float = field(default=6e-5, metadata={"help": "The ball's radius."})
    block_share: bool = field(default=False, metadata={"help": "One block for all."})
    use_cayley_neumann: bool = field(default=True, metadata={"help": "A series instead of an inverse."})
    num_cayley_neumann_terms: int = field(default=5, metadata={"help": "Where to cut the series."})

    prefix: ClassVar[str] = "oft_"
    paper: ClassVar[str] = "2306.07280"
    equation: ClassVar[str] = "W R', R block-diagonal and orthogonal"
    count_formula: ClassVar[str] = "in·(oft_block_size - 1) / 2"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"oft_block_size": 4},
        "exact": {"oft_block_size": 4, "use_cayley_neumann": False},
        "count": {"r": 2, "oft_block_size": 0, "num_cayley_neumann_terms": 3},
        "ball": {"oft_block_size": 4, "coft": True, "eps": 0.2},
        "shared": {"oft_block_size": 2, "block_share": True, "num_cayley_neumann_terms": 2},
        "dropout": {"oft_block_size": 4, "module_dropout": 0.4, "bias": "oft_only"},
    }
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}
    size_option: ClassVar[str] = "oft_block_size"

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.r, self.oft_block_size) != 0 or max(self.r, self.oft_block_size) <= 0:
            raise ValueError(f"Give one of `r` and `oft_block_size` and set the other to 0, not r={self.r}, {self.oft_block_size=}.")
        if self.use_cayley_neumann and self.num_cayley_neumann_terms < 2:
            raise ValueError("`num_cayley_neumann_terms` below 2 leaves nothing to train.")

    def _blocks(self, site: Site) -> tuple[int, int]:
        """How many blocks, of which size."""
        width = site.size("out" if isinstance(site, Embedding) else "in")
        asked = self.r or self.oft_block_size
        found = nearest_divisor(width, asked)
        if found != asked:
            name = "r" if self.r else "oft_block_size"
            warnings.warn(f"{name}={asked} does not divide the width {width}; {name}={found} is used there.")
        return (found, width // found) if self.r else (width // found, found)

    def refuses(self, site: Site) -> str | None:
        width = site.size("out" if isinstance(site, Embedding) else "in")
        asked = self.r or self.oft_block_size
        size = width // nearest_divisor(width, asked) if self.r else nearest_divisor(width, asked)
        return f"there is nothing to turn in blocks of one out of {width}" if size < 2 else None

    def params(self, site: Site) -> dict[str, Param]:
        count, size = self._blocks(site)
        shape = 1 if self.block_share else count, size * (size - 1) // 2
        name = "oft_embedding_R" if isinstance(site, Embedding) else "oft_R"
        in_file = prod(site.batch) * shape[0], shape[1]
        return {name: Param(shape, zeros if self.init_weights else normal(0.1), f"{name}.weight", file_shape=in_file)}

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Blocks that divide larger ones stand on their diagonals."""
        (name,) = p.declared
        vectors = getattr(small, name).detach()
        size, larger = _side(vectors), _side(getattr(p, name))
        if small.method.coft:  # type: ignore[attr-defined]
            # What is within the small balls is within the large one.
            vectors = small.method._within_ball(vectors, False)  # type: ignore[attr-defined]
        if larger % size:
            raise ValueError(f"blocks of {size} do not fill those of {larger}")
        count, several = getattr(p, name).shape[-2], larger // size
        blocks = skew(vectors, size).expand(*vectors.shape[:-2], count * several, size, size)
        whole = blocks.new_zeros(*vectors.shape[:-2], count, several, size, several, size)
        whole.diagonal(dim1=-4, dim2=-2).copy_(blocks.unflatten(-3, (count, several)).movedim(-3, -1))
        upper, lower = torch.triu_indices(larger, larger, 1)
        return {name: whole.flatten(-4, -3).flatten(-2)[..., upper, lower]}

    def rotations(self, p: Adapter, training: bool = False) -> Tensor:
        """The blocks of ``R``: ``(*batch, blocks, size, size)``."""
        vectors = p.oft_embedding_R if isinstance(p.site, Embedding) else p.oft_R
        with in_full_precision(p):
            vectors = self._within_ball(vectors, training) if self.coft else vectors
            q = skew(full(vectors), _side(vectors))
            blocks = cayley_series(q, self.num_cayley_neumann_terms) if self.use_cayley_neumann else cayley(q)
            if training and self.module_dropout:
                eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
                left_out = torch.rand(*blocks.shape[:-2], 1, 1, device=q.device) < self.module_dropout
                blocks = torch.where(left_out, eye, blocks)
            return blocks

    def _within_ball(self, vectors: Tensor, training: bool) -> Tensor:
        with torch.no_grad():
            # |Q| counts each number twice.
            length = vectors.norm(dim=-1, keepdim=True) * 2**0.5
            inside = vectors * (self.eps * vectors.shape[-2] ** -0.5 / length).clamp(max=1)
            if training:
                # Projected gradient descent: the next step starts from within the ball.
                vectors.copy_(inside)
        # The gradient is that at the projected point.
        return vectors + (inside - vectors).detach()

    def turn(self, p: Adapter, rows: Tensor, *, inverse: bool = False, training: bool = False) -> Tensor:
        blocks = self.rotations(p, training).to(rows.dtype)
        split = rows.unflatten(-1, (-1, blocks.shape[-1])).transpose(-3, -2)
        return (split @ (blocks if inverse else blocks.mT)).transpose(-3, -2).flatten(-2)

    def apart(self, site: Site) -> tuple[str, ...]:
        # Of an embedding it turns what is looked up.
        return ("in",) if isinstance(site, Embedding) else ("out",)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return (self.turn(p, w.mT, inverse=True).mT if isinstance(p.site, Embedding) else self.turn(p, w)), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is not None:
            blocks = self.rotations(p, p.training)
            blocks = blocks.expand(x.shape[-1] // blocks.shape[-1], -1, -1)
            return linear_turned(x, *inner.dense, blocks.unsqueeze(0), (None,))
        if not isinstance(inner.site, Embedding):
            return super().around(p, inner, x)
        y = inner(x)
        rows = y.reshape(-1, y.shape[-1]).to(full(y).dtype)
        return self.turn(p, rows, inverse=True, training=p.training).reshape(y.shape).to(y.dtype)


def _side(vectors: Tensor) -> int:
    """Of the skew-symmetric matrices whose numbers above the diagonal these are."""
    return round((1 + (1 + 8 * vectors.shape[-1]) ** 0.5) / 2)
