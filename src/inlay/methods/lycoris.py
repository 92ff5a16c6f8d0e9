"""What the methods of LyCORIS have in common (Yeh et al. 2023, arXiv 2309.14859): options, how they see a weight, dropout."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.additive import Additive, LowRank
from ..core.config import nearest
from ..core.method import full
from ..core.param import Init, Param, ones, zeros
from ..core.site import Site
from ..initializers.started import Started

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


class Frame(NamedTuple):
    """A weight as a tensor of rows, columns and kernel. Rows and columns of a convolution are those of its tensor, over all
    groups, as in HF's files; elsewhere they are those of the matrix."""

    rows: int
    columns: int
    kernel: tuple[int, ...]

    @classmethod
    def of(cls, site: Site) -> Frame:
        if site.kernel:
            rows, columns, *kernel = site.raw_shape
            return cls(rows, columns, tuple(kernel))
        return cls(site.size("out"), site.size("in"), ())

    @property
    def width(self) -> int:
        """Columns times kernel: what a row holds."""
        return self.columns * prod(self.kernel)

    @property
    def decomposes(self) -> bool:
        """Whether there is a kernel for a core tensor."""
        return prod(self.kernel) > 1


def as_matrix(site: Site, framed: Tensor) -> Tensor:
    """A tensor of rows, columns and kernel as the site's matrix ``(*batch, out, in)``."""
    return site.matrix(framed.reshape(-1, *site.raw_shape[1:])) if site.kernel else framed


def tensor_of(site: Site, *axes: str | int, init: Init, core: bool = False) -> Param:
    """A parameter for a `Frame`. HF writes the core tensor of a one-dimensional kernel with an axis of one behind it."""
    file_shape = (*map(site.size, axes), 1) if core and len(axes) == 3 else None
    return Param(axes, init, file_shape=file_shape, batched=not site.kernel)


def tucker(core: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``core (r, s, *kernel)`` expanded by ``rows (r, rows)`` and ``columns (s, columns)``."""
    return torch.einsum("ij...,ip,jq->pq...", core, rows, columns)


def core_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """Kaiming-uniform for a core tensor: what goes into a number is all of its row."""
    bound = prod(tensor.shape[1:]) ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


@dataclass
class Lycoris(Additive):
    """The options of LoHa, LoKr and LoCon.

    Args:
        r: rank of the factors.
        alpha: the update is scaled by ``alpha / r``.
        rank_dropout: share of the update's rows that are left out in training, in [0, 1).
        module_dropout: the chance of a layer to go without its update in a training step, in [0, 1).
        rank_dropout_scale: make up for the rows that were left out by scaling the others.
        use_effective_conv2d: decompose kernels of convolutions by a core tensor (Tucker, or CP) instead of unrolling them.
        use_scalar: a trained factor before the update that starts from zero, so that all other tensors can start from noise.
        init_weights: True (start as the base; uniform otherwise), ``"lycoris"`` (as that library does), or False (for tests).
        rank_pattern, alpha_pattern: other ranks and alphas by pattern of module names.

    Raises:
        ValueError: the rank is no positive integer, a dropout is no share, or the initialisation is unknown.
    """

    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata=_help("Other ranks by module pattern."))
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata=_help("Other alphas by module pattern."))
    r: int = field(default=8, metadata=_help("Rank of the factors.") | {"positive": True})
    alpha: float = field(default=8, metadata=_help("The update is scaled by alpha / r."))
    rank_dropout: float = field(default=0.0, metadata=_help("Share of the update's rows left out in training.") | {"share": True})
    module_dropout: float = field(default=0.0, metadata=_help("Chance of a layer to go without its update in training.") | {"share": True})
    rank_dropout_scale: bool = field(default=False, metadata=_help("Scale the rows that are kept, to make up for the others."))
    use_effective_conv2d: bool = field(default=False, metadata=_help("Decompose kernels of convolutions by a core tensor."))
    use_scalar: bool = field(default=False, metadata=_help("A trained factor that starts from zero.") | {"ours": True})
    init_weights: bool | str = field(default=True, metadata=_help("true, false or lycoris."))

    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "alpha"}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_init()

    def check_init(self) -> None:
        """
        Raises:
            ValueError: there is no such start.
        """
        init = self.init_weights
        if not isinstance(init, bool) and init != "lycoris":
            raise ValueError(f"Unknown init_weights={init!r}.{nearest(str(init), ['lycoris'])} Known: True, False, lycoris.")

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "it starts from noise"

    def decomposes(self, frame: Frame) -> bool:
        return self.use_effective_conv2d and frame.decomposes

    def scalar(self) -> dict[str, Param]:
        """The declaration of the trained factor, if there is to be one."""
        name = f"{self.prefix}scalar"
        return {name: Param((), zeros if self.init_weights else ones, batched=False)} if self.use_scalar else {}

    def gated(self, p: Adapter, factor: Tensor) -> Tensor:
        """One factor of the update times the trained one."""
        return factor * getattr(p, f"{self.prefix}scalar") if self.use_scalar else factor

    def droppable(self, p: Adapter) -> int:
        """Over how many parts of the update `rank_dropout` decides: its rows."""
        return Frame.of(p.site).rows

    def kept(self, p: Adapter) -> Tensor | None:
        """What each row of the update is multiplied with in this step of a training; None where all are kept as they are."""
        if not p.training or not (self.rank_dropout or self.module_dropout):
            return None
        like, count = next(p.parameters()), self.droppable(p)
        kept = torch.ones(count, device=like.device, dtype=like.dtype)
        if self.rank_dropout:
            kept = (torch.rand(count, device=like.device) >= self.rank_dropout).to(like.dtype)
            if self.rank_dropout_scale:
                # No row at all is rare, and no reason to divide by zero.
                kept = kept / kept.mean().clamp(min=1 / count)
        if self.module_dropout:
            kept = kept * (torch.rand((), device=like.device) >= self.module_dropout)
        return kept

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        kept, change = self.kept(p), super().thinned(p, change)
        return change if kept is None else change * kept.unsqueeze(-1)


class Drawn(Started):
    """A method of low rank that draws which ranks take part in a training step: it gives `shares`."""

    def shares(self, p: Adapter) -> Tensor | None:
        """What each rank is multiplied with in this step of a training, ``(r,)``; None where all take part as they are."""
        raise NotImplementedError

    def drawn(self, p: Adapter) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor] | None] | None:
        """`whole` and `moving` as this step of a training has them."""
        shares = self.shares(p)
        if shares is None:
            return None

        def some(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
            return a, b * shares.repeat(b.shape[-1] // len(shares))

        moving = self.moving(p)
        return some(*self.whole(p)), None if moving is None else some(*moving)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        drawn = self.drawn(p) if p.training else None
        if drawn is None:
            return super().around(p, inner, x)
        (a, b), moving = drawn
        return self.with_factors(p, inner, x, a, b, moving)

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        drawn = self.drawn(p)
        if drawn is not None:
            a, b = map(full, drawn[0])
            change = change + p.strength * (self.scaling * (b @ a) - self.delta(p))
        return LowRank.thinned(self, p, change)
