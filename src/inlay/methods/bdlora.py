"""BD-LoRA: LoRA with A or B block-diagonal, so that each shard of a served layer needs its own block alone; a variant of LoRA.

Reference: "Block-Diagonal LoRA for Eliminating Communication Overhead in Tensor Parallel LoRA Serving" (arXiv 2510.23346).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from ..core.method import Method, padded
from ..core.param import Param
from ..core.site import Site
from .dora import Dora
from .lora import LoraConfig

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@dataclass
class BdLoraConfig:
    """Which factor is block-diagonal where.

    Args:
        target_modules_bd_a, target_modules_bd_b: parts of the names of modules whose A (B) is block-diagonal.
        nblocks: the number of blocks; that of the shards.
        match_strict: refuse modules that are named in neither list; else they get plain LoRA.

    Raises:
        ValueError: a name is in both lists, or there is no positive number of blocks.
    """

    target_modules_bd_a: list[str] | None = field(default=None, metadata={"help": "Modules whose A is block-diagonal."})
    target_modules_bd_b: list[str] | None = field(default=None, metadata={"help": "Modules whose B is block-diagonal."})
    nblocks: int = field(default=1, metadata={"help": "Number of blocks."})
    match_strict: bool = field(default=True, metadata={"help": "Refuse modules that neither list names."})

    def __post_init__(self) -> None:
        both = sorted(set(self.target_modules_bd_a or ()) & set(self.target_modules_bd_b or ()))
        if both:
            raise ValueError(
                f"`target_modules_bd_a` and `target_modules_bd_b` both have {both[0]!r}; only one factor can be block-diagonal."
            )
        if self.nblocks < 1:
            raise ValueError(f"`nblocks` should be a positive integer, not {self.nblocks!r}.")

    def sides(self, name: str) -> str:
        """``"a"``, ``"b"``, both or neither, for a module of this name."""
        lists = (("a", self.target_modules_bd_a), ("b", self.target_modules_bd_b))
        return "".join(side for side, patterns in lists if any(part in name for part in patterns or ()))


class BdLora(LoraConfig):
    """LoRA with ``use_bdlora``. ``sides`` says which factor is block-diagonal at this module."""

    sides: str

    def seated(self, path: str) -> Method:
        self.sides = self.use_bdlora.sides(path.rpartition(".")[2])
        return self

    def refuses(self, site: Site) -> str | None:
        sides, blocks = getattr(self, "sides", ""), self.use_bdlora.nblocks
        if len(sides) > 1:
            return "`target_modules_bd_a` and `target_modules_bd_b` both name it, and only one factor can be block-diagonal"
        if not sides:
            strict = self.use_bdlora.match_strict
            return "neither list of `use_bdlora` names it; name it in one, or set `match_strict=False`" if strict else super().refuses(site)
        reason = super().refuses(site)
        if reason is not None:
            return reason
        axis = "in" if sides == "a" else "out"
        rank = super().params(site)[self.names(site)[0]].axes[0]
        for size, what in ((site.size(axis), f"{axis}put features"), (rank, "ranks")):
            if int(size) % blocks:
                return f"its {size} {what} cannot be split into {blocks} blocks"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        a, b = self.names(site)
        declared, blocks = super().params(site), self.use_bdlora.nblocks
        if self.sides == "a":
            declared[a] = self._in_a(site, site.size("in") // blocks)
        elif self.sides == "b":
            declared[b] = self._in_b(site, int(declared[b].axes[1]) // blocks)
        return declared

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """The ranks of each block grow by themselves."""
        values, (a, b), blocks = super().padded(p, small), self.names(p.site), self.use_bdlora.nblocks
        if self.sides:
            values[a] = padded(getattr(small, a), values[a].shape, blocks, -2)
        if self.sides == "a":
            values[b] = padded(getattr(small, b) * (small.method.scaling * small.strength / self.scaling), values[b].shape, blocks)  # type: ignore[attr-defined]
        return values

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = super().factors(p)
        return (self._whole(a), b) if self.sides == "a" else (a, self._whole(b)) if self.sides == "b" else (a, b)

    def _whole(self, rows: Tensor) -> Tensor:
        """Blocks one above the other ``(*batch, n, m)`` on the diagonal of ``(*batch, n, blocks * m)``."""
        blocks = self.use_bdlora.nblocks
        n, m = rows.shape[-2:]
        whole = rows.new_zeros(*rows.shape[:-2], blocks, n // blocks, blocks, m)
        whole.diagonal(dim1=-4, dim2=-2).copy_(rows.unflatten(-2, (blocks, -1)).movedim(-3, -1))
        return whole.flatten(-2).flatten(-3, -2)


class DoraBdLora(Dora, BdLora):
    """BD-LoRA with ``use_dora=True``: the rows' lengths apart, their directions by BD-LoRA."""
