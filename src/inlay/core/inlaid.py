"""Flush: the host keeps its type, its place and its names.

An adapted layer is the same module with its class extended. A `Place` (or a module that is `Retrained`) is the only thing here that
has state; `Inlaid` is the thin class that asks it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import nn

from .adapter import Adapter
from .parallel import on_whole_tensors, split
from .place import host_class, read_now
from .retrained import AnyPlace, Retrained
from .rows import by_rows
from .session import Session


class Inlaid:
    """Mixed into the class of an adapted layer, in front of it."""

    _inlay: dict[str, AnyPlace]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.__dict__.get("_host_forward")
        try:
            call, places = super().forward if hook is None else hook, self._inlay  # type: ignore[misc]
            place = places.get(self._call_place)  # type: ignore[attr-defined]
        except (TypeError, AttributeError):
            # Another thread has just taken the last adapter out, and the host has its own class again.
            return self.forward(*args, **kwargs)
        if place is not None:
            if not args:
                # The host may be called by the name of its input.
                first = next(iter(kwargs))
                args, unnamed = (kwargs.pop(first),), call
                call = lambda x, *a, **k: unnamed(*a, **{first: x}, **k)  # noqa: E731
            return place.forward(call, hook is None, args[0], args[1:], kwargs)
        # By the class: the host may have its own again by now.
        return Inlaid._reading(self, next(iter(places.values())).session, call, args, kwargs)

    def _reading(self, session: Session, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        rows = session.choice().rows

        def run(names: tuple[str, ...], *a: Any, **k: Any) -> Any:
            with session.local(names):
                return Inlaid._reading(self, session, call, a, k)

        if rows is not None:
            if getattr(self, "batch_first", True) is False:
                raise ValueError("An adapter for each row needs the batch in front, and this attention has it behind (batch_first=False).")
            return by_rows(session, rows, run, args, kwargs)
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        token = read_now.set({})
        try:
            return call(*args, **kwargs)
        finally:
            read_now.reset(token)

    def __reduce_ex__(self, _: Any) -> Any:
        cls = type(self)
        return _revive, (cls._host, cls._reads, cls._call_place), self.__dict__  # type: ignore[attr-defined]


def _reader(name: str) -> property:
    def read(self: nn.Module) -> Any:
        stored = self._parameters[name]
        if hasattr(stored, "placements") and read_now.get() is None and not torch.compiler.is_compiling():
            # Not the host in its forward, but FSDP2, which looks after the shards that it put there.
            return stored
        for place in self.__dict__.get("_inlay", {}).values():
            reads = place.acts_now if isinstance(place, Retrained) else place.site.reads and name in (place.site.name, place.site.bias_name)
            if reads:
                return place.value(name)
        return stored

    return property(read)


@cache
def inlaid_class(host: type[nn.Module], reads: tuple[str, ...], call_place: str) -> type[nn.Module]:
    """``host`` extended: names in ``reads`` are what the adapters make of them, calls go through the place ``call_place``."""
    from .views import TunerLayer

    body = {name: _reader(name) for name in reads}
    body |= {"_host": host, "_reads": reads, "_call_place": call_place, "__module__": host.__module__, "__qualname__": host.__qualname__}
    return type(f"Inlaid{host.__name__}", (TunerLayer, Inlaid, host), body)


def _revive(host: type[nn.Module], reads: tuple[str, ...], call_place: str) -> nn.Module:
    return object.__new__(inlaid_class(host, reads, call_place))


class Seats(nn.ModuleDict):
    """The adapters of a host. A host that calls whatever modules it has (``nn.Sequential``) passes through."""

    def forward(self, x: Any) -> Any:
        return x


def inlay(module: nn.Module, place: AnyPlace) -> None:
    """Set a place into a host; a second place of the same host joins the first."""
    fresh = not isinstance(module, Inlaid)
    _hold(module, {**module.__dict__.get("_inlay", {}), place.name: place})
    if fresh:
        _take_over_hook(module)
        module.adapters = Seats()


def _hold(module: nn.Module, places: dict[str, AnyPlace]) -> None:
    """Have a host go by these places. Other threads may be in its forward: nothing that they look at is written to."""
    reads = []
    for p in places.values():
        if isinstance(p, Retrained):
            reads += [n for n in ("weight", "bias") if n in module._parameters]
        elif p.site.reads:
            reads += [n for n in (p.site.name, p.site.bias_name) if n is not None and n in module._parameters]
    called = "" if "" in places else next((n for n, p in places.items() if not p.site.reads), "none")  # type: ignore[union-attr]
    module.__dict__["_inlay"] = places
    module.__class__ = inlaid_class(host_class(module), tuple(reads), called)


def _take_over_hook(module: nn.Module) -> None:
    """A forward that someone put on the instance goes on to run: around ours (accelerate's hooks, tensor parallelism) or inside it."""
    own = vars(module)
    if "_old_forward" in own:
        own["_old_forward"] = types.MethodType(Inlaid.forward, module)
    elif "forward" in own and split(own["forward"]):
        own["_split_forward"] = own["forward"]
        own["_host_forward"], own["forward"] = on_whole_tensors(module, own["forward"], types.MethodType(Inlaid.forward, module))
    elif "forward" in own:
        own["_host_forward"] = own.pop("forward")


def lift(module: nn.Module, name: str) -> None:
    """Take a place out again; with the last one the host is what it was."""
    host, own = host_class(module), vars(module)
    remaining = {n: place for n, place in own["_inlay"].items() if n != name}
    if remaining:
        _hold(module, remaining)
        return
    # What it is called by goes first and what adapters are found by last, for the sake of threads that are in its forward.
    if "_old_forward" in own:
        own["_old_forward"] = types.MethodType(host.forward, module)
    if "_host_forward" in own:
        own["forward"] = own.get("_split_forward", own["_host_forward"])
    module.__class__ = host
    for attribute in ("_host_forward", "_split_forward", "_inlay"):
        own.pop(attribute, None)
    del module._modules["adapters"]


def bare(module: nn.Module) -> nn.Module:
    """An adapted layer as it is without adapters: a second module of the host's class over the same tensors."""
    host = host_class(module)
    twin = object.__new__(host)
    own = {k: v for k, v in vars(module).items() if k not in ("_inlay", "_host_forward", "_split_forward")}
    twin.__dict__ = own | {"_modules": {n: m for n, m in module._modules.items() if n != "adapters"}}
    if "_old_forward" in own:
        twin.__dict__["_old_forward"] = types.MethodType(host.forward, twin)
    if "_host_forward" in vars(module):
        twin.__dict__["forward"] = vars(module).get("_split_forward", vars(module)["_host_forward"])
    return twin


def seat(place: AnyPlace, module: nn.Module, name: str, adapter: nn.Module) -> None:
    """Give an adapter its name at a place. Raw parameters of one host share the adapter's name and keep their own below it."""
    place.adapters[name] = adapter  # type: ignore[assignment]
    place.session.revision += 1
    if isinstance(adapter, Adapter):
        adapter.name, adapter.session = name, place.session
    adapter.train(module.training)
    table: nn.ModuleDict = module.adapters  # type: ignore[assignment]
    if place.name in ("", "weight"):
        table[name] = adapter
    else:
        if name not in table:
            table[name] = nn.ModuleDict()
        table[name][place.name] = adapter  # type: ignore[index]


def unseat(place: AnyPlace, module: nn.Module, name: str) -> None:
    """Take an adapter away from a place, and the place away with the last."""
    if place.merged:
        place.unmerge()
    del place.adapters[name]
    place.session.revision += 1
    table: nn.ModuleDict = module.adapters  # type: ignore[assignment]
    if place.name in ("", "weight"):
        del table[name]
    else:
        del table[name][place.name]  # type: ignore[union-attr]
        if not table[name]:
            del table[name]
    if not place.adapters:
        lift(module, place.name)


def host_of(place: AnyPlace) -> nn.Module:
    return place.module if isinstance(place, Retrained) else place.site.module


def places(model: nn.Module) -> Iterator[AnyPlace]:
    """Every adapted place of a model, in the order of its modules.

    The adapters' own modules are passed by, so that the way does not grow with each adapter that is loaded.
    """
    seen: set[nn.Module] = set()
    ahead = [model]
    while ahead:
        module = ahead.pop()
        if module in seen:
            continue
        seen.add(module)
        children = module._modules
        if isinstance(module, Inlaid):
            yield from list(module._inlay.values())
            children = {name: child for name, child in children.items() if name != "adapters"}
        ahead += [child for child in reversed(children.values()) if child is not None]


def adapters_of(model: nn.Module, name: str) -> list[Adapter]:
    """The adapters of one name at all weights of a model."""
    return [p for place in places(model) if isinstance(p := place.adapters.get(name), Adapter)]


def prompts_of(model: nn.Module) -> Any:
    """The adapters of a `PeftModel` that act on inputs, by name."""
    return model._modules.get("prompt_encoder") or {}


def session_of(model: nn.Module) -> Session | None:
    """The session of a model that has adapters."""
    found = model.__dict__.get("_inlay_session")
    if isinstance(found, Session):
        return found
    return next((p.session for p in places(model)), None)
