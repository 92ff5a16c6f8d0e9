"""Routing: several adapters at one layer, of which each token gets its own shares.

``y = W x + sum_k g_k (E_k(x) - W x)``, where ``E_k`` is the layer under the k-th adapter, of any method, and ``g_k`` the shares that
a router gives. Where all of them add ``s B A`` and nothing else, that is one product of their factors side by side.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.additive import LowRank, meet
from ..core.inner import Inner
from ..core.mixed import adds_low_rank_alone
from ..core.place import Place
from ..core.site import Linear, Site, TransposedLinear

Factors = tuple[Tensor, Tensor]


def takes_tokens(site: Site) -> bool:
    """Whether each entry of a layer's input and output is a token's."""
    return isinstance(site, (Linear, TransposedLinear))


def place_of(p: Adapter) -> Place:
    """Where an adapter sits, together with others."""
    return p.site.module.__dict__["_inlay"][p.site.name]


def factors_of(expert: Adapter) -> Factors | None:
    """What an adapter adds as ``A (r, in)`` and ``B (out, r)``, if that is all it does; the scaling is in B."""
    method = expert.method
    if not isinstance(method, LowRank) or not adds_low_rank_alone(expert):
        return None
    a, b = method.factors(expert)
    return a, method.scaling * expert.strength * b


def routed(
    inner: Inner, x: Tensor, y: Tensor, experts: Sequence[Adapter], gates: Tensor, factors: Sequence[Factors] | None = None
) -> Tensor:
    """What the experts add to a layer's output.

    Args:
        y: what the layer gives without them, ``(*, out)``.
        gates: the share of each, ``(*, experts)``.
        factors: what the experts add, where that is not what they add by themselves.

    Returns:
        ``(*, out)`` in the dtype of the factors.
    """
    gates = _along(gates, y)
    found = [factors_of(e) for e in experts] if factors is None else list(factors)
    low_rank = [f for f in found if f is not None]
    if len(low_rank) == len(experts):
        ranks = [a.shape[-2] for a, _ in low_rank]
        x, a, b = meet(x, torch.cat([a for a, _ in low_rank], -2), torch.cat([b for _, b in low_rank], -1))
        shares = torch.cat([gates[..., k : k + 1].expand(*gates.shape[:-1], r) for k, r in enumerate(ranks)], -1)
        return inner.site.up(inner.site.down(x, a) * shares.to(a.dtype), b)
    # The host works once, for all of them.
    known = Inner(inner.site, lambda z: y if z is x else inner(z), inner.params, further=(inner.args, inner.kwargs))
    parts = [(known.then(e)(x) - y) * gates[..., k : k + 1].to(y.dtype) for k, e in enumerate(experts)]
    return torch.stack(parts).sum(0)


def _along(gates: Tensor, y: Tensor) -> Tensor:
    """The gates ``(*, experts)`` for the tokens of an output ``(*, out)``, which may be flattened or only the last of each row."""
    tokens = y.shape[:-1]
    if gates.shape[:-1] == tokens:
        return gates
    if gates.shape[:-1].numel() == tokens.numel():
        return gates.reshape(*tokens, -1)
    if len(tokens) == 2 and gates.ndim == 3 and len(gates) == tokens[0] and gates.shape[1] > tokens[1]:
        return gates[:, -tokens[1] :]
    raise ValueError(f"A router gave shares for tokens {tuple(gates.shape[:-1])}, and the layer has {tuple(tokens)}.")
