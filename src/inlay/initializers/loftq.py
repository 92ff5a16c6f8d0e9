"""LoftQ: factors that make up for what quantising the weight loses (Li et al. 2023, arXiv 2310.08659).

On a dense base the quantisation is simulated: the adapter acts on the weight rounded to 4 or 8 bits, which it keeps beside the
base, and the base stays what it is. On a base that is quantised already, `replace_lora_weights_loftq` starts the factors from
the weights on disk.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.method import Method, full
from ..core.mixins import mixed_in
from ..core.param import Param, zeros
from ..core.site import Embedding, Site
from ..kernels.blockwise import rounded
from .calibration import Progress
from .compensation import compensate, quantised_layers
from .offset import alive
from .pissa import pissa
from .started import Started
from .together import Computed, stacked, weights

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


# So many rows of a product of factors are made at once.
ROWS = 512


@dataclass
class LoftQConfig:
    """Options of LoftQ.

    Args:
        loftq_bits: 4 (NF4 in blocks of 64) or 8.
        loftq_iter: how often quantisation and factors are fitted to each other.
    """

    loftq_bits: int = field(default=4, metadata={"help": "Bits of the quantised weight: 4 or 8."})
    loftq_iter: int = field(default=1, metadata={"help": "Alternating steps."})

    def __post_init__(self) -> None:
        if self.loftq_bits not in (4, 8):
            raise ValueError(f"`loftq_bits` is 4 or 8, not {self.loftq_bits!r}.")
        if self.loftq_iter < 1:
            raise ValueError(f"`loftq_iter` is at least 1, not {self.loftq_iter!r}.")


def quantized(sites: Sequence[Site], w: Tensor, r: int, options: LoftQConfig) -> Tensor:
    """The weights ``(sites, *batch, out, in)`` after the last rounding, each of what the factors of the one before left over. Blocks
    run as each host keeps its weight in memory. One round takes no copy in full precision, and several take one."""

    def of(left: Tensor, dtype: torch.dtype) -> Tensor:
        pairs = zip(sites, left, strict=True)
        return stacked([site.matrix(rounded(site.raw(t), options.loftq_bits, dtype)) for site, t in pairs])

    left = w
    for _ in range(1, options.loftq_iter):
        left = lacking(w, of(left, full(w).dtype))
        a, b = pissa(left, r, 1.0)
        for start in range(0, w.shape[-2], ROWS):
            rows = slice(start, start + ROWS)
            left[..., rows, :] = full(w[..., rows, :]) - (b[..., rows, :] @ a).to(left.dtype)
    return of(left, sites[0].dtype)


def lacking(w: Tensor, rounded: Tensor) -> Tensor:
    """What rounding took from a weight, in the place of the rounded one."""
    return rounded.neg_().add_(w)


class Loftq(Computed):
    """Mixed in front of a method: the weight beneath the update is the rounded one."""

    @property
    def base(self) -> str:
        return f"{self.prefix}base"

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        r = small.method.rank_at(small.site)  # type: ignore[attr-defined]
        if self.rank_at(p.site) != r and LoftQConfig(**self.loftq_config).loftq_iter > 1:
            raise ValueError("from two rounds of LoftQ on the rounded weight beneath the update is another one for each rank")
        return super().padded(p, small)

    def refuses(self, site: Site) -> str | None:
        if not site.store.dense:
            return (
                "it is quantised already, so the weight before rounding, whose loss the factors of LoftQ make up for, is gone; "
                f"start from {self.init_option}=True and call `replace_lora_weights_loftq`, which reads that weight from the base's file"
            )
        r = self.rank_at(site)
        if r >= min(site.shape[-2:]):
            return f"factors of rank {r} hold all of its {' x '.join(map(str, site.shape[-2:]))} numbers, so nothing would be quantised"
        return super().refuses(site)

    def params(self, site: Site) -> dict[str, Param]:
        declared = super().params(site)
        declared |= {name: replace(declared[name], init=zeros) for name in self.names(site)}
        return declared | {self.base: Param(("out", "in"), zeros, trainable=False, persistent=False, dtype=site.dtype)}

    def kind(self, site: Site) -> object:
        return super().kind(site), site.dtype

    def compute(self, sites: Sequence[Site], paths: Sequence[str], known: bool) -> tuple[Tensor, ...]:
        """The weight beneath the update, and factors of what that lacks."""
        r, w = self.rank_at(sites[0]), weights(sites)
        q = quantized(sites, w, r, LoftQConfig(**self.loftq_config))
        return (q,) if known else (q, *alive(*pissa(full(w) - full(q), r, self.scaling), r))

    def derive(self, p: Adapter) -> None:
        super().derive(p)
        with torch.no_grad():
            q, *factors = self.computed(p, known=any(t.any() for t in self.tensors(p)))
            self.rounded(p).copy_(q)
        if factors:
            p.__dict__["first_factors"] = factors

    def rounded(self, p: Adapter) -> Tensor:
        """The weight beneath the update."""
        return getattr(p, self.base)

    @torch.no_grad()
    def start(self, p: Adapter) -> None:
        a, b = p.__dict__.pop("first_factors", None) or self.computed(p)[1:]
        for old, new in zip(self.tensors(p), self.placed(p.site, a, b), strict=True):
            old.copy_(new)
        super().start(p)
        magnitude = getattr(p, f"{self.prefix}magnitude_vector", None)
        if magnitude is not None:
            magnitude.copy_((full(self.rounded(p)) + full(self.delta(p))).norm(dim=-1))

    def _lost(self, p: Adapter) -> Tensor:
        """What rounding takes from the weight."""
        return full(self.rounded(p)) - full(p.site.read()[0])

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        lost = self._lost(p)
        new, b = super().fold(p, w + lost, b)
        return (new if p.strength == 1 else new - (1 - p.strength) * lost), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        from ..core.inner import Inner

        site = inner.site
        # Where a decomposed update is folded, what rounding takes is in the fold already.
        folds = self.use_dora and (isinstance(site, Embedding) or site.size("channel") != site.size("out"))
        if folds or p.strength != 1:
            return Method.around(self, p, inner, x)

        def call(x: Tensor) -> Tensor:
            if dense is not None:
                return F.linear(x, *dense)
            y, lost = inner(x), self._lost(p)
            return (y + site.apply(x.to(lost.dtype) if x.is_floating_point() else x, lost)).to(y.dtype)

        def params() -> tuple[Tensor, Tensor | None]:
            w, b = inner.params()
            return full(w) + self._lost(p), b

        dense = (self.rounded(p), inner.dense[1]) if inner.dense is not None else None
        return super().around(p, Inner(site, call, params, dense, inner.bias, (inner.args, inner.kwargs)), x)


def loftq(method: type[Started]) -> type[Started]:
    """The class of a low-rank method over a rounded weight."""
    return mixed_in(Loftq, method)


# ---- on a quantised base -------------------------------------------------------------------------------------------------
@torch.no_grad()
def replace_lora_weights_loftq(
    peft_model: nn.Module,
    model_path: str | os.PathLike[str] | nn.Module | None = None,
    adapter_name: str = "default",
    callback: Callable[[nn.Module, str], bool] | None = None,
    *,
    iterations: int = 1,
    progress: Progress | None = None,
) -> None:
    """Start the factors of a LoRA adapter on a quantised base from what the quantisation lost.

    Args:
        peft_model: a quantised base with the adapter on it, whose values are replaced.
        model_path: the base's safetensors file, or its folder, or the model before quantisation; where None, what the base was loaded
            from, on this machine.
        callback: asked after each layer, with the model and the layer's name, whether to keep the new factors.
        iterations: beyond 1, the base is quantised again, too, in turn with the factors. It is another base then, which has to be
            saved along with the adapter.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: no adapted layer is quantised, the file is not found or lacks a weight, or the adapter has no factors A and B.
    """
    from ..core.targets import bare_model
    from ..operations.original import original_weights

    base = bare_model(peft_model)
    found = quantised_layers(base, adapter_name)
    read = original_weights(base, model_path)
    for i, (place, p) in enumerate(found, 1):
        before, held = {n: t.detach().clone() for n, t in p.named_parameters()}, p.site.store.held(p.site.module, p.site.name)
        compensate(place, p, read(f"{place.path}.{p.site.name}"), iterations=iterations)
        if callback is not None and not callback(peft_model, place.path):
            for name, t in p.named_parameters():
                t.copy_(before[name])
            if iterations > 1:
                p.site.store.put(p.site.module, p.site.name, held)
        if progress is not None:
            progress(i, len(found))
