"""What adapters do to a model, as plain tensors; and one adapter made of such tensors.

An `Update` is what an adapter adds at one weight: factors where the method has them, else the difference that `fold` makes. An
`Effect` is all that an adapter does: updates, retrained biases, tokens and modules. Combining and converting are maps on effects.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.additive import Additive, LowRank
from ..core.config import PeftConfig
from ..core.inlaid import places, session_of
from ..core.method import Method, biased, folded, full
from ..core.place import Place
from ..core.plan import Biases, Part, materialise
from ..core.retrained import AnyPlace, Retrained
from ..core.site import Embedding, Site, Stack, _AnyConv
from ..core.targets import explain_targets, tied_paths
from ..core.tied import Tied
from ..initializers.svd import approximate_singular_vectors, singular_vectors, singular_vectors_of_product
from ..methods.alora import ALora
from ..methods.conditioned import Conditioned
from ..methods.full import FullConfig
from ..methods.lora import LoraConfig
from ..methods.trainable_tokens import TrainableTokensConfig

# The host's name and the weight's.
Key = tuple[str, str]
# From this width on, a few vectors of a dense update are found by subspace iteration.
WIDE = 512
EPS = torch.finfo(torch.float32).eps


@dataclass
class Update:
    """What is added at one weight, and to its bias.

    Attributes:
        name: the weight's, as patterns see it.
        a, b, scale: ``scale * B A`` is added, with ``a (*batch, r, in)`` and ``b (*batch, out, r)``; None where `dense` is.
        dense: the matrix that is added, ``(*batch, out, in)``.
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

    @property
    def rank(self) -> int | None:
        """Of the factors, in each matrix of the batch."""
        return None if self.a is None else self.a.shape[-2]

    def matrix(self) -> Tensor:
        if self.dense is not None:
            return self.dense
        a, b = self.factors()
        return b @ a

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B with the scale in B; a dense matrix beside the identity on its shorter side."""
        if self.a is not None and self.b is not None:
            return full(self.a), self.scale * full(self.b)
        w = self.matrix()
        out, inner = w.shape[-2:]
        eye = torch.eye(min(out, inner), dtype=w.dtype, device=w.device).expand(*w.shape[:-2], -1, -1)
        return (w, eye) if out <= inner else (eye, w)


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
    modules: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    ties: bool = False


# ---- reading --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def update_of(p: Adapter) -> Update:
    """What an adapter adds at its weight, at the strength that it has.

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
        return Update(p.path, site, dense=strength * full(method.delta(p)).detach(), bias=bias)
    w, b0 = site.read()
    w, b0 = full(w), None if b0 is None else full(b0)
    if isinstance(method, Conditioned) and type(method).fold is Conditioned.fold:
        a, b = method.factors(p, w)
        return Update(p.path, site, full(a).detach(), full(b).detach(), strength, bias=_bias_alone(p))
    new, bias = folded(p, w, biased(p, b0))
    change = None if bias is None else bias.detach() - (0 if b0 is None else b0)
    return Update(p.path, site, dense=(new - w).detach(), bias=change if change is not None and change.any() else None)


def _bias_alone(p: Adapter) -> Tensor | None:
    if p.trained_bias is None:
        return None
    own = p.site.bias()
    new = biased(p, None if own is None else full(own))
    return None if new is None else new.detach() - (0 if own is None else full(own))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    return other if one is None else one if other is None else one + other


@torch.no_grad()
def effects(base: nn.Module, names: Sequence[str], among: Sequence[AnyPlace] | None = None) -> list[Effect]:
    """What each of these adapters does, told in one way: what one of them retrains as a whole, all of them retrain.

    Args:
        among: only at these places.

    Raises:
        TypeError: a method is no function of the weight.
    """
    ties = _all_follow_ties(base, names)
    found = [_effect(base, name, ties, list(places(base)) if among is None else among) for name in names]
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
            _into_module(e, key, str(_within(key[0], whole)), _place(base, key).site)
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


