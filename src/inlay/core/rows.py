"""Rows of one batch that have adapters of their own: which rows go together, and each group run on its own rows.

Rows of one adapter that stand side by side are a slice of the batch, which costs nothing to take; `in_order` puts a whole batch
so at the model's entry. Rows in any other order are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..kernels.mixed import Selector, positions, selector
from .session import Row, Session, names_of, rows_of


class Group(NamedTuple):
    """Rows that have the same adapters.

    Attributes:
        names: the adapters, in the order in which they act; none for the base.
        rows: positions in the batch, ascending.
    """

    names: tuple[str, ...]
    rows: tuple[int, ...]


def grouped(rows: tuple[Row, ...], known: Mapping[str, Any] | None = None) -> tuple[Group, ...]:
    """The rows by their adapters, in the order of first appearance.

    Args:
        known: the adapters that count; None stands for all.
    """
    # The compiler sees through a cache and warns of it.
    if torch.compiler.is_compiling():
        return _group(rows, known)
    # Of the adapters that are loaded only those are looked at that some row names.
    return _grouped(rows, None if known is None else frozenset(known.keys() & _named(rows)))


@lru_cache(512)
def _named(rows: tuple[Row, ...]) -> frozenset[str]:
    return frozenset(name for row in rows for name in names_of(row))


def _group(rows: tuple[Row, ...], known: Collection[str] | None) -> tuple[Group, ...]:
    found: dict[tuple[str, ...], list[int]] = {}
    for i, row in enumerate(rows):
        names = tuple(n for n in names_of(row) if known is None or n in known)
        found.setdefault(names, []).append(i)
    return tuple(Group(names, tuple(positions)) for names, positions in found.items())


_grouped = lru_cache(512)(_group)


def check_count(tensors: Iterable[Any], count: int, inside: bool = True) -> None:
    """
    Args:
        inside: of the model, where a row may have become several (beams, heads, patches).

    Raises:
        ValueError: the batch in front of the first tensor is not that of the rows that were named.
    """
    first = next((t for t in tensors if isinstance(t, Tensor) and t.ndim), None)
    if first is not None and first.shape[0] != count and (not inside or first.shape[0] % count):
        raise ValueError(f"{count} adapter names were given for a batch of {first.shape[0]}; give one for each row.")


def entries_a_row(tensors: Sequence[Any], count: int) -> tuple[int, torch.device]:
    """How many entries in front of the tensors belong to a row, and where the tensors are.

    Raises:
        ValueError: the batch is no multiple of the rows that were named.
    """
    check_count(tensors, count)
    first = next(t for t in tensors if isinstance(t, Tensor) and t.ndim)
    return first.shape[0] // count, first.device


def taken(value: Any, rows: Selector, size: int) -> Any:
    """These rows of a tensor that has the batch in front; anything else as it is."""
    return value[rows] if isinstance(value, Tensor) and value.ndim and value.shape[0] == size else value


def put_back(groups: Sequence[Group], parts: Sequence[Any], times: int) -> Any:
    """The outputs of the groups as one batch in its own order; outputs may be nested."""
    order = tuple(row for group in groups for row in group.rows)
    ordered = order == tuple(range(len(order)))

    def join(*found: Any) -> Any:
        if not isinstance(found[0], Tensor):
            return found[0]
        together = torch.cat(found)
        if ordered:
            return together
        back = tuple(sorted(range(len(order)), key=order.__getitem__))
        return together[selector(back, times, together.device)]

    return join(*parts) if all(isinstance(part, Tensor) for part in parts) else tree_map(join, *parts)


def by_rows(session: Session, rows: tuple[Row, ...], run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run each group of rows, ``run(names, *args, **kwargs)``, on its rows of every argument that has the batch in front.

    Raises:
        ValueError: the batch is no multiple of the rows that were named.
    """
    groups, tensors = grouped(rows), (*args, *kwargs.values())
    if len(groups) == 1:
        check_count(tensors, len(rows))
        return run(groups[0].names, *args, **kwargs)
    times, device = entries_a_row(tensors, len(rows))
    size, parts = times * len(rows), []
    for group in groups:
        mine = selector(group.rows, times, device)
        with session.narrowed(group.rows):
            parts.append(run(group.names, *(taken(a, mine, size) for a in args), **{k: taken(v, mine, size) for k, v in kwargs.items()}))
    return put_back(groups, parts, times)


