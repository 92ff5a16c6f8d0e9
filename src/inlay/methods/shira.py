"""SHiRA: ``W + S`` with S sparse and of high rank: few entries of the weight are trained (Bhardwaj et al. 2024, arXiv 2406.13175)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..kernels.spread import remembered, sampled
from .spread import Spread, entries, plus_entries

if TYPE_CHECKING:
    from ..core.adapter import Adapter


@register
@dataclass
class ShiraConfig(Spread):
    """Few entries of the weight.

    Another mask than the random one: give ``mask_type`` a name of your own and set ``config.mask_fn = f``, where ``f(layer, r)``
    gives a mask ``(out, in)`` with ``r * (out + in)`` entries. Files hold the entries' places.

    Args:
        r: as many entries as LoRA's factors of this rank have, ``r * (out + in)``, or all, where that is fewer.
        mask_type: ``"random"``, or a name of your own.
        random_seed: seed of the random mask.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start from the base; False starts from random numbers, for tests.

    Raises:
        ValueError: the rank is no positive integer.
    """

    peft_type: str | None = PeftType.SHIRA
    r: int = field(default=32, metadata={"help": "As many entries as LoRA of this rank has.", "positive": True})
    mask_type: str = field(default="random", metadata={"help": "random, or a name for a mask_fn of your own."})
    random_seed: int | None = field(default=None, metadata={"help": "Seed of the random mask."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "shira_"
    paper: ClassVar[str] = "2406.13175"
    count_formula: ClassVar[str] = "r·in + out·r"
    equation: ClassVar[str] = "W + S, S sparse"
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_pattern", "layers_to_transform"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"r": 1}, "dropout": {"r": 1, "random_seed": 4, "input_dropout": 0.3}}

    # Chooses the entries; no field, since files do not hold functions.
    mask_fn: ClassVar[Callable[..., Tensor] | None] = None

    def at(self, path: str) -> Method:
        found = super().at(path)
        if "mask_fn" in vars(self):
            vars(found)["mask_fn"] = vars(self)["mask_fn"]
        return found

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"phi": ["q_proj", "v_proj"]}

    def params(self, site: Site) -> dict[str, Param]:
        count = min(self.r * (site.size("out") + site.size("in")), site.size("out") * site.size("in"))
        return {
            "shira_weight": Param((count,), zeros if self.init_weights else normal()),
            "shira_indices": Param((2, count), zeros, trainable=False, batched=False, dtype=torch.int32),
        }

    def start(self, p: Adapter) -> None:
        p.shira_indices.copy_(self._mask(p).nonzero().t())

    def _mask(self, p: Adapter) -> Tensor:
        shape, count = (p.site.size("out"), p.site.size("in")), p.shira_weight.shape[-1]
        if self.mask_fn is not None:
            mask = self.mask_fn(p.site.module, self.r) == 1
            if mask.shape != shape or mask.sum() != count:
                found = f"{int(mask.sum())} entries in {tuple(mask.shape)}"
                raise ValueError(f"`mask_fn` gave {found} for {p.path!r}; it should give {count} in {shape}.")
            return mask
        if self.mask_type != "random":
            raise ValueError(f"mask_type={self.mask_type!r} is no mask of ours: set `config.mask_fn`, or use 'random'.")
        # Without a seed too the numbers are those of HF peft: a new generator always starts from the same seed.
        generator = torch.Generator()
        if self.random_seed is not None:
            generator.manual_seed(self.random_seed)
        mask = torch.zeros(shape, dtype=torch.bool)
        mask.view(-1)[torch.randperm(mask.numel(), generator=generator)[:count]] = True
        return mask

    def values(self, p: Adapter) -> tuple[Tensor]:
        return (p.shira_weight,)

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        inp = p.site.size("in")
        return entries(p, values[0], _flat(p.shira_indices, inp), inp)

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        return plus_entries(p, w, p.shira_weight, _flat(p.shira_indices, w.shape[-1]))

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        return (sampled(g, x, remembered(p.shira_indices, _flat, x.shape[-1])),)


def _flat(indices: Tensor, inp: int) -> Tensor:
    row, column = indices.long()
    return row * inp + column
