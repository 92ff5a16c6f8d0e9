"""MiSS: ``W + [E E ... E]`` with one block ``E (out, r)`` side by side for all inputs (Kang and Yin 2024, arXiv 2409.15371).

Of rank r, but one matrix: the inputs are summed in shards of r, and the sums go through ``E``. Its earlier name is Bone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from ..core.additive import Additive, add, meet
from ..core.config import PeftType
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, zeros
from ..core.part import blocks_of
from ..core.site import Site
from ..kernels.passing import linear_plus_shards, linear_through, side_by_side, sums_of_shards

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

INITS = ("bat", "mini")


@register
@dataclass
class MissConfig(Additive):
    """One block of the update for all shards of the inputs.

    Args:
        r: the length of a shard, which is the rank of the update.
        miss_dropout: share of inputs that the update leaves out in training, in [0, 1).
        mini_r: with ``init_weights="mini"`` how many outputs have a block of their own; the others repeat it.
        init_weights: True, ``"bat"`` (an update that depends on the weight, see `Bat`), ``"mini"`` (a smaller block, repeated
            along the outputs as well), or False (a random start, for tests).

    Raises:
        ValueError: a size is no positive integer, an option is unknown, or options contradict each other.
    """

    peft_type: str | None = PeftType.MISS
    r: int = field(default=64, metadata={"help": "Length of a shard of the inputs.", "positive": True})
    miss_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    mini_r: int = field(default=1, metadata={"help": "With init_weights=mini: outputs with a block of their own.", "positive": True})
    init_weights: bool | str = field(default=True, metadata={"help": "true, bat, mini or false."})

    prefix: ClassVar[str] = "miss_"
    dropout_option: ClassVar[str] = "miss_dropout"
    paper: ClassVar[str] = "2409.15371"
    equation: ClassVar[str] = "W + [E E ... E]"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 2},
        "rest": {"r": 3, "bias": "miss_only"},
        "bat": {"r": 2, "init_weights": "bat"},
        "mini": {"r": 2, "mini_r": 2, "init_weights": "mini"},
        "dropout": {"r": 2, "miss_dropout": 0.3},
    }
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}

    def __post_init__(self) -> None:
        if self.bias == "MiSS_only":
            # So HF's help calls what its code calls as all others.
            self.bias = "miss_only"
        super().__post_init__()
        if not isinstance(self.init_weights, bool) and self.init_weights not in INITS:
            raise ValueError(f"Unknown init_weights={self.init_weights!r}. Known: True, False, {', '.join(INITS)}.")
        if self.init_weights == "bat" and (self.use_dora or self.miss_dropout):
            name = "use_dora" if self.use_dora else "miss_dropout"
            raise ValueError(f"init_weights='bat' multiplies the weight, so that there is no added path for `{name}`; leave it unset.")

    def variant(self) -> Method:
        return self.become(Bat) if self.init_weights == "bat" else super().variant()

    def refuses(self, site: Site) -> str | None:
        if self.r > site.size("in"):
            return f"its {site.size('in')} inputs do not fill one shard of r={self.r}"
        if self.init_weights == "mini" and site.size("out") % self.mini_r:
            return f"mini_r={self.mini_r} does not divide its {site.size('out')} outputs"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        rows = self.mini_r if self.init_weights == "mini" else "out"
        return {f"{self.prefix}block": Param((self.r, rows), zeros if self.init_weights else kaiming_uniform)}

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """A longer shard repeats a shorter one."""
        name = f"{self.prefix}block"
        block, shape = getattr(small, name), getattr(p, name).shape
        if shape[-2] % block.shape[-2] or shape[-1] % block.shape[-1]:
            raise ValueError(
                f"blocks of {tuple(block.shape[-2:])} side by side make one of {tuple(shape[-2:])} only where they fill it: r and mini_r "
                "have to be multiples"
            )
        return {name: block.detach().repeat(*(1 for _ in block.shape[:-2]), shape[-2] // block.shape[-2], shape[-1] // block.shape[-1])}

    def block(self, p: Adapter) -> Tensor:
        """``E (*batch, out, r)``."""
        block = getattr(p, f"{self.prefix}block").mT
        if self.init_weights != "mini":
            return block
        # The rows of a small block are repeated.
        blocks, rows = blocks_of(p, self.mini_r)
        return block.repeat(*(1 for _ in p.site.batch), blocks.stop - blocks.start, 1)[..., rows, :]

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta(self, p: Adapter) -> Tensor:
        return side_by_side(self.block(p), p.site.size("in"))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not acts_on_last_axis(inner.site):
            return super().around(p, inner, x)
        rate = self.dropout if p.training else 0.0
        if inner.dense is not None and not rate:
            return linear_plus_shards(x, *inner.dense, self.block(p), p.strength)
        y = inner(x)
        x, block = meet(F.dropout(x, rate), self.block(p))
        return add(y, F.linear(sums_of_shards(x, self.r), block), p.strength)


class Bat(MissConfig):
    """Each block of the weight is multiplied as well: ``W_ij + W_ij E_i + E_i`` with blocks of r x r and an ``E_i`` a row of them."""

    def refuses(self, site: Site) -> str | None:
        rest = [f"{n} {name}" for n, name in ((site.size("out"), "outputs"), (site.size("in"), "inputs")) if n % self.r]
        return f"its {' and '.join(rest)} cannot be cut into blocks of r={self.r}" if rest else None

    def params(self, site: Site) -> dict[str, Param]:
        return {f"{self.prefix}block": Param((site.size("out") // self.r, self.r, self.r))}

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        if small.method.r != self.r:  # type: ignore[attr-defined]
            raise ValueError(
                f"init_weights='bat' multiplies each block of {self.r} rows by a matrix of their own, and smaller blocks in it have several"
            )
        return Method.padded(self, p, small)

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        blocks, rows = blocks_of(p, self.r)
        # What lacks in the first and the last block is filled up.
        w = F.pad(w, (0, 0, rows.start, -rows.stop % self.r)) if not p.all_rows else w
        return self._multiplied(w, getattr(p, f"{self.prefix}block")[..., blocks, :, :], p.strength)[..., rows, :], b

    def _multiplied(self, w: Tensor, blocks: Tensor, strength: float = 1.0) -> Tensor:
        # (*batch, out / r, in / r, r, r)
        tiles = w.unflatten(-2, (-1, self.r)).unflatten(-1, (-1, self.r)).transpose(-3, -2)
        blocks = full(blocks).to(w.dtype).unsqueeze(-3)
        change = tiles @ blocks + blocks
        return w + strength * change.transpose(-3, -2).flatten(-2).flatten(-3, -2)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None:
            return Method.around(self, p, inner, x)
        block = getattr(p, f"{self.prefix}block")
        return linear_through(x, *inner.dense, lambda w, b, blocks: (self._multiplied(w, blocks, p.strength), b), block)