# ---- at the model's entry --------------------------------------------------------------------------------------------------
# Arguments that have no batch in front, whatever their length.
WITHOUT_BATCH = frozenset({"cache_position", "logits_to_keep", "head_mask", "decoder_head_mask", "cross_attn_head_mask"})
# What a row of text may have any number of: there may be as many as rows, and yet not one for each.
_BESIDE_TEXT = ("pixel_", "image_", "video_", "audio_", "input_features", "feature_")
# What depends on the order of the rows in a way that is not ours to know.
_KEEPS_ORDER = frozenset(
    {"past_key_values", "streamer", "assistant_model", "return_dict_in_generate", "prefix_allowed_tokens_fn", "logits_processor",
     "stopping_criteria", "encoder_outputs"}
)  # fmt: skip


class Order:
    """The rows of one batch put side by side by their adapters, and their outputs put back.

    Attributes:
        rows: the rows in the new order.
    """

    def __init__(self, rows: Sequence[Row], places: tuple[int, ...]) -> None:
        self.rows = tuple(rows[i] for i in places)
        self._places = places
        self._back = tuple(sorted(range(len(places)), key=places.__getitem__))

    @staticmethod
    def of(named: Sequence[str | Sequence[str]], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Order | None:
        """The order for a call of the model; None where the rows stand right already, or where it is not sure what to move."""
        rows = rows_of(named)
        places = tuple(row for group in grouped(rows) for row in group.rows)
        if torch.compiler.is_compiling() or places == tuple(range(len(places))):
            return None
        if any(kwargs.get(name) is not None for name in _KEEPS_ORDER):
            return None
        if kwargs.get("input_ids") is not None and any(v is not None and k.startswith(_BESIDE_TEXT) for k, v in kwargs.items()):
            return None
        if getattr(kwargs.get("position_ids"), "ndim", 2) > 2:
            # Their axes (time, height, width) are in front.
            return None
        given = [*args, *(v for k, v in kwargs.items() if k not in WITHOUT_BATCH)]
        tensors = [v for v in given if isinstance(v, Tensor)]
        if not all(isinstance(v, (Tensor, int, float, str, bool, type(None))) for v in given):
            return None
        plain = all(t.ndim == 0 or t.shape[0] in (len(rows), 1) for t in tensors)
        return Order(rows, places) if plain else None

    def into(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments in the new order."""
        moved = {k: v if k in WITHOUT_BATCH else self._move(v, self._places) for k, v in kwargs.items()}
        return tuple(self._move(a, self._places) for a in args), moved

    def out_of(self, output: Any) -> Any:
        """The model's output in the order of the caller: a tensor, a tuple or a dictionary of transformers."""
        if hasattr(output, "items"):
            for key, value in list(output.items()):
                output[key] = self._restored(value)
            return output
        return tuple(map(self._restored, output)) if type(output) is tuple else self._restored(output)

    def _restored(self, value: Any) -> Any:
        if hasattr(value, "reorder_cache"):
            value.reorder_cache(torch.tensor(self._back))
            return value
        return tree_map(lambda v: self._move(v, self._back), value)

    def _move(self, value: Any, places: tuple[int, ...]) -> Any:
        if not isinstance(value, Tensor) or not value.ndim or value.shape[0] < len(places) or value.shape[0] % len(places):
            return value
        return value[positions(places, value.shape[0] // len(places), value.device)]
