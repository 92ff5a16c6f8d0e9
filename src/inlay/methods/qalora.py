"""QA-LoRA: ``W + s B A P`` where ``P`` sums groups of neighbouring inputs (Xu et al. 2023, arXiv 2309.14717), a variant of LoRA.

A weight that is quantised in groups has one offset for each group and row, so an update that is constant over a group can be
merged into the offsets without a loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.param import Param
from ..core.site import Site
from .dora import Dora
from .lora import LoraConfig, is_linear

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


class QALora(LoraConfig):
    """LoRA with ``use_qalora=True``."""

    def refuses(self, site: Site) -> str | None:
        width, group = site.size("in"), self.qalora_group_size
        if width % group:
            return f"its {width} inputs cannot be split into groups of `qalora_group_size` = {group}"
        return super().refuses(site)

    def params(self, site: Site) -> dict[str, Param]:
        a, _ = self.names(site)
        return super().params(site) | {a: self._in_a(site, site.size("in") // self.qalora_group_size)}

    def _weight(self, a: Tensor) -> float:
        """The mean of a group, times the number of groups."""
        return a.shape[-1] / self.qalora_group_size

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = super().factors(p)
        return self._weight(a) * a.repeat_interleave(self.qalora_group_size, -1), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        if not is_linear(site) or self.delta_bias(p) is not None:
            return super().around(p, inner, x)
        y = inner(x)
        a, b = LoraConfig.factors(self, p)
        x, a, b = meet(F.dropout(x, self.dropout, p.training), a, b)
        # What is kept for the backward pass is as much smaller as a group is large.
        sums = x.unflatten(-1, (-1, self.qalora_group_size)).sum(-1)
        return add(y, F.linear(F.linear(sums, a), b), self.scaling * p.strength * self._weight(a))


class DoraQALora(Dora, QALora):
    """QA-LoRA with ``use_dora=True``: the rows' lengths apart, their directions by QA-LoRA."""
