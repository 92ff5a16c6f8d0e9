"""On a quantised base: factors that make up for what quantising took from the weights.

With ``E = W - Q`` what was lost, ``x`` the layer's inputs and ``H`` the mean of ``x x'``, the best ``s B A`` of rank r for the layer's
outputs, in ``|(E - s B A) H^(1/2)|``, is ``U U' E``: what lies in the span of the r leading left singular vectors U of ``E H^(1/2)``.
With ``H = 1`` that is LoftQ, with the moments of given inputs CLoQ. No root is ever undone, so few inputs do no harm: what they do not
reach is made up for as far as it lies in that span.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.method import full
from .offset import alive
from .started import Started
from .svd import precise, singular_vectors

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.place import Place


def best_factors(lost: Tensor, r: int, scaling: float, root: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Factors with ``scaling * B A`` nearest to what was lost, the sizes shared by both.

    Args:
        lost: ``(*batch, out, in)``.
        root: any ``R`` with ``R R' = H``, see `weighted`.

    Returns:
        A ``(*batch, r, in)`` and B ``(*batch, out, r)``, of the rank that there can be at most.
    """
    u, _, _ = singular_vectors(weighted(precise(lost), root), min(r, *lost.shape[-2:]))
    rows = u.mT @ precise(lost)
    share = (rows.norm(dim=-1) / scaling).sqrt()
    scale = 1 / (scaling * share).clamp_min(torch.finfo(rows.dtype).tiny)
    return scale.unsqueeze(-1) * rows, u * share.unsqueeze(-2)


def weighted(matrix: Tensor, root: Tensor | None) -> Tensor:
    """``matrix R``. A diagonal ``R``, of one-hot inputs, is given as ``(in,)``, others as ``(*batch, in, in)``."""
    if root is None:
        return matrix
    return matrix * root.to(matrix) if root.ndim == 1 else matrix @ root.to(matrix)


def quantised_layers(base: nn.Module, adapter_name: str) -> list[tuple[Place, Adapter]]:
    """The quantised layers that an adapter is on, with it.

    Raises:
        ValueError: there are none, or an adapter is merged into one.
    """
    from ..core.adapter import Adapter
    from ..core.inlaid import places
    from ..core.place import Place

    found = [
        (place, p)
        for place in places(base)
        if isinstance(place, Place) and not place.site.store.dense and isinstance(p := place.adapters.get(adapter_name), Adapter)
    ]
    if not found:
        raise ValueError(
            f"No layer of adapter {adapter_name!r} is quantised, so nothing was lost that factors could make up for; on a base that is "
            "not, init_lora_weights='loftq' trains over a weight that is rounded by itself."
        )
    merged = next((place for place, _ in found if place.merged), None)
    if merged is not None:
        raise ValueError(f"{merged.path!r} has {', '.join(merged.merged)} merged into it; call `unmerge_adapter` first.")
    return found


@torch.no_grad()
def compensate(place: Place, p: Adapter, w: Tensor, root: Tensor | None = None, iterations: int = 1) -> None:
    """Start an adapter from what the layer's quantised weight lacks of ``w``.

    Args:
        w: the weight before quantisation, as the host keeps it.
        iterations: beyond the first, the host's weight is quantised again, each time from what the factors of the last one left over.
            Of all of them the best stays.

    Raises:
        ValueError: the method has no free factors A and B, or the host's weight cannot be quantised again.
    """
    site, method = p.site, p.method
    if not isinstance(method, Started) or not all(p.declared[name].trainable for name in method.names(site)):
        raise ValueError(_bound(p))
    tensors, r, scaling = method.tensors(p), method.rank_at(site), method.scaling
    before, store = [t.detach().clone() for t in tensors], site.store
    if iterations > 1 and (why := store.unwritable(site.module, site.name)):
        raise ValueError(f"{place.path!r} cannot be quantised a second time: {why} Use iterations=1.")
    wanted = precise(site.matrix(w.to(site.device)))
    if wanted.shape != site.shape:
        raise ValueError(f"{place.path}.{site.name} is of shape {tuple(w.shape)} originally and of {tuple(site.raw_shape)} in the model.")
    first = held = store.held(site.module, site.name)
    kept, least, product = None, float("inf"), None
    for _ in range(iterations):
        if product is not None:
            store.write(site.module, site.name, site.raw((wanted - product).float()))
        lost = wanted - precise(site.read()[0])
        a, b = best_factors(lost, r, scaling, root)
        product = scaling * (b @ a)
        left = float(weighted(lost - product, root).norm())
        if left < least:
            least, held, kept = left, store.held(site.module, site.name), (a, b)
    assert kept is not None
    if iterations > 1:
        store.put(site.module, site.name, held)
    a, b = alive(*kept, r)
    placed = method.placed(site, a, b)
    fit = all(new.shape == t.shape for t, new in zip(tensors, placed, strict=True))
    if fit:
        _set(p, tensors, placed)
        stored = full(site.read()[0])
        meant = stored + scaling * (b @ a).to(stored)
        fit = torch.allclose(method.fold(p, stored, None)[0], meant, rtol=1e-3, atol=1e-3 * float(meant.abs().max()))
    if not fit:
        _set(p, tensors, before)
        store.put(site.module, site.name, first)
        raise ValueError(_bound(p))


def _set(p: Adapter, tensors: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for tensor, value in zip(tensors, values, strict=True):
        tensor.copy_(value)
    # What depends on the factors, such as DoRA's magnitudes.
    p.method.start(p)


def _bound(p: Adapter) -> str:
    kind = f"{type(p.method).__name__} with {getattr(p.method, 'init_option', 'init_weights')}={getattr(p.method, 'init', None)!r}"
    return (
        f"{p.path!r} cannot start from what quantising lost: the update of {kind} is no product of free factors A and B. "
        "Use LoraConfig with init_lora_weights=True."
    )
