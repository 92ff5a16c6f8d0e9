"""LoCon: LoRA with kernels of convolutions decomposed, too (Yeh et al. 2023, arXiv 2309.14859; the "Tucker" form of LyCORIS).

On a convolution A ``(r, in, 1, 1)`` and B ``(out, r, 1, 1)`` stand before and behind a small one, ``(r, r, *kernel)``; elsewhere the
update is LoRA's.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import LowRank
from ..core.method import register
from ..core.param import Param, generator_for, kaiming_uniform, ones, zeros
from ..core.site import ConvTranspose, Site
from ..initializers.plain import gaussian, orthogonal
from ..initializers.svd import singular_vectors
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
        init_weights: True, ``"lycoris"``, False, or a start from the weight or from data, as in `LoraConfig`. Where there is a core
            tensor, it is the truncated Tucker decomposition of that start; a trained factor (`use_scalar`) starts from one.
    """

    peft_type: str | None = "LOCON"
    rank_dropout: float = field(default=0.0, metadata={"help": "Share of the ranks left out in training."})
    rank_dropout_scale: bool = field(default=False, metadata={"help": "Scale the ranks that are kept, to make up for the others."})
    use_effective_conv2d: bool = field(default=True, metadata={"help": "Decompose kernels of convolutions by a core tensor."})
    init_weights: bool | str = field(default=True, metadata={"help": "How the factors start: true, false, lycoris, pissa, olora, eva, ..."})

    prefix: ClassVar[str] = "locon_"
    paper: ClassVar[str] = "2309.14859"
    equation: ClassVar[str] = "W + s B T A"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "alpha": 5},
        "unrolled": {"r": 2, "use_effective_conv2d": False, "use_scalar": True},
        "dora": {"r": 2, "use_dora": True},
        "dropout": {"r": 4, "rank_dropout": 0.3, "module_dropout": 0.2, "rank_dropout_scale": True, "input_dropout": 0.1},
        "pissa": {"r": 3, "alpha": 5, "init_weights": "pissa", "use_scalar": True},
        "pissa-dropout": {"r": 3, "alpha": 5, "init_weights": "pissa", "rank_dropout": 0.3, "use_effective_conv2d": False},
        "loftq": {"r": 2, "alpha": 3, "init_weights": "loftq", "loftq_config": {"loftq_iter": 2}, "use_dora": True},
        "mica": {"r": 2, "init_weights": "mica", "use_scalar": True},
    }
    own_inits: ClassVar[tuple[str, ...]] = ("lycoris",)

    def unfit(self, start: str) -> str:
        if start == "orthogonal" and self.rank_dropout:
            return "the product of its factors is zero with all ranks only, and `rank_dropout` leaves some out"
        return super().unfit(start)

    def refuses(self, site: Site) -> str | None:
        if self.init_weights == "orthogonal" and self.decomposes(Frame.of(site)):
            return "a core tensor stands between the factors, and init_weights='orthogonal' makes the product of the two zero without it"
        return super().refuses(site)

    def names(self, site: Site) -> tuple[str, ...]:
        core = ("locon_mid",) if self.decomposes(Frame.of(site)) else ()
        return "locon_A", *core, *self.scalar(), "locon_B"

    def params(self, site: Site) -> dict[str, Param]:
        r, groups = self.r, prod(site.batch)
        first, last = kaiming_uniform, zeros if self.init_weights and not self.use_scalar else kaiming_uniform
        if self.init_weights == "gaussian":
            first, _ = gaussian(r)
        elif self.init_weights == "orthogonal":
            first, last = orthogonal(self.scaling)
        if not self.decomposes(Frame.of(site)):
            return {"locon_A": Param((r, "in"), first), "locon_B": Param(("out", r), last)} | self.scalar()
        inp, out, ones = site.size("feature"), site.size("channel"), tuple(1 for _ in site.kernel)
        return {
            "locon_A": Param((r, inp), first, file_shape=(groups * r, inp, *ones)),
            "locon_mid": Param((r, r, *site.kernel), core_uniform, file_shape=(groups * r, r, *site.kernel)),
            "locon_B": Param((out, r), last, file_shape=(groups * out, r, *ones)),
        } | self.scalar()

    def scalar(self) -> dict[str, Param]:
        # Before a product that is zero, a factor of zero would never learn.
        start = {"init": ones} if self.init_weights == "orthogonal" else {}
        return {name: replace(param, **start) for name, param in super().scalar().items()}

    def joined(self, site: Site, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The core joins the factor that has the kernel."""
        a, *between, b = tensors
        if self.use_scalar:
            a = a * between.pop()
        if not between:
            return a, b
        core = between[0].flatten(-len(site.kernel))
        if isinstance(site, ConvTranspose):
            return a, torch.einsum("...oi,...ijk->...okj", b, core).flatten(-3, -2)
        return torch.einsum("...ijk,...jc->...ick", core, a).flatten(-2), b

    def placed(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        scalar = [a.new_ones(())] if self.use_scalar else []
        if not self.decomposes(Frame.of(site)):
            return a, *scalar, b
        taps = prod(site.kernel)
        if isinstance(site, ConvTranspose):
            kernels = b.unflatten(-2, (-1, taps))
            basis = self._basis(kernels.flatten(-2))
            core, b = torch.einsum("...oi,...okj->...ijk", basis, kernels), self._alive(basis)
        else:
            kernels = a.unflatten(-1, (-1, taps))
            basis = self._basis(kernels.movedim(-2, -3).flatten(-2))
            core, a = torch.einsum("...ick,...cj->...ijk", kernels, basis), self._alive(basis).mT
        return a, core.unflatten(-1, site.kernel), *scalar, b

    def _basis(self, unfolded: Tensor) -> Tensor:
        """The directions ``(*batch, n, r)`` that hold most of ``(*batch, n, m)``; those that there are not are zero."""
        u, _, _ = singular_vectors(unfolded, min(self.r, *unfolded.shape[-2:]))
        return torch.cat((u, u.new_zeros(*u.shape[:-1], self.r - u.shape[-1])), -1).to(unfolded)

    def _alive(self, basis: Tensor) -> Tensor:
        """The directions that there are not, drawn: the core has zeros there, and would learn nothing before zeros."""
        drawn = torch.empty(basis.mT.shape[-2:])
        kaiming_uniform(drawn, generator_for(0, "surplus"))
        return torch.where(basis.norm(dim=-2, keepdim=True) > 0, basis, drawn.mT.to(basis))

    def droppable(self, p: Adapter) -> int:
        return self.r

    def shares(self, p: Adapter) -> Tensor | None:
        return self.kept(p)
