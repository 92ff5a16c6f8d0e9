"""A model that serves more adapters than memory should hold: loaded on first use, the least recently used leave first."""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .core.config import nearest
from .core.inlaid import places, prompts_of
from .core.session import BASE, names_of, rows_of
from .formats.folder import CONFIG_NAME

if TYPE_CHECKING:
    from .model import PeftModel


class AdapterCache:
    """Adapters of one model by name, from a folder of adapter folders.

        cache = AdapterCache(model, "adapters", max_bytes=2_000_000_000)
        with cache.use("french"):
            model.generate(**inputs)
        with cache.rows(["french", "legal", "__base__"]):
            model(**batch)

    Choices are local to the thread or task, as those of ``model.use_adapters`` are. What some thread is using stays.

    Args:
        model: has at least one adapter of its own, which the cache leaves alone.
        folder: holds a folder for each adapter; or a function that gives the path of a name.
        max_bytes: of the adapters' tensors in memory; None for no limit.
        max_adapters: how many may be loaded; None for no limit.
        options: of ``model.load_adapter``.
    """

    def __init__(
        self,
        model: PeftModel,
        folder: str | Path | Callable[[str], str | Path],
        *,
        max_bytes: int | None = None,
        max_adapters: int | None = None,
        **options: Any,
    ) -> None:
        self.model, self.max_bytes, self.max_adapters, self._options = model, max_bytes, max_adapters, options
        self._path = folder if callable(folder) else lambda name: Path(folder) / name
        self._folder = None if callable(folder) else Path(folder)
        self._sizes: OrderedDict[str, int] = OrderedDict()
        self._used: Counter[str] = Counter()
        self._pinned: set[str] = set()
        self._lock = threading.RLock()
        self.hits, self.misses = 0, 0

    # ---- what there is ------------------------------------------------------------------------------------------------
    def __contains__(self, name: str) -> bool:
        return name in self._sizes

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def loaded(self) -> list[str]:
        """The names in memory, the least recently used first."""
        return list(self._sizes)

    @property
    def nbytes(self) -> int:
        """The size of what is loaded."""
        return sum(self._sizes.values())

    def available(self) -> list[str]:
        """The names in the folder, sorted."""
        if self._folder is None:
            return sorted(self._sizes)
        return sorted(path.parent.name for path in self._folder.glob(f"*/{CONFIG_NAME}"))

    # ---- using --------------------------------------------------------------------------------------------------------
    @contextmanager
    def use(self, *names: str) -> Iterator[PeftModel]:
        """These adapters, in this order, in this thread or task, until the block ends; loaded where they are not."""
        with self._held(names), self.model.use_adapters(*names):
            yield self.model

    @contextmanager
    def rows(self, rows: Sequence[str | Sequence[str]]) -> Iterator[PeftModel]:
        """For each row of a batch its adapter, several, or ``"__base__"``."""
        each = rows_of(rows)
        with self._held(dict.fromkeys(name for row in each for name in names_of(row))), self.model.session.local(rows=each):
            yield self.model

    def load(self, name: str) -> None:
        """Have an adapter in memory.

        Raises:
            ValueError: there is no such adapter, its name is taken, or what is in use and pinned leaves no room.
        """
        with self._held((name,)):
            pass

    def pin(self, *names: str) -> None:
        """Load adapters and keep them, whatever else is used."""
        with self._held(names):
            self._pinned.update(names)

    def unpin(self, *names: str) -> None:
        self._pinned.difference_update(names)

    def evict(self, name: str) -> None:
        """Take an adapter out of memory.

        Raises:
            ValueError: it is in use, or not loaded.
        """
        with self._lock:
            if name not in self._sizes or self._used[name]:
                raise ValueError(f"Adapter {name!r} is {'in use' if name in self._sizes else 'not loaded'}.")
            self._pinned.discard(name)
            self._drop(name)

    @contextmanager
    def _held(self, names: Sequence[str] | dict[str, None]) -> Iterator[None]:
        """Loaded, and not to be taken away until the block ends."""
        held: list[str] = []
        try:
            with self._lock:
                for name in names:
                    if name in self._sizes and name not in self.model.peft_config:
                        # Somebody else took it out.
                        del self._sizes[name]
                    if name in self._sizes:
                        self.hits += 1
                    else:
                        self._bring(name)
                    self._sizes.move_to_end(name)
                    self._used[name] += 1
                    held.append(name)
            yield
        finally:
            with self._lock:
                self._used.subtract(held)

    def _bring(self, name: str) -> None:
        path = Path(self._path(name))
        if name == BASE or not (path / CONFIG_NAME).is_file():
            raise ValueError(f"There is no adapter {name!r} at {path}.{nearest(name, self.available())}")
        if name in self.model.peft_config:
            raise ValueError(f"The model has an adapter {name!r} already, which is not this cache's; rename one of the two.")
        self.misses += 1
        self.model.load_adapter(str(path), name, **self._options)
        self._sizes[name] = _bytes_of(self.model, name)
        while self._over():
            victim = next((n for n in self._sizes if n != name and not self._used[n] and n not in self._pinned), None)
            if victim is None:
                size = self._sizes[name]
                self._drop(name)
                raise ValueError(
                    f"There is no room for adapter {name!r} of {size:,} bytes: {self.nbytes:,} bytes in {len(self)} adapters are in use or "
                    "pinned. Allow more with `max_bytes` or `max_adapters`, or unpin some."
                )
            self._drop(victim)

    def _over(self) -> bool:
        too_many = self.max_adapters is not None and len(self._sizes) > self.max_adapters
        return too_many or (self.max_bytes is not None and self.nbytes > self.max_bytes)

    def _drop(self, name: str) -> None:
        del self._sizes[name]
        self.model.delete_adapter(name)


def _bytes_of(model: PeftModel, name: str) -> int:
    """The size of all tensors that an adapter brings along: on weights, in retrained modules, in prompts."""
    found: list[Any] = [place.adapters[name] for place in places(model.get_base_model()) if name in place.adapters]
    prompts = prompts_of(model)
    found += [prompts[name]] if name in prompts else []
    return sum({id(t): t.nbytes for m in found for t in (*m.parameters(), *m.buffers())}.values())
