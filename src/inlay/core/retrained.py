"""A module that adapters replace by copies of it that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .parallel import placed_like
from .place import Place
from .rows import by_rows
from .session import Session


class Retrained:
    """One module that adapters replace by retrained copies of it: a classifier's head, an embedding."""

    name = ""

    def __init__(self, session: Session, path: str, module: nn.Module) -> None:
        self.session, self.path, self.module = session, path, module
        self.adapters: dict[str, nn.Module] = {}
        self.in_file = path
        self.merged: tuple[str, ...] = ()
        self.kept: dict[tuple[str, str, bool], Tensor | None] | None = None

    def here(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n in self.adapters)[-1:]

    def forward(self, call: Callable[..., Any], _: bool, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = self.session.choice()
        if choice.rows is None:
            return self._chosen(call, choice.names, (x, *args), kwargs)

        def run(names: tuple[str, ...], *a: Any, **k: Any) -> Any:
            with self.session.local(names):
                return self._chosen(call, names, a, k)

        return by_rows(self.session, choice.rows, run, (x, *args), kwargs)

    def _chosen(self, call: Callable[..., Any], names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = self.here(names)
        if names == self.merged:
            return call(*args, **kwargs)
        if names:
            return self.adapters[names[-1]](*args, **kwargs)
        assert self.kept is not None
        own = {f"{path}.{key}" if path else key: t for (path, key, _), t in self.kept.items() if t is not None}
        return torch.func.functional_call(self.module, own, args, kwargs)

    def beneath(self, places: Mapping[str, Place | Retrained]) -> Place | None:
        """The place of the same module's own weight, where it has one that goes through the module's call."""
        return next((p for p in places.values() if isinstance(p, Place) and not p.site.reads), None)

    @property
    def acts_now(self) -> bool:
        """Whether an adapter that is chosen here and now replaces the module."""
        return bool(self.here(self.session.choice().names)) or bool(self.merged)

    def value(self, name: str) -> Tensor | None:
        """What code that reads the host's weight or bias itself finds there: that of the module which acts now."""
        names = self.here(self.session.choice().names)
        module = self.adapters[names[-1]] if names and names != self.merged else self.module
        return module._parameters.get(name)

    def merge(self, names: Sequence[str], check: bool = False) -> None:
        names = self.here(names)
        if names == self.merged or not names:
            return
        copied = self.adapters[names[-1]]
        if check and not all(q.isfinite().all() for q in copied.parameters()):
            raise ValueError(f"The retrained {self.path!r} of {names[-1]!r} is not finite; the adapter seems broken.")
        first, kept = self.kept is None, {}
        for path, part in copied.named_modules():
            own = self.module.get_submodule(path)
            for key, value in [*part._parameters.items(), *part._buffers.items()]:
                is_param = key in part._parameters
                table: Any = own._parameters if is_param else own._buffers
                old = table[key]
                kept[path, key, is_param] = old
                if value is None or old is None:
                    continue
                data = placed_like(old, value)
                table[key] = nn.Parameter(data, requires_grad=False) if is_param else data
        if first:
            self.kept = kept
        self.merged = names

    def unmerge(self) -> None:
        for (path, key, is_param), value in (self.kept or {}).items():
            own = self.module.get_submodule(path)
            (own._parameters if is_param else own._buffers)[key] = value  # type: ignore[assignment]
        self.settle()

    def settle(self) -> None:
        self.kept, self.merged = None, ()


AnyPlace = Place | Retrained
