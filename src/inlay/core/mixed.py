"""One layer on a batch whose rows have adapters of their own: the host works once, for all rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernels.mixed import Factors, Selector, selector
from .additive import LowRank
from .method import Method
from .rest import Rest, Update
from .rows import Group, entries_a_row, put_back, taken
from .session import Row
from .site import Embedding, Linear, TransposedLinear

if TYPE_CHECKING:
    from .adapter import Adapter
    from .place import Place


def mixed(
    place: Place,
    call: Callable[..., Tensor],
    rows: tuple[Row, ...],
    groups: Sequence[Group],
    rest: Rest | None,
    x: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Tensor:
    """The layer on ``x``, each group of rows under its own adapters.

    Args:
        call: the host's forward.
        rows: what was named for each; ``x`` has as many entries in front, or a multiple.
        groups: the rows by their adapters at this place.
        rest: the time in which no adapter changes, if it is one.
    """
    times, device = entries_a_row((x,), len(rows))
    if not args and not kwargs and not torch.compiler.is_compiling() and (update := _low_rank(place, rows, groups, rest)) is not None:
        return update.after(call(x), x)
    size, whole = times * len(rows), None

    def of_all(mine: Selector) -> Tensor:
        # What the host makes of an input that no adapter has changed is computed for all groups together.
        nonlocal whole
        whole = call(x, *args, **kwargs) if whole is None else whole
        return _rows_of(whole, mine, size)

    if all(type(place.adapters[name].method).ahead is not Method.ahead for group in groups for name in group.names):
        return _once(place, lambda x: call(x, *args, **kwargs), groups, x, times)
    parts = []
    for group in groups:
        mine = selector(group.rows, times, device)
        own = taken(x, mine, size)

        def host(x: Tensor, *a: Any, mine: Selector = mine, own: Tensor = own, **k: Any) -> Tensor:
            return of_all(mine) if x is own else call(x, *a, **k)

        further = tuple(_rows_of(a, mine, size) for a in args), {key: _rows_of(v, mine, size) for key, v in kwargs.items()}
        with place.session.narrowed(group.rows):
            parts.append(place.stacked(host, False, group.names, own, *further))
    return put_back(groups, parts, times)


def _rows_of(value: Any, mine: Selector, size: int) -> Any:
    """These rows of what goes into a host or comes out: a tensor, or several."""
    if isinstance(value, (tuple, list, dict)):
        return tree_map(lambda v: taken(v, mine, size), value)
    return taken(value, mine, size)


def _once(place: Place, call: Callable[[Tensor], Any], groups: Sequence[Group], x: Tensor, times: int) -> Any:
    """A whole module that is called once: each group's adapters act before and behind it."""
    size, came, inputs = len(x), [], []
    for group in groups:
        own = taken(x, selector(group.rows, times, x.device), size)
        with place.session.narrowed(group.rows):
            for name in reversed(group.names):
                p = place.adapters[name]
                came.append(own)
                own = p.method.ahead(p, own)
        inputs.append(own)
    y, parts = call(put_back(groups, inputs, times)), []
    for group in reversed(groups):
        part = _rows_of(y, selector(group.rows, times, x.device), size)
        with place.session.narrowed(group.rows):
            for name in group.names:
                p = place.adapters[name]
                part = p.method.behind(p, came.pop(), part)
        parts.append(part)
    return put_back(groups, parts[::-1], times)


def adds_low_rank_alone(p: Adapter) -> bool:
    """Whether an adapter does nothing here but add ``s B A``."""
    known = p.__dict__.get("_adds_low_rank_alone")
    if known is None:
        method = p.method
        plain = isinstance(method, LowRank) and type(method).around is LowRank.around
        known = p.__dict__["_adds_low_rank_alone"] = plain and p.trained_bias is None and method.delta_bias(p) is None  # type: ignore[attr-defined]
    return known and not (p.training and p.method.dropout)  # type: ignore[attr-defined]


def _low_rank(place: Place, named: tuple[Row, ...], groups: Sequence[Group], rest: Rest | None) -> Update | None:
    """The update of each adapter, where all of them only add to a layer that multiplies the last axis."""
    site = place.site
    if site.batch or isinstance(site, Embedding) or not isinstance(site, (Linear, TransposedLinear)):
        return None
    found: dict[Adapter, list[int]] = {}
    for group in groups:
        for name in group.names:
            p = place.adapters[name]
            if p not in found and not adds_low_rank_alone(p):
                return None
            found.setdefault(p, []).extend(group.rows)
    rows = tuple(tuple(sorted(mine)) for mine in found.values())
    factors: list[Factors] = [(*p.method.factors(p), p.method.scaling * p.strength) for p in found]  # type: ignore[attr-defined]
    update = Update(named, list(found), rows, factors, rest is not None)
    if rest is not None:
        rest.learns(place, update)
    return update
