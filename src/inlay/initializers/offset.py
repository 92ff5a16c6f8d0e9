"""Starting from factors whose product is not zero, with the base as it is.

HF peft overwrites the weight with the residual ``W - s B0 A0``, so that the product ``s B0 A0`` can be trained. Here the weight
stays, and the adapter adds what has changed since: ``s (B A - B0 A0)``. That is the same function on the same files, it starts
from the base exactly, also from a quantised one, and it can be merged, switched and taken out like any other.

It is written as ``(B - B0) A + B0 (A - A0)``, one product of twice the rank whose terms are as small as the change. What a method
makes of its ranks, it makes of either half.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..core.method import padded
from ..core.mixins import mixed_in
from ..core.param import Param, generator_for, kaiming_uniform, zeros
from ..core.site import Site
from .started import Started
from .together import Computed

if TYPE_CHECKING:
    from ..core.adapter import Adapter


class Starter(NamedTuple):
    """How a start is found.

    Attributes:
        find: A and B for layers of one shape, one behind another: given the sites, the method and the names.
        from_data: the base alone does not tell it.
        again: the same data, or base, give the same product again.
    """

    find: Callable[[Sequence[Site], Offset, Sequence[str]], tuple[Tensor, Tensor]]
    from_data: bool = False
    again: bool = True


class Offset(Computed):
    """Mixed in front of a method for starts whose product is not zero.

    The start is kept in frozen buffers. What follows from the base is computed again when an adapter is loaded; what came from
    data (``from_data``) goes to the file, in tensors beside HF's.
    """

    @property
    def starter(self) -> Starter:
        from . import STARTS

        return STARTS[self.start_name]

    def start_names(self, site: Site) -> dict[str, str]:
        """The buffers of the start, by the names of the tensors that started there."""
        return {name: f"{self.prefix}{name.rpartition('_')[2]}_start" for name in self.names(site)}

    def params(self, site: Site) -> dict[str, Param]:
        declared, data = super().params(site), self.starter.from_data
        for name, kept in self.start_names(site).items():
            declared[name] = replace(declared[name], init=zeros)
            declared[kept] = replace(declared[name], key=f"{kept}.weight", trainable=False, persistent=data, optional=data)
        return declared

    def compute(self, sites: Sequence[Site], paths: Sequence[str], known: bool) -> tuple[Tensor, Tensor]:
        return alive(*self.starter.find(sites, self, paths), self.rank_at(sites[0]))

    def derive(self, p: Adapter) -> None:
        super().derive(p)
        if not self.starter.again and any(t.any() for t in self.tensors(p)):
            raise ValueError(unknown_start(self.start_name, p.path))
        with torch.no_grad():
            for kept, value in zip(self.start_names(p.site).values(), self.placed(p.site, *self.computed(p)), strict=True):
                getattr(p, kept).copy_(value)

    def start(self, p: Adapter) -> None:
        for name, kept in self.start_names(p.site).items():
            getattr(p, name).data.copy_(getattr(p, kept))
        super().start(p)

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Beyond the smaller rank stands the start, which is taken off again."""
        values, kept = super().padded(p, small), self.start_names(p.site)
        if all(value.shape == getattr(small, name).shape for name, value in values.items()):
            return values
        if len(kept) > 2:
            raise ValueError(f"it consists of {', '.join(kept)}, whose starts are bound to one another")
        (a, a_start), (b, b_start) = kept.items()
        r = getattr(small, a).shape[-2]
        scale = small.method.scaling * small.strength / self.scaling  # type: ignore[attr-defined]
        values[b] = padded(getattr(small, b), values[b].shape) * scale
        for value, start in ((values[a], getattr(p, a_start)), (values[b].mT, getattr(p, b_start).mT)):
            if not self.starter.from_data:
                value[..., r:, :] = start[..., r:, :]
        return values

    def whole(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = super().whole(p)
        a_start, b_start = self.joined(p.site, *(getattr(p, kept) for kept in self.start_names(p.site).values()))
        return torch.cat((a, a - a_start), -2), torch.cat((b - b_start, b_start), -1)

    def moving(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return super().whole(p)


def offset(method: type[Started]) -> type[Started]:
    """The class of a low-rank method that starts from factors whose product is not zero."""
    return mixed_in(Offset, method)


def unknown_start(init: str, path: str) -> str:
    """What to do about a start that neither the file nor the layer tells."""
    prepare = {"corda": "preprocess_corda(model, config, run_model)", "lora_ga": "preprocess_loraga(model, config, train_step)"}[init]
    return (
        f"The {init!r} start of {path!r} is not known. For a new adapter, run `{prepare}` first. A file of HF peft does not hold it: "
        "have HF peft convert the adapter (`save_pretrained(..., path_initial_model_for_weight_conversion=...)`)"
        + (", or run that function with the same data before loading. " if init == "corda" else ". ")
        + "If the base is the residual already, set `init_lora_weights` to true in the file's adapter_config.json."
    )


def alive(a: Tensor, b: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Factors of rank r. Ranks that the weight does not have, where both factors would be zero for ever, start as those of LoRA do.

    Args:
        a: ``(*, k, in)``. b: ``(*, out, k)``, ``k <= r``.
    """
    missing = r - a.shape[-2]
    if missing:
        a = torch.cat((a, a.new_zeros(*a.shape[:-2], missing, a.shape[-1])), -2)
        b = torch.cat((b, b.new_zeros(*b.shape[:-1], missing)), -1)
    sizes = a.norm(dim=-1) * b.norm(dim=-2)
    dead = sizes <= 1e-7 * sizes.amax(-1, keepdim=True)
    if not dead.any():
        return a, b
    drawn = torch.empty(a.shape[-2:], dtype=torch.float32)
    kaiming_uniform(drawn, generator_for(0, "surplus"))
    return torch.where(dead.unsqueeze(-1), drawn.to(a), a), torch.where(dead.unsqueeze(-2), torch.zeros_like(b), b)
