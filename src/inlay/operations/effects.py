"""What adapters do to a model, as plain tensors.

An `Update` is what an adapter adds at one weight: factors where the method has them, else the difference that `fold` makes. An
`Effect` is all that an adapter does: updates, retrained biases, tokens and modules. Combining and converting are maps on effects.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.additive import Additive, LowRank
from ..core.config import PeftConfig
from ..core.inlaid import places, session_of
from ..core.method import biased, folded, full
from ..core.part import Parts, axes_apart
from ..core.place import Place
from ..core.plan import Biases
from ..core.retrained import AnyPlace, Retrained
from ..core.site import Embedding, Linear, Site, Stack, TransposedLinear
from ..core.targets import tied_paths
from ..core.tied import Tied
from ..formats.packed import slices
from ..methods.alora import ALora
from ..methods.conditioned import Conditioned
from ..methods.lora import LoraConfig
from ..methods.trainable_tokens import TrainableTokensConfig
from .slicing import Sliced

# The host's name and the weight's.
Key = tuple[str, str]
# Gives slices of a tensor of a module, which may have no values itself.
Slicing = Callable[[Tensor], Sliced]


@dataclass
class Update:
    """What is added at one weight, and to its bias.

    Attributes:
        name: the weight's, as patterns see it.
        a, b, scale: ``scale * B A`` is added, with ``a (*batch, r, in)`` and ``b (*batch, out, r)``; None where the
            method has no factors.
        dense: else the matrix that is added, ``(*batch, out, in)``.
        sliced: else the same where it is not held.
        bias: what is added to the bias, ``(channels,)``; None where that is nothing.
        free: A and B are what LoRA trains.
    """

    name: str
    site: Site
    a: Tensor | None = None
    b: Tensor | None = None
    scale: float = 1.0
    dense: Tensor | None = None
    bias: Tensor | None = None
    free: bool = False
    sliced: Sliced | None = None

    @property
    def rank(self) -> int | None:
        """Of the factors, in each matrix of the batch."""
        return None if self.a is None else self.a.shape[-2]

    def matrix(self) -> Tensor:
        if self.sliced is not None:
            return self.sliced.whole()
        if self.dense is not None:
            return self.dense
        a, b = self.factors()
        return b @ a

    def held(self) -> Update:
        """The same with its matrix in memory, where that was not."""
        return self if self.sliced is None else replace(self, dense=self.sliced.whole(), sliced=None)

    def slices(self) -> Sliced:
        """The matrix in slices: rows of it, or matrices of a stack."""
        if self.sliced is not None:
            return self.sliced
        if self.dense is not None:
            return Sliced.of(self.dense)
        return _product(*self.factors())

    def raw_slices(self) -> Sliced:
        """The same in slices of the weight as the host keeps it, of a stack in rows of its matrices."""
        site = self.site
        if type(site) in (Linear, Stack):
            of_matrix = self.slices()
            return Sliced(site.raw_shape, lambda piece: site.raw(of_matrix.make(piece))).rows()
        if self.a is not None and isinstance(site, TransposedLinear):
            a, b = self.factors()
            return _product(b.mT, a.mT)
        return Sliced.of(site.raw(self.matrix())).rows()

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with the scale in B; a dense matrix beside the identity on its shorter side."""
        if self.a is not None and self.b is not None:
            return full(self.a), self.scale * full(self.b)
        w = self.matrix()
        out, inner = w.shape[-2:]
        eye = torch.eye(min(out, inner), dtype=w.dtype, device=w.device).expand(*w.shape[:-2], -1, -1)
        return (w, eye) if out <= inner else (eye, w)


def _product(a: Tensor, b: Tensor) -> Sliced:
    return Sliced((*b.shape[:-1], a.shape[-1]), lambda piece: b[piece] @ (a[piece] if a.ndim > 2 else a))


def nothing(name: str, site: Site) -> Update:
    """An update of rank 0."""
    a = torch.zeros(*site.batch, 0, site.size("in"), device=site.device)
    return Update(name, site, a, torch.zeros(*site.batch, site.size("out"), 0, device=site.device), free=True)


@dataclass
class Tokens:
    """Rows of an embedding (or an output head) that are changed."""

    site: Site
    indices: list[int]
    rows: Tensor

    def update(self, name: str) -> Update:
        """The same as an update of the weight."""
        across = isinstance(self.site, Embedding)
        count = self.site.size("in" if across else "out")
        chosen = torch.zeros(len(self.indices), count, device=self.rows.device)
        chosen[torch.arange(len(self.indices)), torch.tensor(self.indices)] = 1
        a, b = (chosen, self.rows.mT) if across else (self.rows, chosen.mT)
        return Update(name, self.site, a, b)