def _effect(base: nn.Module, name: str, ties: bool, among: Sequence[AnyPlace]) -> Effect:
    effect = Effect()
    for place in among:
        p = place.adapters.get(name)
        if p is None:
            continue
        if isinstance(place, Retrained):
            effect.modules[place.path] = _changes(place, p)
        elif isinstance(p, Adapter):
            method, key = p.method, (place.path, place.name)
            if isinstance(method, Tied) and ties:
                effect.ties = effect.ties or not isinstance(method._of.method, TrainableTokensConfig)
            elif isinstance(method, TrainableTokensConfig) and (ties or place.path not in tied_paths(base).values()):
                effect.tokens[place.path] = _tokens(p, method)
            elif isinstance(method, Biases):
                change = _bias_alone(p)
                if change is not None:
                    effect.biases[key] = float(p.strength) * change if p.strength != 1 else change
            elif isinstance(method, TrainableTokensConfig):
                effect.weights[key] = _tokens(p, method).update(p.path)
            elif isinstance(method, Tied) and isinstance(method._of.method, TrainableTokensConfig):
                a, b = _tokens(method._of, method._of.method).update(p.path).factors()
                effect.weights[key] = Update(p.path, p.site, b.mT, a.mT)
            else:
                effect.weights[key] = update_of(p)
    return effect


def _tokens(p: Adapter, method: TrainableTokensConfig) -> Tokens:
    w = full(p.site.read()[0]).detach()
    own = (w.mT if isinstance(p.site, Embedding) else w)[method.token_indices]
    return Tokens(p.site, list(method.token_indices), float(p.strength) * (full(p.trainable_tokens_delta).detach() - own))


def _changes(place: Retrained, copied: nn.Module) -> dict[str, Tensor]:
    own = _own_tensors(place)
    return {k: full(t).detach() - full(own[k]).detach() for k, t in copied.state_dict(keep_vars=True).items() if t.is_floating_point()}


def _own_tensors(place: Retrained) -> dict[str, Tensor]:
    """The host's own, also while others are merged into it."""
    own = {k: t for k, t in place.module.state_dict(keep_vars=True).items() if not k.startswith("adapters.") and ".adapters." not in k}
    return own | {f"{path}.{key}".lstrip("."): t for (path, key, _), t in (place.kept or {}).items() if t is not None}


def _within(path: str, whole: set[str]) -> str | None:
    return next((w for w in whole if path == w or path.startswith(f"{w}.")), None)


def _into_module(effect: Effect, key: Key, module: str, site: Site) -> None:
    """An update inside a module that another adapter retrains becomes a change of that module's tensors."""
    inside = f"{key[0][len(module) + 1 :]}.".lstrip(".")
    changes = effect.modules.setdefault(module, {})
    update = effect.weights.pop(key, None)
    if update is not None:
        changes[inside + site.name] = site.raw(update.matrix())
    bias = update.bias if update is not None else effect.biases.pop(key)
    if bias is not None and site.bias_name is not None and site.bias() is not None:
        changes[inside + site.bias_name] = bias


def _place(base: nn.Module, key: Key) -> Place:
    return next(p for p in places(base) if isinstance(p, Place) and (p.path, p.name) == key)


# ---- cutting --------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def cut(update: Update, rank: float, clamp: float | None = None) -> tuple[Update, float]:
    """The nearest update of a rank, and the error: the norm of what is lost over the norm of all.

    Args:
        rank: an integer, or the share of the squared norm that is to stay: then the least rank that keeps it.
        clamp: limit the factors to this quantile of their numbers.
    """
    shape = update.site.shape
    if update.dense is None:
        a, b = update.factors()
        limit = min(*shape[-2:], a.shape[-2])
        if not limit:
            return replace(update, free=False), 0.0
        u, s, v = singular_vectors_of_product(b, a)
        total = s.square().sum()
    else:
        limit = min(shape[-2:])
        total = update.dense.double().square().sum() if update.dense.device.type != "mps" else update.dense.square().sum()
        if isinstance(rank, int) and limit >= WIDE and 8 * rank <= limit:
            u, s, v = approximate_singular_vectors(update.dense, rank, iterations=6, oversampling=rank)
        else:
            u, s, v = singular_vectors(update.dense, limit)
    k = min(rank, limit) if isinstance(rank, int) else rank_for(s, rank)
    left, right = (u * s.unsqueeze(-2))[..., :k].float(), v[..., :k].mT.float()
    if clamp is not None:
        bound = quantile(torch.cat((left.flatten(), right.flatten())), clamp)
        left, right = left.clamp(-bound, bound), right.clamp(-bound, bound)
    lost = float(((total - s[..., :k].square().sum()) / total).clamp_min(0).sqrt()) if total > 0 else 0.0
    return Update(update.name, update.site, right.contiguous(), left.contiguous(), bias=update.bias), lost


