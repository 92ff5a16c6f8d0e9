"""Starting from factors whose product is not zero, with the base as it is.

HF peft overwrites the weight with the residual ``W - s B0 A0``, so that the product ``s B0 A0`` can be trained. Here the weight
stays, and the adapter adds what has changed since: ``s (B A - B0 A0)``. That is the same function on the same files, it starts
from the base exactly, also from a quantised one, and it can be merged, switched and taken out like any other.

It is written as ``(B - B0) A + B0 (A - A0)``, one product of twice the rank whose terms are as small as the change. What a method
makes of its ranks, it makes of either half.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.method import Method, padded
from ..core.mixins import mixed_in
from ..core.param import Param, generator_for, kaiming_uniform, zeros
from ..core.site import Site
from .started import Started

if TYPE_CHECKING:
    from ..core.adapter import Adapter

# How many numbers of weights are decomposed at once. A CPU goes through a stack one by one, and better with one in its cache.
AT_ONCE = {"cpu": 2**20}
AT_ONCE_ELSEWHERE = 2**24


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


class Offset(Started):
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

    def derive(self, p: Adapter) -> None:
        super().derive(p)
        if not self.starter.again and any(t.any() for t in self.tensors(p)):
            raise ValueError(unknown_start(self.start_name, p.path))
        waiting = isinstance(p.shared, Starts) and p.path in p.shared
        starts = p.shared if waiting else Starts({p.path: p.site}, lambda _: self)
        with torch.no_grad():
            for kept, value in zip(self.start_names(p.site).values(), self.placed(p.site, *starts.take(p.path)), strict=True):
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


class Starts(nn.Module):
    """The starts of all layers of one adapter, computed when the first is asked for, those of one shape together.

    Args:
        sites: the layers by name.
        method_of: the method as it is for a name.
        progress: called with the number of layers that are done, and of all.
    """

    def __init__(
        self, sites: Mapping[str, Site], method_of: Callable[[str], Method], progress: Callable[[int, int], object] | None = None
    ) -> None:
        super().__init__()
        self.progress, self.total, self.done = progress, len(sites), 0
        self.methods = {path: m for path in sites if isinstance(m := method_of(path), Offset)}
        self.sites = {path: sites[path] for path in self.methods}
        self.found: dict[str, tuple[Tensor, Tensor]] = {}

    def __contains__(self, path: str) -> bool:
        return path in self.sites or path in self.found

    def take(self, path: str) -> tuple[Tensor, Tensor]:
        """The start of one layer, which is forgotten here."""
        if path not in self.found:
            self._compute(self._like(path))
        return self.found.pop(path)

    def _like(self, path: str) -> list[str]:
        """Layers that are decomposed in one call with this one."""
        return alike(path, self.sites, self._kind, self.sites[path].shape.numel())

    def _kind(self, path: str) -> tuple[Any, ...]:
        site, method = self.sites[path], self.methods[path]
        return site.shape, site.device, method.rank_at(site), method.scaling, method.init

    @torch.no_grad()
    def _compute(self, paths: Sequence[str]) -> None:
        method, sites = self.methods[paths[0]], [self.sites.pop(path) for path in paths]
        site = sites[0]
        a, b = alive(*method.starter.find(sites, method, paths), method.rank_at(site))
        self.found |= {path: (a[i], b[i]) for i, path in enumerate(paths)}
        for path in paths:
            del self.methods[path]
        self.done += len(paths)
        if self.progress is not None:
            self.progress(self.done, self.total)


def alike(path: str, sites: Mapping[str, Site], kind: Callable[[str], object], numbers: int) -> list[str]:
    """This layer and others of its kind, as many as are decomposed in one call.

    Args:
        numbers: how many there are to hold of each.
    """
    most, own = max(1, AT_ONCE.get(sites[path].device.type, AT_ONCE_ELSEWHERE) // max(1, numbers)), kind(path)
    return [path, *islice((other for other in sites if other != path and kind(other) == own), most - 1)]


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


def weights(sites: Sequence[Site]) -> Tensor:
    """The weights of sites of one shape, ``(sites, *batch, out, in)``."""
    return torch.stack([site.read()[0].detach() for site in sites])