@dataclass
class Effect:
    """All that an adapter does to a model.

    Attributes:
        weights: by host and weight.
        biases: changes of biases whose weight is left alone.
        tokens: by host.
        modules: changes of the tensors of retrained modules, by the module's name and their own.
        ties: ends of tied weights follow.
    """

    weights: dict[Key, Update] = field(default_factory=dict)
    biases: dict[Key, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tokens] = field(default_factory=dict)
    modules: dict[str, dict[str, Tensor | Sliced]] = field(default_factory=dict)
    ties: bool = False


@torch.no_grad()
def update_of(p: Adapter, sliced: bool = False) -> Update:
    """What an adapter adds at its weight, at the strength that it has.

    Args:
        sliced: in slices where it has no factors, and can be taken to pieces.

    Raises:
        TypeError: the method is no function of the weight; the message says why.
    """
    method, site, strength = p.method, p.site, float(p.strength)
    if method.unmergeable and not isinstance(method, ALora):
        raise TypeError(method.unmergeable)
    if isinstance(method, Tied):
        of = update_of(method._of)
        turned = lambda t: None if t is None else t.mT  # noqa: E731
        return Update(p.path, site, turned(of.b), turned(of.a), of.scale, turned(of.dense), _bias_alone(p))
    if isinstance(method, Additive) and (type(method).fold is Additive.fold or isinstance(method, ALora)):
        extra = method.delta_bias(p)
        bias = _sum(_bias_alone(p), None if extra is None else strength * full(extra).detach())
        if isinstance(method, LowRank) and type(method).delta is LowRank.delta:
            a, b = method.factors(p)
            free = isinstance(method, LoraConfig) and type(method).factors is LoraConfig.factors
            return Update(p.path, site, full(a).detach(), full(b).detach(), method.scaling * strength, None, bias, free)

        def added(p: Any) -> Tensor:
            return strength * full(p.method.delta(p)).detach()

        parts = _parts(p) if sliced else None
        if parts is None:
            return Update(p.path, site, dense=added(p), bias=bias)
        return Update(p.path, site, bias=bias, sliced=Sliced(site.shape, lambda piece: added(parts[piece])))
    if isinstance(method, Conditioned) and type(method).fold is Conditioned.fold:
        a, b = method.factors(p, full(site.read()[0]))
        return Update(p.path, site, full(a).detach(), full(b).detach(), strength, bias=_bias_alone(p))
    parts = _parts(p) if sliced else None
    if parts is None:
        change, bias = _changed(p)
        return Update(p.path, site, dense=change, bias=bias if bias is not None and bias.any() else None)
    found = Sliced(site.shape, lambda piece: _changed(parts[piece])[0])
    return Update(p.path, site, bias=_changed_bias(parts, site), sliced=found)


def _parts(p: Adapter) -> Parts | None:
    axis = "batch" if p.site.batch else "out"
    return Parts(p, axis) if axis in axes_apart(p) else None


def _changed(p: Adapter) -> tuple[Tensor, Tensor | None]:
    """What folding does to weight and bias."""
    w, b = p.site.read()
    w, b = full(w), None if b is None else full(b)
    new, bias = folded(p, w, biased(p, b))
    return (new - w).detach(), None if bias is None else bias.detach() - (0 if b is None else b)


def _changed_bias(parts: Parts, site: Site) -> Tensor | None:
    found: list[Tensor] = []
    for piece in slices(site.shape):
        _, bias = _changed(parts[piece])
        if bias is None:
            return None
        found.append(bias)
    bias = found[0] if site.batch else torch.cat(found)
    return bias if bias.any() else None


def _bias_alone(p: Adapter) -> Tensor | None:
    if p.trained_bias is None:
        return None
    own = p.site.bias()
    new = biased(p, None if own is None else full(own))
    return None if new is None else new.detach() - (0 if own is None else full(own))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


@torch.no_grad()
def effects(base: nn.Module, names: Sequence[str], among: Sequence[AnyPlace] | None = None, sliced: Slicing | None = None) -> list[Effect]:
    """What each of these adapters does, told in one way: what one of them retrains as a whole, all of them retrain.

    Args:
        among: only at these places.
        sliced: what they do is not held: to weights where it has no factors, see `update_of`; to retrained modules, of whose tensors
            this gives slices.

    Raises:
        TypeError: a method is no function of the weight.
    """
    ties = _all_follow_ties(base, names)
    found = [_effect(base, name, ties, list(places(base)) if among is None else among, sliced) for name in names]
    whole = {path for e in found for path in e.modules}
    adapted = {path for e in found for path, _ in e.weights}
    keys = {key for e in found for key in e.weights}
    for e in found:
        for path in [t for t in e.tokens if t in adapted or _within(t, whole) is not None]:
            tokens = e.tokens.pop(path)
            e.weights[path, tokens.site.name] = tokens.update(path)
        for key in [k for k in e.biases if k in keys]:
            place = _place(base, key)
            e.weights[key] = replace(nothing(key[0], place.site), bias=e.biases.pop(key))
        for key in [k for k in (*e.weights, *e.biases) if _within(k[0], whole) is not None]:
            _into_module(e, key, str(_within(key[0], whole)), _place(base, key).site, sliced is not None)
    return found


