"""Lily: layers share their A with neighbours and a set of B with all alike; a router mixes the set (Zhong et al. 2024, arXiv 2407.09946).

The mixture is the router's mean over all positions of the batch, so what a layer does to one row depends on the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.method import Method, padded, register
from ..core.param import Param, generator_for, kaiming_uniform
from ..core.site import AnyConv, Site
from ..core.targets import ALL_LINEAR
from ..kernels.routed import linear_plus_routed

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


class Experts(nn.Module):
    """The factors by name, and the names of each layer's."""

    def __init__(self) -> None:
        super().__init__()
        self.factors = nn.ParameterDict()
        self.names: dict[str, tuple[str, str]] = {}


@register
@dataclass
class LilyConfig(Method):
    """Factors that layers share, mixed by what goes through them.

    Args:
        r: rank of the update.
        stride_A: how many neighbours of one kind share their A; 1 gives each its own.
        num_B: how many B there are for the layers of one kind to mix.
        scaling: the factor in front of the update.
        init_weights: start the B from zero; False starts them from random numbers, for tests.

    Raises:
        ValueError: a count is no positive integer, or there is but one B to choose from.
    """

    peft_type: str | None = PeftType.LILY
    r: int = field(default=32, metadata={"help": "Rank of the update.", "positive": True})
    stride_A: int = field(default=1, metadata={"help": "How many neighbours share an A.", "positive": True})  # noqa: N815  HF's name
    num_B: int = field(default=2, metadata={"help": "How many B the layers of one kind mix."})  # noqa: N815  HF's name
    scaling: float = field(default=1.0, metadata={"help": "The factor in front of the update."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "lily_"
    paper: ClassVar[str] = "2407.09946"
    equation: ClassVar[str] = "y + s (sum_e p_e B_e) A x, with p the router's mean over the batch"
    count_formula: ClassVar[str] = "r·(in + num_B·(out + 1))"
    unmergeable: ClassVar[str] = (
        "Lily cannot be merged: its router weighs the factors anew for each batch, so the layer is no function of its weight."
    )
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"r": 4, "num_B": 3}, "shared": {"r": 2, "stride_A": 2}}
    ours: ClassVar[frozenset[str]] = Method.ours

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_B < 2:
            raise ValueError(f"`num_B` should be at least 2 for a router to choose from, not {self.num_B!r}.")

    def refuses(self, site: Site) -> str | None:
        return "its host reads the weight itself, and the router needs the input" if site.reads else None

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        kinds: dict[Any, list[str]] = {}
        for path, site in sites.items():
            kinds.setdefault((self._kind(path), tuple(site.shape)), []).append(path)
        bank = Experts()
        for number, ((_, shape), paths) in enumerate(kinds.items()):
            *batch, out, inp = shape
            for i, path in enumerate(paths):
                names = bank.names[path] = f"A{number}_{i // self.stride_A}", f"B{number}"
                for name, width in zip(names, ((self.r, inp), (self.num_B * self.r, out)), strict=True):
                    if name in bank.factors:
                        continue
                    drawn = torch.zeros(*batch, *width)
                    if name[0] == "A" or not self.init_weights:
                        kaiming_uniform(drawn, generator_for(self.seed, path, name[0]))
                    bank.factors[name] = nn.Parameter(drawn)
        return bank

    def _kind(self, path: str) -> str:
        """What was named to find the layer: layers found by one name are of one kind. Where none was named, it is the
        last part of their own."""
        named = self.target_modules
        if isinstance(named, str) and named != ALL_LINEAR:
            return named
        hits = [name for name in (named if isinstance(named, set) else ()) if path == name or path.endswith(f".{name}")]
        return max(hits, key=len) if hits else path.rpartition(".")[2]

    def bank_key(self, name: str) -> str | None:
        return None

    def repeated(self, p: Adapter) -> dict[str, str]:
        a, b = p.shared.names[p.path]
        return {"lily_A.weight": f"factors.{a}", "lily_B.weight": f"factors.{b}"}

    def padded_shared(self, shared: nn.Module, small: nn.Module) -> dict[str, Tensor]:
        """Each B grows by itself."""
        values = super().padded_shared(shared, small)
        return {
            name: padded(small.get_parameter(name), value.shape, self.num_B, -2) if name.startswith("factors.B") else value
            for name, value in values.items()
        }

    def params(self, site: Site) -> dict[str, Param]:
        return {"lily_router": Param((self.num_B, self.r), kaiming_uniform, "lily_router.weight")}

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site = inner.site
        a, b = (p.shared.factors[name] for name in p.shared.names[p.path])
        if inner.dense is not None:
            experts = b.unflatten(-2, (self.num_B, self.r))
            return linear_plus_routed(x, *inner.dense, a, experts, p.lily_router, self.scaling * p.strength)
        y = inner(x)
        x, a, b, router = meet(x, a, b, p.lily_router)
        hidden = site.down(x, a)
        rows = hidden.movedim(1, -1) if isinstance(site, AnyConv) else hidden
        rows = rows.reshape(-1, *site.batch, self.r)
        shares = torch.einsum("n...r,...er->n...e", rows, router).softmax(-1).mean(0)
        mixed = torch.einsum("...e,...ero->...or", shares, b.unflatten(-2, (self.num_B, self.r)))
        return add(y, site.up(hidden, mixed), self.scaling * p.strength)
