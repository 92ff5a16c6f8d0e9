"""LoCon: LoRA with kernels of convolutions decomposed, too (Yeh et al. 2023, arXiv 2309.14859; the "Tucker" form of LyCORIS).

On a convolution A ``(r, in, 1, 1)`` and B ``(out, r, 1, 1)`` stand before and behind a small one, ``(r, r, *kernel)``; elsewhere the
update is LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.method import LowRank, Param, kaiming_uniform, register, zeros
from ..core.site import ConvTranspose, Site
from .lycoris import Drawn, Frame, Lycoris, core_uniform

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@register
@dataclass
class LoConConfig(Drawn, Lycoris, LowRank):
    """LoRA with a core tensor for kernels. Groups of a convolution have factors of their own, each of rank ``r``.

    Args:
        rank_dropout: share of the ranks that are left out in training, in [0, 1).
        rank_dropout_scale: make up for the ranks that were left out by scaling the others.
        use_effective_conv2d: decompose kernels by a core tensor; without it A has the kernel, as in LoRA.
    """

    peft_type: str | None = "LOCON"
    rank_dropout: float = field(default=0.0, metadata={"help": "Share of the ranks left out in training."})
    rank_dropout_scale: bool = field(default=False, metadata={"help": "Scale the ranks that are kept, to make up for the others."})
    use_effective_conv2d: bool = field(default=True, metadata={"help": "Decompose kernels of convolutions by a core tensor."})

    prefix: ClassVar[str] = "locon_"
    paper: ClassVar[str] = "2309.14859"
    equation: ClassVar[str] = "W + s B T A"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "alpha": 5},
        "unrolled": {"r": 2, "use_effective_conv2d": False, "use_scalar": True},
        "dora": {"r": 2, "use_dora": True},
        "dropout": {"r": 4, "rank_dropout": 0.3, "module_dropout": 0.2, "rank_dropout_scale": True, "input_dropout": 0.1},
    }

    def params(self, site: Site) -> dict[str, Param]:
        r, groups = self.r, prod(site.batch)
        last = zeros if self.init_weights and not self.use_scalar else kaiming_uniform
        if not self.decomposes(Frame.of(site)):
            return {"locon_A": Param((r, "in"), kaiming_uniform), "locon_B": Param(("out", r), last)} | self.scalar()
        inp, out, ones = site.size("feature"), site.size("channel"), tuple(1 for _ in site.kernel)
        return {
            "locon_A": Param((r, inp), kaiming_uniform, file_shape=(groups * r, inp, *ones)),
            "locon_mid": Param((r, r, *site.kernel), core_uniform, file_shape=(groups * r, r, *site.kernel)),
            "locon_B": Param((out, r), last, file_shape=(groups * out, r, *ones)),
        } | self.scalar()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return self._factors(p, p.locon_B)

    def _factors(self, p: Adapter, b: Tensor) -> tuple[Tensor, Tensor]:
        """The core joins the factor that has the kernel."""
        a = self.gated(p, p.locon_A)
        if "locon_mid" not in p.declared:
            return a, b
        core = p.locon_mid.flatten(-len(p.site.kernel))
        if isinstance(p.site, ConvTranspose):
            return a, torch.einsum("...oi,...ijk->...okj", b, core).flatten(-3, -2)
        return torch.einsum("...ijk,...jc->...ick", core, a).flatten(-2), b

    def droppable(self, p: Adapter) -> int:
        return self.r

    def drawn(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        kept = self.kept(p)
        return None if kept is None else self._factors(p, p.locon_B * kept)
