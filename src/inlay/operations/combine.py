"""Several adapters of a model become one: adapters of any method, of different methods and ranks."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.attach import attach
from ..core.inlaid import adapters_of, places
from ..core.method import Method, matches
from ..core.param import generator_for
from ..core.plan import Part
from ..formats.filling import fill
from ..formats.saving import adapter_tensors
from ..formats.slots import slots_of_parts
from ..initializers.svd import precise
from ..methods.ia3 import IA3Config
from .adapter_of import config_for, put
from .arithmetic import COMBINATIONS, DENSITY, Combination, Options, combination, linear
from .cutting import check_rank, cut
from .effects import Effect, Key, Tokens, Update, base_and_configs, effects, nothing
from .slicing import Sliced, by_slices

Weights = Sequence[float] | Mapping[str, Sequence[float]]


@torch.no_grad()
def add_weighted_adapter(
    model: nn.Module,
    adapters: Sequence[str],
    weights: Weights,
    adapter_name: str,
    combination_type: str = "svd",
    svd_rank: float | None = None,
    svd_clamp: float | None = None,
    svd_full_matrices: bool = True,
    svd_driver: str | None = None,
    density: float | None = None,
    majority_sign_method: str = "total",
    *,
    gamma: float = 0.01,
    epsilon: float = 0.1,
    seed: int | None = None,
) -> None:
    """Add an adapter that is made of others. It is frozen; the active ones stay active.

    LoRA gives LoRA. What has no factors goes by what it changes in the weight, and gives a trained matrix (`FullConfig`) unless
    ``svd_rank`` asks for LoRA. Retrained biases, tokens and modules are combined by the same rule. One adapter alone comes back
    as it is, times its weight.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        adapters: names of adapters of any method.
        weights: a number an adapter, also negative; or such lists by pattern of module names, ``{"layers.0.*": [1, 0], ".*":
            [0.5, 0.5]}``, of which the first that matches holds.
        adapter_name: of the new adapter.
        combination_type: see `COMBINATIONS`, and ``inlay combine --help``.
        svd_rank: the rank of the result, or the share of the squared norm that is to stay; for the ``svd`` types the largest rank
            that comes in, where None.
        svd_clamp: limit factors that come of a decomposition to this quantile of their numbers.
        svd_full_matrices, svd_driver: for HF's signature; no full decomposition is made.
        density: the share of numbers that stays, for types that prune; 0.5 where None.
        majority_sign_method: ``"total"`` or ``"frequency"``, for types that elect signs.
        gamma, epsilon: of breadcrumbs and DELLA, see `Options`.
        seed: of what is drawn.

    Raises:
        ValueError: an adapter, the type or a number is wrong. The model is untouched.
        TypeError: a method is no function of the weight, and there is more than it alone.
    """
    base, configs = base_and_configs(model, adapters)
    chosen = combination(combination_type)
    if adapter_name in configs:
        warnings.warn(f"There is an adapter {adapter_name!r} already; it stays as it is. Delete it first to combine anew.", stacklevel=2)
        return
    check_combination(adapters, weights, density)
    options = Options(DENSITY if density is None else density, majority_sign_method, gamma, epsilon)
    check_rank(svd_rank)
    if svd_clamp is not None and not 0 <= svd_clamp <= 1:
        raise ValueError(f"`svd_clamp` is a quantile in [0, 1], not {svd_clamp!r}.")
    methods = [configs[name] for name in adapters]
    if len(adapters) == 1:
        chosen, svd_rank = COMBINATIONS["cat"], svd_rank if chosen.fixed_rank else None
        if svd_rank is None and all(list(_weights_at(weights, name, 1)) == [1] for name in _adapted(base, adapters[0])):
            _copy(base, adapters[0], adapter_name)
            return
    if _are_gains(base, adapters) and chosen.name in ("svd", "linear", "cat"):
        _add_gains(base, adapters, weights, adapter_name)
        return
    found = effects(base, adapters)
    rank = svd_rank
    if rank is None and chosen.fixed_rank:
        ranks = [u.rank for e in found for u in e.weights.values()]
        rank = None if None in ranks else max((r for r in ranks if r is not None), default=1)
    effect = combined(found, weights, chosen, options, rank, svd_clamp, seed)
    config = config_for(base, effect, methods)  # type: ignore[arg-type]
    _attach(base, config, adapter_name, lambda parts: put(parts, effect, base))


def check_combination(adapters: Sequence[str], weights: Weights, density: float | None) -> None:
    """
    Raises:
        ValueError: there are no adapters, or not a finite weight for each.
    """
    if not adapters:
        raise ValueError("There is nothing to combine: name at least one adapter.")
    for numbers in weights.values() if isinstance(weights, Mapping) else (weights,):
        if len(numbers) != len(adapters):
            raise ValueError(f"{len(numbers)} weights for {len(adapters)} adapters; give one a piece.")
        if not all(math.isfinite(number) for number in numbers):
            raise ValueError(f"The weights {list(numbers)} are not finite.")
    if density is not None and density > 1:
        warnings.warn(f"The density {density} is greater than 1: nothing is pruned.", stacklevel=3)


def _weights_at(weights: Weights, name: str, count: int) -> Sequence[float]:
    """The weights that hold at a module.

    Raises:
        ValueError: no pattern matches it.
    """
    if not isinstance(weights, Mapping):
        return weights
    found = next((numbers for pattern, numbers in weights.items() if matches(pattern, name)), None)
    if found is None and name:
        raise ValueError(f'No pattern of the weights matches {name!r}; end with ".*": [...] for all others.')
    return found or [0.0] * count


def _adapted(base: nn.Module, name: str) -> list[str]:
    """What patterns of weights see of an adapter."""
    found = [(place.path, place.adapters[name]) for place in places(base) if name in place.adapters]
    return [p.path if isinstance(p, Adapter) else path for path, p in found]


# ---- the combination ------------------------------------------------------------------------------------------------------
def combined(
    found: Sequence[Effect],
    weights: Weights,
    chosen: Combination,
    options: Options,
    rank: float | None,
    clamp: float | None,
    seed: int | None,
    sliced: bool = False,
) -> Effect:
    """One effect of several.

    Args:
        sliced: what they do to weights is not held where it has no factors.
    """

    def at(name: str) -> tuple[Tensor, Options]:
        w = torch.tensor([float(x) for x in _weights_at(weights, name, len(found))], dtype=torch.float64)
        return w, replace(options, generator=generator_for(seed, "combine", name))

    def tensors(name: str, given: Sequence[Tensor | None]) -> Tensor | None:
        """The rule on plain tensors, of which some adapters may have none."""
        like = next((t for t in given if t is not None), None)
        if like is None:
            return None
        w, o = at(name)
        return chosen.rule(torch.stack([torch.zeros_like(like) if t is None else t.to(like) for t in given]), w.to(like), o)

    def of_module(name: str, given: Sequence[Tensor | Sliced | None]) -> Tensor | Sliced | None:
        like = next((t for t in given if isinstance(t, Sliced)), None)
        if like is None:
            return tensors(name, given)  # type: ignore[arg-type]
        return _in_slices([like.zeros() if t is None else Sliced.of(t) for t in given], *at(name), chosen)

    result = Effect(ties=any(e.ties for e in found))
    for key in _keys([e.weights for e in found]):
        known = next(e.weights[key] for e in found if key in e.weights)
        updates = [e.weights.get(key) or nothing(known.name, known.site) for e in found]
        update = combined_at(updates, *at(known.name), chosen, sliced)
        if rank is not None:
            update, _ = cut(update, rank, clamp)
        update.bias = tensors(known.name, [u.bias for u in updates])
        result.weights[key] = update
    for key in _keys([e.biases for e in found]):
        change = tensors(key[0], [e.biases.get(key) for e in found])
        assert change is not None
        result.biases[key] = change
    for path in _keys([e.tokens for e in found]):
        result.tokens[path] = _tokens(path, [e.tokens.get(path) for e in found], tensors)
    for path in _keys([e.modules for e in found]):
        inside = [e.modules.get(path, {}) for e in found]
        names = {name: f"{path}.{name}".rpartition(".")[0] for name in _keys(inside)}
        changes = {name: of_module(known, [i.get(name) for i in inside]) for name, known in names.items()}
        result.modules[path] = {name: t for name, t in changes.items() if t is not None}
    return result


def _keys(tables: Sequence[Mapping[Any, Any]]) -> list[Any]:
    return list(dict.fromkeys(key for table in tables for key in table))


def _tokens(path: str, given: Sequence[Tokens | None], tensors: Any) -> Tokens:
    known = next(t for t in given if t is not None)
    indices = sorted({i for t in given if t is not None for i in t.indices})
    spread = []
    for t in given:
        rows = known.rows.new_zeros(len(indices), known.rows.shape[-1])
        if t is not None:
            rows[[indices.index(i) for i in t.indices]] = t.rows
        spread.append(rows)
    return Tokens(known.site, indices, tensors(path, spread))


def combined_at(updates: Sequence[Update], w: Tensor, o: Options, chosen: Combination, sliced: bool = False) -> Update:
    """One update of several at the same weight; its bias is left out."""
    name, site = updates[0].name, updates[0].site
    thin = all(u.a is not None for u in updates)
    if chosen.space == "factors" and all(u.free for u in updates):
        return _by_factors(updates, w, o, chosen)
    is_sum = chosen.space == "sum" or chosen.rule is linear
    if is_sum and thin:
        # What a linear rule makes of unit vectors are its coefficients.
        each = chosen.rule(torch.eye(len(updates), dtype=w.dtype), w, o).tolist()
        factors = [u.factors() for u in updates]
        return Update(
            name, site, torch.cat([a for a, _ in factors], -2), torch.cat([c * b for c, (_, b) in zip(each, factors, strict=True)], -1)
        )
    if chosen.space == "aligned":
        found = _aligned(updates, w, o, chosen)
    elif chosen.space == "core" or (chosen.space == "invariant" and thin):
        found = _in_core(updates, w, o, chosen)
    elif sliced:
        return Update(name, site, sliced=_in_slices([u.slices() for u in updates], w, o, chosen))
    else:
        stacked = torch.stack([u.matrix() for u in updates])
        return Update(name, site, dense=chosen.rule(stacked, w.to(stacked), o))
    return found if thin else Update(name, site, dense=found.matrix())


def _in_slices(given: Sequence[Sliced], w: Tensor, o: Options, chosen: Combination) -> Sliced:
    """The rule on tensors that are not held."""
    stacked = Sliced(given[0].shape, lambda piece: torch.stack([each.make(piece) for each in given]))
    if chosen.space != "invariant":
        return by_slices(chosen.rule, len(given), stacked, w, o)
    # All that such a rule sees of the tensors are their inner products; coordinates that have the same stand for them.
    products = torch.stack([precise(t.flatten(1)) @ precise(t.flatten(1)).mT for t in stacked]).sum(0)
    squares, directions = torch.linalg.eigh(products)
    points = directions * squares.clamp_min(0).sqrt() * (products.diagonal() > 0).unsqueeze(1)
    found = chosen.rule(points, w.to(points), o)
    return by_slices(linear, len(given), stacked, torch.linalg.pinv(points.mT) @ found, o)


def _by_factors(updates: Sequence[Update], w: Tensor, o: Options, chosen: Combination) -> Update:
    """A and B each by itself, as HF peft does: either gets the root of the weight, and A the sign."""
    rank = max(u.rank or 0 for u in updates)
    scaled = w * torch.tensor([u.scale for u in updates], dtype=w.dtype)
    root = scaled.abs().sqrt()
    a = torch.stack([nn.functional.pad(u.a, (0, 0, 0, rank - u.a.shape[-2])) for u in updates if u.a is not None])
    b = torch.stack([nn.functional.pad(u.b, (0, rank - u.b.shape[-1])) for u in updates if u.b is not None])
    sign = torch.where(scaled >= 0, 1.0, -1.0)
    return Update(updates[0].name, updates[0].site, chosen.rule(a, (root * sign).to(a), o), chosen.rule(b, root.to(b), o))


def _aligned(updates: Sequence[Update], w: Tensor, o: Options, chosen: Combination) -> Update:
    """The rule on ``V_i`` of ``[D_1, ..., D_n] = U S [V_1, ..., V_n]``, from factors alone."""
    factors = [u.factors() for u in updates]
    left, upper = torch.linalg.qr(precise(torch.cat([b for _, b in factors], -1)))
    parts = [up @ precise(a) for up, (a, _) in zip(upper.split([b.shape[-1] for _, b in factors], -1), factors, strict=True)]
    inside, s, right = torch.linalg.svd(torch.cat(parts, -1), full_matrices=False)
    there = s > s[..., :1] * 1e-9
    kept = max(int(there.sum(-1).max()), 1)
    u, s, right = (left @ inside)[..., :kept], s[..., :kept], right[..., :kept, :]
    v = torch.stack(right.chunk(len(updates), -1)) * there[..., :kept].unsqueeze(-1)
    return Update(updates[0].name, updates[0].site, chosen.rule(v, w.to(v), o).float(), (u * s.unsqueeze(-2)).float())


def _in_core(updates: Sequence[Update], w: Tensor, o: Options, chosen: Combination) -> Update:
    """The rule on ``M_i = U' D_i V``, between bases of all left and all right factors. Lengths and angles are those of ``D_i``."""
    factors = [u.factors() for u in updates]
    left = torch.linalg.svd(precise(torch.cat([b for _, b in factors], -1)), full_matrices=False)[0]
    right = torch.linalg.svd(precise(torch.cat([a for a, _ in factors], -2)), full_matrices=False)[2]
    cores = torch.stack([(left.mT @ precise(b)) @ (precise(a) @ right.mT) for a, b in factors])
    return Update(updates[0].name, updates[0].site, right.float(), (left @ chosen.rule(cores, w.to(cores), o)).float())


