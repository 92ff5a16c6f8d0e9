"""A time in which no adapter changes: what the layers of a mixed batch put side by side for one token serves the next ones."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.weak import WeakIdKeyDictionary

from ..kernels.mixed import Factors, Rows, Stack, Turn, add_few, add_segments, are_few, few, linear_in_turn, stack, turn

if TYPE_CHECKING:
    from .adapter import Adapter
    from .place import Place
    from .session import Row

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
        # How batches of these shapes go through the layer, and the factors side by side.
        self._turns: dict[torch.Size, Turn] = {}
        self._stack: Stack | None = None

    def after(self, y: Tensor, x: Tensor) -> Tensor:
        """The layer with the update, given what it makes of ``x`` without."""
        if y.requires_grad and y._is_view():
            # Autograd forbids writing into a view that a function returned.
            y = y.clone()
        flat, count = x.reshape(-1, x.shape[-1]), len(self.named)
        times = flat.shape[0] // count
        if self.rests and are_few(flat):
            if self._stack is None and (found := stack(self.factors)) is not None:
                # What is used often is worth laying out as products read it fastest.
                self._stack = found._replace(b=found.b.contiguous())
            if self._stack is not None:
                if (found := turn(few(self.rows, x.shape[0] // count, count, x.device), x.shape, self._stack)) is not None:
                    self._turns[x.shape] = found
                return add_few(y, flat, few(self.rows, times, count, x.device), self._stack)
        return add_segments(y, flat, self.rows, times, self.factors)

    def around(self, w: Tensor, bias: Tensor | None, x: Tensor) -> Tensor:
        """The linear layer of this weight and bias with the update, on ``x``; it rests."""
        how, factors = self._turns.get(x.shape), self._stack
        if how is None or factors is None or not x.dtype == w.dtype == factors.a.dtype or torch._C._is_any_autocast_enabled():
            return self.after(F.linear(x, w, bias), x)
        return linear_in_turn(x, w, bias, how, factors)


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
        adapters = [p for update in self._updates.values() for p in update.adapters]
        banks = dict.fromkeys(p.shared for p in adapters if p.shared is not None)
        holders = [*adapters, *(part for bank in banks for part in bank.modules())]
        self._tensors = [t for m in holders for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]
        first = {p.name: p for p in reversed(adapters)}
        self._first = [next(p.parameters()) for p in first.values()]
        self._session = next((place.session for place in self._updates), None)
        # Nobody counts what is written to the tensors of inference mode, and not all others have an address.
        counted = all(type(t) in (Tensor, nn.Parameter) and not t.is_inference() for t in self._tensors)
        self._before = self._state() if counted else None

    def goes_on(self) -> bool:
        """Whether the adapters are still as they were. What is written behind autograd's back, into ``.data``, is not seen."""
        return self._before is not None and self._before == self._state()

    def _state(self) -> list[Any]:
        revision = None if self._session is None else self._session.revision
        # Who sets ``.data`` sets that of all tensors of an adapter.
        return [revision, [t.data_ptr() for t in self._first], list(map(_version, self._tensors))]


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