def rank_for(values: Tensor, share: float) -> int:
    """The least rank that keeps this share of the squares, in each matrix of a batch.

    Args:
        values: singular values ``(*batch, k)``, falling. What is below the digits of single precision counts as zero.
    """
    values = values.double() if values.device.type != "mps" else values
    values = values * (values > values[..., :1] * values.shape[-1] * EPS)
    energy = values.square().cumsum(-1)
    short = (energy < share * energy[..., -1:] * (1 - 1e-12)).sum(-1)
    return min(int(short.max()) + 1, values.shape[-1])


def quantile(values: Tensor, q: float) -> float:
    """As ``torch.quantile``, of any number of values."""
    at = q * (values.numel() - 1)
    low, high = (values.kthvalue(int(i) + 1).values for i in (at, min(int(at) + 1, values.numel() - 1)))
    return float(torch.lerp(low, high, at - int(at)))


# ---- an adapter of an effect ----------------------------------------------------------------------------------------------
def rank_field(site: Site, rank: int) -> int:
    """LoRA's ``r`` for a rank in each matrix: the groups of a convolution share it."""
    return max(rank, 1) * (site.module.groups if isinstance(site, _AnyConv) else 1)


def config_for(base: nn.Module, effect: Effect, sources: Sequence[PeftConfig], r: int | None = None) -> Method:
    """The configuration of an adapter that does this: LoRA where all updates have factors, else trained matrices.

    Args:
        sources: the configurations of the adapters that the effect is of.
        r: LoRA's rank where a layer does not need another; the most frequent one where None.
    """
    first = sources[0]
    changed = {key for key, u in effect.weights.items() if u.bias is not None}
    homeless = {key for key in changed if effect.weights[key].site.bias() is None}
    low_rank = homeless or all(u.dense is None for u in effect.weights.values())
    common: dict[str, Any] = {name: getattr(first, name) for name in ("task_type", "base_model_name_or_path", "revision")}
    common |= {"auto_mapping": copy.deepcopy(first.auto_mapping), "modules_to_save": _common_modules(effect, sources)}
    common |= {"ensure_weight_tying": effect.ties}
    if effect.tokens:
        common["trainable_token_indices"] = {path: tokens.indices for path, tokens in effect.tokens.items()}
    prefix = "lora" if low_rank else "diff"
    trained = effect.biases or any(getattr(c, "bias", "none") != "none" for c in sources)
    if trained and not homeless and (changed or effect.biases):
        common["bias"] = "all" if effect.biases else f"{prefix}_only"
    if not low_rank:
        return _targeted(base, FullConfig(train_bias=bool(changed) and not trained, **common), effect, sources)
    if changed and common.get("bias", "none") == "none":
        refusing = {key for key, u in effect.weights.items() if isinstance(u.site, Embedding) or (u.site.reads and u.site.bias() is None)}
        if not refusing:
            common["lora_bias"] = True
        else:
            common["overrides"] = {re.escape(effect.weights[k].name): {"lora_bias": True} for k in changed - refusing}
    ranks = {u.name: rank_field(u.site, u.rank if u.rank is not None else min(u.site.shape[-2:])) for u in effect.weights.values()}
    r = r or (max(Counter(ranks.values()).items(), key=lambda item: (item[1], item[0]))[0] if ranks else 8)
    # The first pattern that matches holds, and a name may be the end of a longer one.
    others = {name: rank for name, rank in sorted(ranks.items(), key=lambda item: -len(item[0])) if rank != r}
    same_invocation = {tuple(getattr(c, "alora_invocation_tokens", None) or ()) for c in sources}
    if same_invocation != {()}:
        if len(same_invocation) > 1:
            raise ValueError("Activated LoRAs with different `alora_invocation_tokens` act on different tokens; they have no sum.")
        common["alora_invocation_tokens"] = list(same_invocation.pop())
    if all(isinstance(c, LoraConfig) for c in sources):
        common["lora_dropout"] = first.lora_dropout  # type: ignore[attr-defined]
    config = LoraConfig(r=r, lora_alpha=r, rank_pattern=others, alpha_pattern=dict(others), **common)
    return _targeted(base, config, effect, sources)


def _common_modules(effect: Effect, sources: Sequence[PeftConfig]) -> list[str] | None:
    """Names of the retrained modules; as the sources have them where those agree."""
    if not effect.modules:
        return None
    said = [getattr(c, "modules_to_save", None) for c in sources]
    same = all(s == said[0] for s in said) and said[0]
    return list(said[0]) if same else sorted(effect.modules)  # type: ignore[arg-type]


_TARGETING = ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "target_parameters")


