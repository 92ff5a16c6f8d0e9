"""On a quantised base: factors that make up for what quantising took from the weights.

With ``E = W - Q`` what was lost, ``x`` the layer's inputs and ``H`` the mean of ``x x'``, the best ``s B A`` of rank r for the layer's
outputs, in ``|(E - s B A) H^(1/2)|``, is ``U U' E``: what lies in the span of the r leading left singular vectors U of ``E H^(1/2)``.
With ``H = 1`` that is LoftQ, with the moments of given inputs CLoQ. No root is ever undone, so few inputs do no harm: what they do not
reach is made up for as far as it lies in that span.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.method import full
from .offset import alive
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
    names = _free(p)
    values: list[Any] = [getattr(p, name) for name in names]
    before, store = [v.detach().clone() for v in values], site.store
    if iterations > 1 and (why := store.unwritable(site.module, site.name)):
        raise ValueError(f"{place.path!r} cannot be quantised a second time: {why} Use iterations=1.")
    wanted = precise(site.matrix(w.to(site.device)))
    if wanted.shape != site.shape:
        raise ValueError(f"{place.path}.{site.name} is of shape {tuple(w.shape)} originally and of {tuple(site.raw_shape)} in the model.")
    r, scaling = values[0].shape[-2], method.scaling  # type: ignore[attr-defined]
    held, kept, least, product = None, None, float("inf"), None
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
    for value, new in zip(values, alive(*kept, r), strict=True):
        value.copy_(new)
    # What depends on the factors, such as DoRA's magnitudes.
    method.start(p)
    stored = full(site.read()[0])
    meant = stored + scaling * (full(values[1]) @ full(values[0]))
    if not torch.allclose(method.fold(p, stored, None)[0], meant, rtol=1e-3, atol=1e-3 * float(meant.abs().max())):
        for value, old in zip(values, before, strict=True):
            value.copy_(old)
        method.start(p)
        raise ValueError(_others(p))


def _free(p: Adapter) -> tuple[str, str]:
    """The names of A and B."""
    names: Callable[..., tuple[str, str]] | None = getattr(p.method, "names", None)
    if names is None or not hasattr(p.method, "scaling"):
        raise ValueError(_others(p))
    a, b = names(p.site)
    shape = (*getattr(p, b).shape[:-1], getattr(p, a).shape[-1])
    if shape != p.site.shape or not (p.declared[a].trainable and p.declared[b].trainable):
        raise ValueError(_others(p))
    return a, b


def _others(p: Adapter) -> str:
    kind = f"{type(p.method).__name__} with init_lora_weights={getattr(p.method, 'init_lora_weights', None)!r}"
    return (
        f"{p.path!r} cannot start from what quantising lost: the update of {kind} is no product of free factors A and B. "
        "Use LoraConfig with init_lora_weights=True."
    )
