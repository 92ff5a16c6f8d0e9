"""A time in which no adapter changes: what the layers of a mixed batch put side by side for one token serves the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.mixed import Factors, Few, Rows, Stack, add_few, add_segments, are_few, few, linear_plus_few, stack

if TYPE_CHECKING:
    from .adapter import Adapter
    from .place import Place
    from .session import Row

_how = attrgetter("strength", "training", "method")
_version = attrgetter("_version")


class Update:
    """What the adapters of a layer add to the rows of a batch.

    Attributes:
        named: for each row.
        adapters, rows, factors: each adapter, its rows and its factors.
        rests: none of them changes, so that factors are kept as they have been put side by side.
    """

    def __init__(self, named: tuple[Row, ...], adapters: Sequence[Adapter], rows: Rows, factors: list[Factors], rests: bool) -> None:
        self.named, self.adapters, self.rows, self.factors, self.rests = named, adapters, rows, factors, rests
        # Where the tokens are, by their number, and the factors side by side.
        self._few: dict[int, Few] = {}
        self._stack: Stack | None = None

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer with the update, given what it makes of ``x`` without."""
        if y.requires_grad and y._is_view():
            # Autograd forbids writing into a view that a function returned.
            y = y.clone()
        flat = x.reshape(-1, x.shape[-1])
        tokens = flat.shape[0]
        if self.rests and are_few(flat):
            if self._stack is None and (found := stack(self.factors)) is not None:
                # What is used often is worth laying out as products read it fastest.
                self._stack = found._replace(b=found.b.contiguous())
            if self._stack is not None:
                where = self._few[tokens] = few(self.rows, tokens // len(self.named), len(self.named), x.device)
                return add_few(y, flat, where, self._stack)
        return add_segments(y, flat, self.rows, tokens // len(self.named), self.factors)

    def around(self, w: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The linear layer of this weight and bias with the update, on ``x``; it rests."""
        flat = x.reshape(-1, x.shape[-1])
        where, factors = self._few.get(flat.shape[0]), self._stack
        apart = where is None or where.each is None or factors is None or not x.dtype == w.dtype == factors.a.dtype
        if apart or torch.is_autocast_enabled(x.device.type):
            return self.after(F.linear(x, w, bias), x)
        return linear_plus_few(flat, w, bias, where, factors).view(*x.shape[:-1], -1)  # type: ignore[arg-type]


class Rest:
    """A time in which no adapter changes. It takes as much memory as the factors of the adapters that some row names."""

    def __init__(self) -> None:
        self._updates: dict[Place, Update] = {}
        self._before: list[Any] | None = None

    def knows(self, place: Place, named: tuple[Row, ...]) -> Update | None:
        """What its adapters add to a layer where the rows have these names."""
        found = self._updates.get(place)
        return found if found is not None and found.named == named else None

    def learns(self, place: Place, update: Update) -> None:
        self._updates[place], self._before = update, None

    def pauses(self) -> None:
        """Take down how the adapters are."""
        if self._before is not None:
            return
        self._seats = [(place.adapters, p.name) for place, update in self._updates.items() for p in update.adapters]
        self._adapters = [p for update in self._updates.values() for p in update.adapters]
        banks = dict.fromkeys(p.shared for p in self._adapters if p.shared is not None)
        holders = [*self._adapters, *(part for bank in banks for part in bank.modules())]
        self._tensors = [t for m in holders for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        self._first = [next(update.adapters[0].parameters()) for update in self._updates.values()]
        # Nobody counts what is written to the tensors of inference mode, and not all others have an address.
        counted = all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in self._tensors)
        self._before = self._state() if counted else None

    def goes_on(self) -> bool:
        """Whether the adapters are still as they were. What is written behind autograd's back, into ``.data``, is not seen."""
        return self._before is not None and self._before == self._state()

    def _state(self) -> list[Any]:
        seated = [table.get(name) for table, name in self._seats] == self._adapters
        # What moves a model moves all of it.
        moved = [t.data_ptr() for t in self._first]
        return [seated, moved, list(map(_how, self._adapters)), list(map(_version, self._tensors))]


_of_caches = WeakIdKeyDictionary()


def rest_with(cache: Any) -> Rest | None:
    """The time of rest while a cache of keys and values is handed on: the adapters have made them as they are.

    None where such a cache is not known again (a tuple).
    """
    try:
        rest = _of_caches.get(cache)
        if rest is None or not rest.goes_on():
            rest = _of_caches[cache] = Rest()
    except TypeError:
        return None
    return rest
