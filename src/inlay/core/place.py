"""One adapted weight of a host: the layer under its adapters, one after another, and the weight that they amount to."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.checkpoint import checkpoint

from ..kernels.frozen import frozen_linear
from . import mixed
from .adapter import Adapter
from .additive import Additive
from .inner import Inner
from .method import biased, folded, full
from .rows import by_rows, check_count, grouped
from .session import Session
from .site import Embedding, Linear, Site, TransposedLinear, site_of

# The types of a dense weight, those without numbers (`inlay.plan`) included.
PLAIN = (nn.Parameter, Tensor, FakeTensor)
# What hosts that read their weights have read in the forward pass that is running: an expert stack is read once an expert.
read_now: ContextVar[dict[Any, Tensor] | None] = ContextVar("inlay_read", default=None)


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

    def on(self, module: nn.Module) -> Place:
        """The same adapters on another module of the host's class."""
        other, site = copy.copy(self), site_of(module)
        assert site is not None
        other.site, site.kept = site, self.site.kept
        return other

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
        dense = self._dense() if bare and not further else None
        if dense is None and not site.store.dense and not further and multiplies(site):
            return self._restoring(site, call, bare)
        if not further:
            return Inner(site, call, site.read, dense, site.bias)
        return Inner(site, lambda x: call(x, *args, **(kwargs or {})), site.read, dense, site.bias, (args, kwargs or {}))

    def _dense(self) -> tuple[Tensor, Tensor | None] | None:
        """Weight and bias of an ordinary linear layer around which there is nothing."""
        if not self.plain:
            return None
        # A parametrization has no such parameter and computes its weight.
        parameters = self.site.module._parameters
        weight: Any = parameters.get("weight")
        return (weight, parameters["bias"]) if type(weight) in PLAIN or self.site.store.in_formulas else None

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
        names, rows, rest = self.session.choice()
        if rows is None:
            return self.stacked(call, bare, names, x, args, kwargs)
        if torch.compiler.is_dynamo_compiling() or torch.is_grad_enabled() or args or kwargs:
            rest = None
        if rest is not None and not self.merged and not x.shape[0] % len(rows) and (update := rest.knows(self, rows)) is not None:
            dense = self._dense() if bare else None
            return update.after(call(x), x) if dense is None else update.around(*dense, x)
        groups = grouped(rows, self.adapters)
        if len(groups) == 1:
            check_count((x,), len(rows))
            return self.stacked(call, bare, groups[0].names, x, args, kwargs)
        if self.merged:
            return by_rows(self.session, rows, lambda names, x, *a, **k: self.stacked(call, bare, names, x, a, k), (x, *args), kwargs)
        return mixed.mixed(self, call, rows, groups, rest, x, args, kwargs)

    def stacked(
        self, call: Callable[..., Tensor], bare: bool, names: Sequence[str], x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Tensor:
        """The layer under these adapters, one after another."""
        acting = [self.adapters[n] for n in names if n in self.adapters]
        if self.here(names) == self.merged if self.merged else not acting:
            return call(x, *args, **kwargs)
        inner = self.inner(call, bare, args, kwargs)
        if not acting:
            return inner(x)
        *below, last = acting
        for p in below:
            inner = inner.then(p)
        restores = not self.site.store.dense and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if restores and any(map(reads_weight, acting)):
            # What is made of a restored weight is made again on the way back.
            return checkpoint(inner.then(last), x, use_reentrant=False)
        return inner.under(last, x)

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
        memory = None if torch.compiler.is_compiling() else read_now.get()
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
        # A quantised weight that the adapters leave as it is (they may have changed the bias) is not rounded again.
        kept = before is not None and torch.equal(w, full(before))
        self.site.replace(None if kept else w, b, self._made(w, names))
        self.merged, self.rounding = names, None
        if before is not None and not kept:
            self.rounding = _lost(w, before, self.site.matrix(self.site.store.read(self.site.module, self.site.name)))

    def _made(self, w: Tensor, names: Sequence[str]) -> bool:
        """Whether a folded weight shares its memory with nothing that was there before."""
        adapters = [self.adapters[n] for n in names]
        known = [t for p in adapters for t in (*p.parameters(), *p.buffers())]
        if self.site.store.dense:
            known.append(self.site.read()[0])
        return not any(w.untyped_storage().data_ptr() == t.untyped_storage().data_ptr() for t in known)

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


def host_class(module: nn.Module) -> type[nn.Module]:
    """The class that a module has, or had before adapters were set into it."""
    return getattr(type(module), "_host", type(module))