# ---- setting in -----------------------------------------------------------------------------------------------------------
def _attach(base: nn.Module, config: Method, name: str, values: Any) -> None:
    session = attach(base, config, name, activate_it=False, fill=values)
    session.trainable.discard(name)
    for place in places(base):
        if name in place.adapters:
            place.adapters[name].requires_grad_(False)


def _copy(base: nn.Module, source: str, name: str) -> None:
    """The same adapter under another name, of whatever method it is."""
    _, configs = base_and_configs(base, (source,))
    from ..core.inlaid import session_of

    session = session_of(base)
    assert session is not None
    config: Any = copy.deepcopy(configs[source])
    replicated = getattr(config, "layer_replication", None)
    if replicated:
        # The base is replicated already.
        config.layer_replication = None
    tensors = adapter_tensors(base, session, source, save_embedding_layers=False)
    _attach(base, config, name, lambda parts: fill(slots_of_parts(parts, name), base, tensors, name))
    if replicated:
        config.layer_replication = replicated
    for place in places(base):
        old, new = place.adapters.get(source), place.adapters.get(name)
        if isinstance(old, Adapter) and isinstance(new, Adapter):
            new.strength = old.strength


# ---- gains ----------------------------------------------------------------------------------------------------------------
def _are_gains(base: nn.Module, names: Sequence[str]) -> bool:
    """Whether all are (IA)^3 that agree at each layer on what is scaled, and nothing else."""
    seen: dict[Key, set[type]] = {}
    for name in names:
        for place in places(base):
            p = place.adapters.get(name)
            if p is None:
                continue
            if not isinstance(p, Adapter) or not isinstance(p.method, IA3Config) or p.trained_bias is not None or p.strength != 1:
                return False
            seen.setdefault((place.path, place.name), set()).add(type(p.method))
    return all(len(kinds) == 1 for kinds in seen.values())