def _targeted(base: nn.Module, config: Method, effect: Effect, sources: Sequence[PeftConfig]) -> Method:
    """The configuration, pointed at the weights of an effect: in the words of the sources where these hold, else by whole names."""
    wanted = set(effect.weights)
    said = [{name: copy.deepcopy(getattr(c, name, None)) for name in _TARGETING} for c in sources]
    candidates: list[dict[str, Any]] = []
    if all(s == said[0] for s in said):
        candidates.append(said[0])
    elif all(isinstance(s["target_modules"], set) and not any(s[n] for n in _TARGETING[1:4]) for s in said):
        parameters = sorted({p for s in said for p in s["target_parameters"] or ()})
        candidates.append({"target_modules": {t for s in said for t in s["target_modules"] or ()}, "target_parameters": parameters or None})
    raw = {key for key in wanted if isinstance(effect.weights[key].site, Stack)}
    parameters = sorted(f"{path}.{name}" for path, name in raw) or None
    # Whoever means an attention means what is behind it too.
    attentions = {path for path, name in wanted - raw if name not in ("weight", "whole")}
    names = {path for path, _ in wanted - raw if path.rpartition(".")[0] not in attentions}
    candidates.append({"target_modules": names, "target_parameters": parameters})
    candidates.append({"target_modules": "|".join(map(re.escape, sorted(names))), "target_parameters": parameters})
    if not wanted:
        return replace(config, target_modules=set())
    ends = tied_paths(base) if effect.ties else {}
    for fields in candidates:
        pointed = replace(config, **fields)
        found = explain_targets(base, pointed)
        hit = {(ends.get(t.path, t.path), t.site.name) for t in found.targets}
        if hit == wanted and not found.refused and not found.unmatched:
            return pointed
    raise ValueError(f"{type(config).__name__} cannot stand at all of {sorted(u.name for u in effect.weights.values())}.")


@torch.no_grad()
def put(parts: Sequence[Part], effect: Effect, base: nn.Module) -> None:
    """Give the parts of an adapter, still without values, those of an effect."""
    retrained = {p.path: p for p in places(base) if isinstance(p, Retrained)}
    for part in parts:
        p, key = part.adapter, (part.path, part.key)
        if not isinstance(p, Adapter):
            place = retrained.get(part.path)
            own = _own_tensors(place) if place is not None else dict(part.module.state_dict(keep_vars=True))
            for name, change in effect.modules.get(part.path, {}).items():
                holder, _, leaf = name.rpartition(".")
                _set(p.get_submodule(holder), leaf, full(own[name]) + change)
        elif part.path in effect.tokens and isinstance(p.method, TrainableTokensConfig):
            tokens = effect.tokens[part.path]
            w = full(p.site.read()[0])
            own_rows = (w.mT if isinstance(p.site, Embedding) else w)[tokens.indices]
            _set(p, "trainable_tokens_delta", own_rows + tokens.rows)
        elif not isinstance(p.method, Tied):
            _put_update(p, effect.weights.get(key), effect.biases.get(key))
    for part in parts:
        materialise(part)


def _put_update(p: Adapter, update: Update | None, change: Tensor | None) -> None:
    if update is not None:
        change = update.bias
        if isinstance(p.method, LoraConfig):
            (a_name, b_name), (a, b) = p.method.names(p.site), update.factors()
            rank = p.declared[a_name].shape(p.site)[-2]
            _set(p, a_name, nn.functional.pad(a, (0, 0, 0, rank - a.shape[-2])))
            _set(p, b_name, nn.functional.pad(b, (0, rank - b.shape[-1])))
        else:
            _set(p, "diff", update.matrix())
    if p.trained_bias is not None:
        own = full(p.site.bias())  # type: ignore[arg-type]
        _set(p, "trained_bias", own if change is None else own + change)
        change = None
    for name in ("lora_B_bias", "diff_b"):
        if name in p.declared:
            shape = p.declared[name].shape(p.site)
            _set(p, name, torch.zeros(shape) if change is None else change.reshape(shape))


def _set(holder: nn.Module, name: str, value: Tensor) -> None:
    is_parameter = name in holder._parameters
    table: Any = holder._parameters if is_parameter else holder._buffers
    old = table[name]
    device = holder.site.device if isinstance(holder, Adapter) else value.device
    made = value.detach().to(device, old.dtype, copy=True).contiguous()
    table[name] = nn.Parameter(made, requires_grad=old.requires_grad) if is_parameter else made


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
