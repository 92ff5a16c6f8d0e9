"""Merging into a quantised base without rounding again: its quantised layers become dense ones, or those that they once were."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..core.inlaid import lift, places
from ..core.place import Place
from ..core.retrained import Retrained
from ..core.session import Session
from ..core.site import Site, Stack, site_of
from ..core.targets import base_modules
from . import merge as merging

BASES = ("requantized", "dequantized", "original")
# What transformers keeps on a model that it has quantised.
MARKS = ("hf_quantizer", "is_quantized", "is_loaded_in_4bit", "is_loaded_in_8bit", "quantization_method", "is_8bit_serializable")


def merge_dense(
    model: nn.Module,
    session: Session,
    names: Sequence[str] | None,
    safe_merge: bool,
    read: Callable[[str], Tensor] | None,
    out_dtype: torch.dtype | None,
) -> nn.Module:
    """The base with adapters merged, all of its quantised layers dense, and no adapters left.

    Args:
        names: the adapters; the active ones where None.
        read: gives the weight, by name, that a layer had before it was quantised; where None, the quantised one is restored.
        out_dtype: of the whole model; where None, that in which each layer computes.

    Raises:
        ValueError: a weight on disk is absent or of another shape, or (``safe_merge``) a result is not finite.
        TypeError: a method cannot be merged. In either case no layer has been replaced.
    """
    names = session.active if names is None else session.check([names] if isinstance(names, str) else names)
    merging.unmerge(model)
    found = quantised_sites(model)
    for site, path, place in found:
        if place is not None and (why := next(filter(None, (place.adapters[n].method.unmergeable for n in place.here(names))), "")):
            raise TypeError(why)
        if read is not None and (shape := read(f"{path}.{site.name}").shape) != site.raw_shape:
            raise ValueError(f"{path}.{site.name} is of shape {tuple(shape)} on disk and of {tuple(site.raw_shape)} in the model.")
    quantised = {id(place) for _, _, place in found if place is not None}
    try:
        merging.put_in([(place, names) for place in places(model) if id(place) not in quantised], safe_merge)
        for site, path, place in found if safe_merge else ():
            if not _merged(site, path, place, names, read)[0].isfinite().all():
                raise ValueError(f"Merging gives weights of {path!r} that are not finite; the adapter seems broken.")
    except Exception:
        merging.unmerge(model)
        raise
    merging.tie_again(model)
    by_name = dict(base_modules(model))
    for site, path, place in found:
        _replace(by_name, site, path, *_merged(site, path, place, names, read), out_dtype)
    model = merging.unload(model, session, keep_merged=True)
    _forget(model)
    if out_dtype is not None:
        for q in model.parameters():
            if q.is_floating_point():
                q.data = q.data.to(out_dtype)
    return model


def quantised_sites(model: nn.Module) -> list[tuple[Site, str, Place | None]]:
    """The quantised weights of a model, those that are adapted and the others."""
    found: list[tuple[Site, str, Place | None]] = []
    for path, module in base_modules(model):
        adapted = vars(module).get("_inlay", {}).values()
        placed = {p.site.name: p for p in adapted if isinstance(p, Place)}
        found += [(p.site, path, p) for p in placed.values() if not p.site.store.dense]
        site = site_of(module) if placed or not adapted else None
        others = [Stack(module, n) for n, q in module._parameters.items() if q is not None and q.ndim == 3] if site is None else [site]
        found += [(s, path, None) for s in others if s.name not in placed and not s.store.dense]
    return found


@torch.no_grad()
def _merged(
    site: Site, path: str, place: Place | None, names: Sequence[str], read: Callable[[str], Tensor] | None
) -> tuple[Tensor, Tensor | None]:
    """The weight as a matrix and the bias, with the adapters in them."""
    if read is not None:
        site.original = read(f"{path}.{site.name}").to(site.device)
    try:
        return site.read() if place is None else place.fold(names)
    finally:
        site.original = None


def _replace(modules: dict[str, nn.Module], site: Site, path: str, w: Tensor, b: Tensor | None, out_dtype: torch.dtype | None) -> None:
    module: nn.Module = site.module
    dtype = out_dtype or site.dtype
    raw = site.raw(w).detach().to(dtype).contiguous()
    bias = None if b is None else b.detach().to(dtype)
    if site.name in vars(module).get("_inlay", {}):
        lift(module, site.name)
    made = site.store.plain(module, site.name, raw, bias)
    if made is module:
        if bias is not None and site.bias_name is not None:
            module._parameters[site.bias_name] = nn.Parameter(bias, requires_grad=False)
    else:
        parent, _, child = path.rpartition(".")
        modules[parent]._modules[child] = made
        modules[path] = made


def _forget(model: nn.Module) -> None:
    """Nothing on the model says any more that it is quantised."""
    for mark in MARKS:
        model.__dict__.pop(mark, None)
    config = getattr(model, "config", None)
    if config is not None and "quantization_config" in vars(config):
        del config.quantization_config


def warn_of_rounding(model: nn.Module) -> None:
    """Say what rounding has taken from what was merged into quantised weights."""
    lost = [p.rounding for p in places(model) if not isinstance(p, Retrained) and p.rounding is not None]
    if lost:
        of_weight, of_change = (max(share) for share in zip(*lost, strict=True))
        warnings.warn(
            f"{len(lost)} merged weights were quantised again. That changed them by up to {of_weight:.1%} of their size, which is up to "
            f"{of_change:.0%} of what the adapters had changed. merge_and_unload(base='dequantized') loses nothing.",
            stacklevel=3,
        )
