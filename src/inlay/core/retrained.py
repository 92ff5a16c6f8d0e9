"""A module that adapters replace by copies of it that learn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

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
        # The module as it was, while another one's values are merged into it.
        self.own: nn.Module | None = None

    def here(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n in self.adapters)[-1:]

    def forward(self, call: Callable[..., Any], bare: bool, x: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        choice = self.session.choice()
        if choice.rows is None:
            return self._chosen(call, bare, choice.names, x, *args, **kwargs)

        def run(names: tuple[str, ...], x: Any, *a: Any, **k: Any) -> Any:
            with self.session.local(names):
                return self._chosen(call, bare, names, x, *a, **k)

        return by_rows(self.session, choice.rows, run, (x, *args), kwargs)

    def _chosen(self, call: Callable[..., Any], bare: bool, names: Sequence[str], x: Any, *args: Any, **kwargs: Any) -> Any:
        mine = self.here(names)
        if mine:
            return call(x, *args, **kwargs) if mine == self.merged else self.adapters[mine[-1]](x, *args, **kwargs)
        # Other adapters may change the weight of the module that this one replaces.
        places, own = self.module.__dict__.get("_inlay", {}), self.own
        beneath = self.beneath(places)
        if own is not None:
            call, bare = self._read(own, places, names), False
            beneath = None if beneath is None else beneath.on(own)
        return call(x, *args, **kwargs) if beneath is None else beneath.forward(call, bare, x, args, kwargs)

    def _read(self, own: nn.Module, places: Mapping[str, AnyPlace], names: Sequence[str]) -> nn.Module:
        """The module as it was, with what other adapters make of a weight that it reads itself."""
        for place in places.values():
            if isinstance(place, Place) and place.site.reads and place.here(names):
                there = place.on(own)
                return _with(own, {f".{n}": there.value(n) for n in (there.site.name, there.site.bias_name) if n is not None})
        return own

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
            self.own = _with(copied, {f"{path}.{key}": tensor for (path, key, _), tensor in kept.items()})
        self.merged = names

    def unmerge(self) -> None:
        for (path, key, is_param), value in (self.kept or {}).items():
            own = self.module.get_submodule(path)
            (own._parameters if is_param else own._buffers)[key] = value  # type: ignore[assignment]
        self.settle()

    def settle(self) -> None:
        self.kept, self.merged, self.own = None, (), None


def _with(module: nn.Module, tensors: Mapping[str, Tensor | None], path: str = "") -> nn.Module:
    """A second module like this one with other tensors; the names of its own begin with a dot."""
    other = object.__new__(type(module))
    other.__dict__ = dict(vars(module))
    for table in ("_parameters", "_buffers"):
        other.__dict__[table] = {key: tensors.get(f"{path}.{key}", q) for key, q in vars(module)[table].items()}
    within = f"{path}." if path else ""
    other.__dict__["_modules"] = {key: None if m is None else _with(m, tensors, within + key) for key, m in module._modules.items()}
    return other


AnyPlace = Place | Retrained
