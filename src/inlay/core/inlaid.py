"""Flush: the host keeps its type, its place and its names.

An adapted layer is the same module with its class extended. `Place` is one adapted weight (or one retrained module) of a host
and the only thing here that has state; `Inlaid` is the thin class that asks it.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.frozen import frozen_linear
from .method import Additive, Method, Param, biased, folded, full, generator_for
from .rows import by_rows, grouped
from .session import Session
from .site import Embedding, Linear, Site, TransposedLinear


class Adapter(nn.Module):
    """The tensors of one adapter at one site, named as in HF's files.

    Attributes:
        method: the configuration as it holds for this site.
        path: the name of the adapted weight in the model.
        strength: 0 is the base, 1 the adapter, 2 doubles what it does.
        bank_at: the module and the weight at which what the layers share is registered; None where that is here.
        name, session: the adapter's name and its model's session, once it has been set in.
        trained_bias: a retrained copy of the host's bias, or None.
    """

    trained_bias: nn.Parameter | None
    session: Session | None

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def __init__(
        self,
        method: Method,
        site: Site,
        path: str,
        *,
        dtype: torch.dtype,
        device: torch.device,
        shared: nn.Module | None = None,
        bank_at: tuple[str, str] | None = None,
        train_bias: bool = False,
    ) -> None:
        super().__init__()
        self.method, self.site, self.path, self.strength = method, site, path, method.strength
        self.bank_at, self.name, self.session = bank_at, "", None
        for name, param in self.declared.items():
            tensor = _initial(param, site, generator_for(method.seed, path, name), dtype, device)
            if param.trainable:
                self.register_parameter(name, nn.Parameter(tensor))
            else:
                self.register_buffer(name, tensor, persistent=param.persistent)
        # A tuple hides the common part from registration everywhere but on the first layer.
        self._shared = (shared,)
        if shared is not None and bank_at is None:
            self.bank = shared
        bias = site.bias() if train_bias else None
        self.trained_bias = None if bias is None else nn.Parameter(bias.detach().to(device, dtype, copy=True))

    def materialise(self) -> None:
        """Give initial values to tensors that are still on the meta device."""
        method, site, incomplete, underived = self.method, self.site, False, False
        for table in (self._parameters, self._buffers):
            for name, tensor in table.items():
                if tensor is None or tensor.device.type != "meta":
                    continue
                incomplete |= table is self._parameters
                underived |= name in self._non_persistent_buffers_set or (name in self.declared and self.declared[name].optional)
                if name == "trained_bias":
                    value = site.bias().detach().to(tensor.dtype, copy=True)  # type: ignore[union-attr]
                else:
                    value = _initial(self.declared[name], site, generator_for(method.seed, self.path, name), tensor.dtype, site.device)
                if table is self._parameters:
                    value = nn.Parameter(value, requires_grad=tensor.requires_grad)
                table[name] = value  # type: ignore[assignment]
        if underived:
            method.derive(self)
        if incomplete:
            method.start(self)

    @property
    def declared(self) -> dict[str, Param]:
        """What the method keeps here, by name."""
        found = self.__dict__.get("_declared")
        if found is None:
            found = self.__dict__["_declared"] = self.method.params(self.site)
        return found

    def __getstate__(self) -> dict[str, Any]:
        # Declarations hold functions, which do not travel; they are made again from the method.
        return {k: v for k, v in self.__dict__.items() if k != "_declared"}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Adapter:
        def keeping_digits(t: Tensor) -> Tensor:
            # A base that is stored in 8 bits (diffusers does so between two steps) takes its layers' children with it.
            to = fn(t.new_empty(0))
            if t.is_floating_point() and to.is_floating_point() and to.dtype.itemsize == 1 < t.dtype.itemsize:
                return t.to(to.device)
            return fn(t)

        return super()._apply(keeping_digits, recurse)  # type: ignore[return-value]

    @property
    def shared(self) -> Any:
        return self._shared[0]

    @property
    def call(self) -> dict[str, Tensor]:
        """What `Method.given` found in the running call of the model; empty where the layer is called by itself."""
        return {} if self.session is None else self.session.call.get(self.name, {})

    def extra_repr(self) -> str:
        return type(self.method).__name__


def _initial(param: Param, site: Site, generator: torch.Generator, dtype: torch.dtype, device: torch.device) -> Tensor:
    if param.dtype is not None:
        dtype = param.dtype
    if device.type == "meta":
        return torch.empty(param.shape(site), dtype=dtype, device=device)
    start = torch.empty(param.shape(site), dtype=param.dtype or torch.float32)
    param.init(start, generator)
    return start.to(device, dtype)


class Inner:
    """The layer so far: what it does to an input, and which weight and bias that amounts to.

    Attributes:
        dense: weight and bias of an ordinary linear layer, for which a kernel may stand.
        bias: gives the bias without the weight, which a quantised host would have to restore.
        stored: what gives the weight of a quantised linear layer, and its bias, where its forward is that of an ordinary one.
        args, kwargs: what the host was called with beside its input.
    """

    __slots__ = ("args", "bias", "call", "dense", "kwargs", "params", "site", "stored")

    def __init__(
        self,
        site: Site,
        call: Callable[[Tensor], Tensor],
        params: Callable[[], tuple[Tensor, Tensor | None]],
        dense: tuple[Tensor, Tensor | None] | None = None,
        bias: Callable[[], Tensor | None] | None = None,
        further: tuple[tuple[Any, ...], dict[str, Any]] = ((), {}),
        stored: tuple[Callable[[], Tensor], Tensor | None] | None = None,
    ) -> None:
        self.site, self.call, self.params, self.dense, self.stored = site, call, params, dense, stored
        self.bias = (lambda: params()[1]) if bias is None else bias
        self.args, self.kwargs = further

    def __call__(self, x: Tensor) -> Tensor:
        return self.call(x)

    def then(self, p: Adapter) -> Inner:
        """This layer with one more adapter on it."""
        inner = self if p.trained_bias is None else self._with_bias_of(p)
        method = p.method
        further = self.args, self.kwargs
        if p.strength == 1 or method.scales_itself or method.unmergeable:
            return Inner(self.site, lambda x: method.around(p, inner, x), lambda: folded(p, *inner.params()), further=further)
        return Inner(self.site, lambda x: Method.around(method, p, inner, x), lambda: folded(p, *inner.params()), further=further)

    def _with_bias_of(self, p: Adapter) -> Inner:
        def call(x: Tensor) -> Tensor:
            y, old = self.call(x), self.bias()
            new = biased(p, old)
            assert new is not None
            return y + self.site.rows(new if old is None else new - old.to(new.dtype)).to(y.dtype)

        def params() -> tuple[Tensor, Tensor | None]:
            w, b = self.params()
            return w, biased(p, b)

        return Inner(self.site, call, params, bias=lambda: biased(p, self.bias()), further=(self.args, self.kwargs))


# What hosts that read their weights have read in the forward pass that is running: an expert stack is read once an expert.
_read: ContextVar[dict[Any, Tensor] | None] = ContextVar("inlay_read", default=None)


class Place:
    """One adapted weight of a host.

    Attributes:
        path: the host's name in the model.
        adapters: the adapters that sit here, by name.
        merged: the adapters that are in the weight now.
        rounding: what merging into a quantised weight lost by rounding it again, as a share of the weight, and as one of the change.
    """

    rounding: tuple[float, float] | None = None

    def __init__(self, session: Session, path: str, site: Site) -> None:
        self.session, self.path, self.site = session, path, site
        self.adapters: dict[str, Adapter] = {}
        self.merged: tuple[str, ...] = ()
        # What a file calls the host.
        self.in_file = path
        host = host_class(site.module)
        # The fused kernels stand for nn.Linear's own forward and for nothing that overrides it.
        self.plain = type(site) is Linear and host.forward is nn.Linear.forward and (site.store.dense or site.store.in_formulas)

    @property
    def name(self) -> str:
        return self.site.name

    def here(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(n for n in names if n in self.adapters)

    def inner(self, call: Callable[..., Tensor], bare: bool, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Inner:
        """The layer without adapters.

        Args:
            call: the host's forward.
            bare: nothing is around that forward, so that a kernel may stand for it.
            args, kwargs: what it takes beside its input.
        """
        further = bool(args or kwargs)
        site = self.site.bound(args, kwargs or {}) if further else self.site
        if site.kept is not None:
            return Inner(site, lambda x: site.apply(x, *site.read()), site.read, bias=site.bias)
        dense = None
        if bare and self.plain and not further:
            # A parametrization has no such parameter and computes its weight.
            weight = site.module._parameters.get("weight")
            if type(weight) is nn.Parameter or type(weight) is Tensor or site.store.in_formulas:
                dense = weight, site.module._parameters["bias"]
        if dense is None and not site.store.dense and not further and multiplies(site):
            return self._restoring(site, call, bare)
        if not further:
            return Inner(site, call, site.read, dense, site.bias)
        return Inner(site, lambda x: call(x, *args, **(kwargs or {})), site.read, dense, site.bias, (args, kwargs or {}))

    def _restoring(self, site: Site, call: Callable[..., Tensor], bare: bool) -> Inner:
        """A quantised linear layer without adapters. Its weight is restored when it is asked for, and again on the way back."""
        bias, held = site.bias(), site.store.held(site.module, site.name)

        def restore() -> Tensor:
            return site.matrix(site.store.read_tensor(held))

        frozen = bias is None or not bias.requires_grad
        exact = bare and frozen and type(site) is Linear and site.store.exact(site.module)
        host = (lambda x: frozen_linear(x, call, restore)) if frozen else call
        return Inner(site, host, site.read, bias=site.bias, stored=(restore, bias) if exact else None)

    def forward(self, call: Callable[..., Tensor], bare: bool, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The adapted layer on ``x``, for whoever is active here and now."""
        names, rows = self.session.choice()
        if rows is None:
            return self.stacked(call, bare, names, x, args, kwargs)
        from .mixed import mixed

        groups = grouped(rows, frozenset(self.adapters))
        if len(groups) == 1 or self.merged:
            return by_rows(self.session, rows, lambda names, x, *a, **k: self.stacked(call, bare, names, x, a, k), (x, *args), kwargs)
        return mixed(self, call, len(rows), groups, x, args, kwargs)

    def stacked(
        self, call: Callable[..., Tensor], bare: bool, names: Sequence[str], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The layer under these adapters, one after another."""
        names = self.here(names)
        if names == self.merged:
            return call(x, *args, **kwargs)
        inner = self.inner(call, bare, args, kwargs)
        for name in names:
            inner = inner.then(self.adapters[name])
        restores = not self.site.store.dense and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if restores and any(reads_weight(self.adapters[name]) for name in names):
            # What is made of a restored weight is made again on the way back.
            return checkpoint(inner, x, use_reentrant=False)
        return inner(x)

    def fold(self, names: Sequence[str], dropping: bool = False) -> tuple[Tensor, Tensor | None]:
        """Weight ``(*batch, out, in)`` and bias with these adapters in them, in full precision.

        Args:
            dropping: leave out what the methods' dropout leaves out in training.

        Raises:
            TypeError: a method is no function of the weight; the message says why.
        """
        for name in self.here(names):
            if self.adapters[name].method.unmergeable:
                raise TypeError(self.adapters[name].method.unmergeable)
        w, b = self.site.read()
        w, b = full(w), None if b is None else full(b)
        for name in self.here(names):
            p = self.adapters[name]
            new, b = folded(p, w, biased(p, b))
            w = w + p.method.thinned(p, new - w) if dropping and p.training and isinstance(p.method, Additive) else new
        return w, b

    def value(self, name: str) -> Tensor | None:
        """What a host that reads its weight or bias finds there."""
        stored = self.site.module._parameters.get(name)
        names = self.here(self.session.choice().names)
        if names == self.merged:
            return stored
        memory = None if torch.compiler.is_compiling() else _read.get()
        key = (id(self), name, names)
        if memory is not None and key in memory:
            return memory[key]
        w, b = self.fold(names, dropping=True)
        found = {self.site.name: self.site.raw(w).to(self.site.dtype)}
        if self.site.bias_name is not None and b is not None:
            found[self.site.bias_name] = b.to(self.site.dtype)
        if memory is not None:
            memory |= {(id(self), k, names): v for k, v in found.items()}
        return found.get(name)

    def merge(self, names: Sequence[str], check: bool = False) -> None:
        """Put adapters into the weight; from the host's own weight, however often it is done.

        Raises:
            TypeError: a method is no function of the weight; the message says why.
            ValueError: ``check`` is set and the result is not finite. The host is as it was.
        """
        names = self.here(names)
        if names == self.merged or not names:
            return
        with torch.no_grad():
            w, b = self.fold(names)
        if check and not (w.isfinite().all() and (b is None or b.isfinite().all())):
            raise ValueError(f"Merging {', '.join(names)} gives weights of {self.path!r} that are not finite; the adapter seems broken.")
        before = None if self.site.store.dense else self.site.read()[0]
        self.site.replace(w, b)
        self.merged = names
        if before is not None:
            self.rounding = _lost(w, before, self.site.matrix(self.site.store.read(self.site.module, self.site.name)))

    def unmerge(self) -> None:
        """Put the host's own tensors back."""
        self.site.restore()
        self.merged, self.rounding = (), None

    def set_strength(self, name: str, strength: float) -> None:
        """Set how much of an adapter acts, also of one that is merged."""
        self.adapters[name].strength = float(strength)
        if name in self.merged:
            names = self.merged
            self.unmerge()
            self.merge(names)

    def settle(self) -> None:
        """Make what is merged the host's own."""
        self.site.kept, self.merged = None, ()


def _lost(wanted: Tensor, before: Tensor, now: Tensor) -> tuple[float, float]:
    """What rounding took, as a share of a weight, and as one of its change."""
    error, change = (full(now) - wanted).norm(), (wanted - full(before)).norm()
    return (error / wanted.norm().clamp(min=1e-30)).item(), (error / change.clamp(min=1e-30)).item()


def multiplies(site: Site) -> bool:
    """Whether the host multiplies the last axis of its input by the matrix."""
    return isinstance(site, (Linear, TransposedLinear)) and not isinstance(site, Embedding)


class _Asked(Exception):
    """A method has asked for the weight."""


def reads_weight(p: Adapter) -> bool:
    """Whether the adapter's forward on a linear layer asks for the layer's weight. It is tried out, once for each mode."""
    known = p.__dict__.setdefault("_reads_weight", {})
    mode = p.training, p.strength == 1
    if mode not in known:
        known[mode] = _tried(p)
    return known[mode]


def _tried(p: Adapter) -> bool:
    site = p.site

    def asked(*_: Any) -> Any:
        raise _Asked

    def call(x: Tensor) -> Tensor:
        return x.new_zeros(*x.shape[:-1], site.size("out"))

    if not multiplies(site):
        return True
    x = torch.zeros(2, site.size("in"), device=site.device, dtype=site.dtype)
    devices = [site.device] if site.device.type == "cuda" else []
    vars(site)["read"] = asked
    try:
        with torch.no_grad(), torch.random.fork_rng(devices):
            Inner(site, call, asked, bias=site.bias).then(p)(x)
    except Exception:
        # Also what cannot be tried out may read it.
        return True
    finally:
        del vars(site)["read"]
    return False


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

    def beneath(self, places: Mapping[str, AnyPlace]) -> Place | None:
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
                table = own._parameters if is_param else own._buffers
                old = table[key]
                kept[path, key, is_param] = old
                if value is None or old is None:
                    continue
                data = value.detach().to(old.dtype, copy=True)
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


# ---- the class that a host gets ------------------------------------------------------------------------------------------
class Inlaid:
    """Mixed into the class of an adapted layer, in front of it."""

    _inlay: dict[str, AnyPlace]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hook = self.__dict__.get("_host_forward")
        call = super().forward if hook is None else hook  # type: ignore[misc]
        place = self._inlay.get(self._call_place)  # type: ignore[attr-defined]
        if place is not None:
            if not args:
                # The host may be called by the name of its input.
                first = next(iter(kwargs))
                args, unnamed = (kwargs.pop(first),), call
                call = lambda x, *a, **k: unnamed(*a, **{first: x}, **k)  # noqa: E731
            if isinstance(place, Retrained) and (beneath := place.beneath(self._inlay)) is not None:
                # Other adapters change the weight of the module that this one replaces.
                host, bare = call, hook is None
                call = lambda x, *a, **k: beneath.forward(host, bare, x, a, k)  # noqa: E731
            return place.forward(call, hook is None, args[0], args[1:], kwargs)
        return self._reading(call, args, kwargs)

    def _reading(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        session = next(iter(self._inlay.values())).session
        rows = session.choice().rows

        def run(names: tuple[str, ...], *a: Any, **k: Any) -> Any:
            with session.local(names):
                return self._reading(call, a, k)

        if rows is not None:
            if getattr(self, "batch_first", True) is False:
                raise ValueError("An adapter for each row needs the batch in front, and this attention has it behind (batch_first=False).")
            return by_rows(session, rows, run, args, kwargs)
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        token = _read.set({})
        try:
            return call(*args, **kwargs)
        finally:
            _read.reset(token)

    def __reduce_ex__(self, _: Any) -> Any:
        cls = type(self)
        return _revive, (cls._host, cls._reads, cls._call_place), self.__dict__  # type: ignore[attr-defined]


def _reader(name: str) -> property:
    def read(self: nn.Module) -> Any:
        stored = self._parameters[name]
        if hasattr(stored, "placements") and _read.get() is None and not torch.compiler.is_compiling():
            # Not the host in its forward, but FSDP2, which looks after the shards that it put there.
            return stored
        for place in self.__dict__["_inlay"].values():
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


def host_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before adapters were set into it."""
    return type(module)._host if isinstance(module, Inlaid) else type(module)  # type: ignore[attr-defined]


class Seats(nn.ModuleDict):
    """The adapters of a host. A host that calls whatever modules it has (``nn.Sequential``) passes through."""

    def forward(self, x: Any) -> Any:
        return x


def inlay(module: nn.Module, place: AnyPlace) -> None:
    """Set a place into a host; a second place of the same host joins the first."""
    places: dict[str, AnyPlace] = module.__dict__.get("_inlay") or {}
    fresh = not isinstance(module, Inlaid)
    host = host_class(module)
    places[place.name] = place
    reads = []
    for p in places.values():
        if isinstance(p, Retrained):
            reads += [n for n in ("weight", "bias") if n in module._parameters]
        elif p.site.reads:
            reads += [n for n in (p.site.name, p.site.bias_name) if n is not None and n in module._parameters]
    called = "" if "" in places else next((n for n, p in places.items() if not p.site.reads), "none")  # type: ignore[union-attr]
    module.__dict__["_inlay"] = places
    module.__class__ = inlaid_class(host, tuple(reads), called)
    if fresh:
        _take_over_hook(module)
        module.adapters = Seats()


def _take_over_hook(module: nn.Module) -> None:
    """A forward that someone put on the instance goes on to run: around ours (accelerate's hooks) or inside it."""
    own = vars(module)
    if "_old_forward" in own:
        own["_old_forward"] = types.MethodType(Inlaid.forward, module)
    elif "forward" in own:
        own["_host_forward"] = own.pop("forward")


def lift(module: nn.Module, name: str) -> None:
    """Take a place out again; with the last one the host is what it was."""
    places = module.__dict__["_inlay"]
    host, own = host_class(module), vars(module)
    del places[name]
    if places:
        remaining = dict(places)
        module.__dict__["_inlay"] = {}
        for place in remaining.values():
            inlay(module, place)
        return
    module.__class__ = host
    del own["_inlay"], module._modules["adapters"]
    if "_old_forward" in own:
        own["_old_forward"] = types.MethodType(host.forward, module)
    if "_host_forward" in own:
        own["forward"] = own.pop("_host_forward")


def bare(module: nn.Module) -> nn.Module:
    """An adapted layer as it is without adapters: a second module of the host's class over the same tensors."""
    host = host_class(module)
    twin = object.__new__(host)
    own = {k: v for k, v in vars(module).items() if k not in ("_inlay", "_host_forward")}
    twin.__dict__ = own | {"_modules": {n: m for n, m in module._modules.items() if n != "adapters"}}
    if "_old_forward" in own:
        twin.__dict__["_old_forward"] = types.MethodType(host.forward, twin)
    if "_host_forward" in vars(module):
        twin.__dict__["forward"] = vars(module)["_host_forward"]
    return twin


def seat(place: AnyPlace, module: nn.Module, name: str, adapter: nn.Module) -> None:
    """Give an adapter its name at a place. Raw parameters of one host share the adapter's name and keep their own below it."""
    place.adapters[name] = adapter  # type: ignore[assignment]
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


def session_of(model: nn.Module) -> Session | None:
    """The session of a model that has adapters."""
    found = model.__dict__.get("_inlay_session")
    if isinstance(found, Session):
        return found
    return next((p.session for p in places(model)), None)