def _add_gains(base: nn.Module, names: Sequence[str], weights: Weights, name: str) -> None:
    """(IA)^3 of weighted gains: what an adapter adds to a gain of one is weighted, so that weights of zero give the base. HF peft
    weighs gains themselves, which is the same where the weights' sum is one, and else scales the layer."""
    _, configs = base_and_configs(base, names)
    found: list[dict[str, Tensor]] = [{p.path: p.ia3_l.detach() for p in adapters_of(base, n)} for n in names]
    inputs = {p.path for n in names for p in adapters_of(base, n) if type(p.method) is not IA3Config}
    first: Any = configs[names[0]]
    targeting = ("target_modules", "feedforward_modules", "exclude_modules", "layers_to_transform", "layers_pattern")
    if all(getattr(configs[n], f) == getattr(first, f) for n in names for f in targeting):
        config = copy.deepcopy(first)
    else:
        config = replace(
            first, target_modules={*(path for f in found for path in f)}, feedforward_modules=inputs, exclude_modules=None,
            layers_to_transform=None, layers_pattern=None,
        )  # fmt: skip

    def values(parts: list[Part]) -> None:
        for part in parts:
            p: Any = part.adapter
            like = next(f[p.path] for f in found if p.path in f)
            each = _weights_at(weights, p.path, len(names))
            added = sum(w * (f[p.path] - 1) for w, f in zip(each, found, strict=True) if p.path in f)
            p._parameters["ia3_l"] = nn.Parameter((1 + torch.as_tensor(added)).to(like), requires_grad=False)

    _attach(base, config, name, values)