def _all_follow_ties(base: nn.Module, names: Sequence[str]) -> bool:
    """Whether every adapter at one end of tied weights acts on both, and nothing else stands in the way of its doing so."""
    at: dict[str, dict[str, Any]] = {}
    for place in places(base):
        if isinstance(place, Place):
            at.setdefault(place.path, {}).update(place.adapters)
    for end, source in tied_paths(base).items():
        here = [(at.get(source, {}).get(n), at.get(end, {}).get(n)) for n in names]
        touching = [(s, e) for s, e in here if s is not None or e is not None]
        if any(e is None or not isinstance(e.method, Tied) for _, e in touching):
            return False
        if len({s is not None and isinstance(s.method, TrainableTokensConfig) for s, _ in touching}) > 1:
            return False
    return True


def _effect(base: nn.Module, name: str, ties: bool, among: Sequence[AnyPlace], sliced: Slicing | None) -> Effect:
    effect = Effect()
    for place in among:
        p = place.adapters.get(name)
        if p is None:
            continue
        if isinstance(place, Retrained):
            effect.modules[place.path] = _changes(place, p, sliced)
        elif isinstance(p, Adapter):
            method, key = p.method, (place.path, place.name)
            if isinstance(method, Tied) and ties:
                effect.ties = effect.ties or not isinstance(method._of.method, TrainableTokensConfig)
            elif isinstance(method, TrainableTokensConfig) and (ties or place.path not in tied_paths(base).values()):
                effect.tokens[place.path] = _tokens(p, method)
            elif isinstance(method, Biases):
                change = _bias_alone(p)
                if change is not None:
                    effect.biases[key] = change
            elif isinstance(method, TrainableTokensConfig):
                effect.weights[key] = _tokens(p, method).update(p.path)
            elif isinstance(method, Tied) and isinstance(method._of.method, TrainableTokensConfig):
                a, b = _tokens(method._of, method._of.method).update(p.path).factors()
                effect.weights[key] = Update(p.path, p.site, b.mT, a.mT)
            else:
                effect.weights[key] = update_of(p, sliced is not None)
    return effect


def _tokens(p: Adapter, method: TrainableTokensConfig) -> Tokens:
    w = p.site.read()[0].detach()
    own = full((w.mT if isinstance(p.site, Embedding) else w)[method.token_indices])
    return Tokens(p.site, list(method.token_indices), float(p.strength) * (full(p.trainable_tokens_delta).detach() - own))


def _changes(place: Retrained, copied: nn.Module, sliced: Slicing | None) -> dict[str, Tensor | Sliced]:
    own = own_tensors(place)

    def change(new: Tensor, old: Tensor) -> Tensor | Sliced:
        if sliced is None:
            return full(new).detach() - full(old).detach()
        later, before = sliced(new), sliced(old)
        return Sliced(later.shape, lambda rows: full(later.make(rows)) - full(before.make(rows)))

    return {k: change(t, own[k]) for k, t in copied.state_dict(keep_vars=True).items() if t.is_floating_point()}


def own_tensors(place: Retrained) -> dict[str, Tensor]:
    """The host's own, also while others are merged into it."""
    own = {k: t for k, t in place.module.state_dict(keep_vars=True).items() if not k.startswith("adapters.") and ".adapters." not in k}
    return own | {f"{path}.{key}".lstrip("."): t for (path, key, _), t in (place.kept or {}).items() if t is not None}


def _within(path: str, whole: set[str]) -> str | None:
    return next((w for w in whole if path == w or path.startswith(f"{w}.")), None)


def _into_module(effect: Effect, key: Key, module: str, site: Site, sliced: bool) -> None:
    """An update inside a module that another adapter retrains becomes a change of that module's tensors."""
    inside = f"{key[0][len(module) + 1 :]}.".lstrip(".")
    changes = effect.modules.setdefault(module, {})
    update = effect.weights.pop(key, None)
    if update is not None:
        changes[inside + site.name] = update.raw_slices() if sliced else site.raw(update.matrix())
    bias = update.bias if update is not None else effect.biases.pop(key)
    if bias is not None and site.bias_name is not None and site.bias() is not None:
        changes[inside + site.bias_name] = bias


def _place(base: nn.Module, key: Key) -> Place:
    return next(p for p in places(base) if isinstance(p, Place) and (p.path, p.name) == key)


def base_and_configs(model: nn.Module, names: Sequence[str]) -> tuple[nn.Module, Mapping[str, PeftConfig]]:
    """The bare model and the configurations of its adapters.

    Raises:
        ValueError: it has none, or none of this name.
    """
    from ..core.targets import bare_model

    base = bare_model(model)
    session = session_of(base)
    if session is None:
        raise ValueError("The model has no adapters.")
    session.check(names)
    return base, session.configs
