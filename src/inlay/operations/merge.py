"""Merging: adapters go into the weights, and come out of them to the bit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ..core.inlaid import host_of, lift, places, session_of
from ..core.place import Place
from ..core.retrained import AnyPlace, Retrained
from ..core.session import Session, drop_choices
from ..core.targets import tied_paths
from ..core.tied import Tied


def merge(model: nn.Module, session: Session, names: Sequence[str] | None = None, safe_merge: bool = False) -> None:
    """Put adapters into the weights, in the order of ``names`` (the active ones where None), in full precision, rounded once.

    Merging starts from the base's own weights each time, so nothing drifts. The base's tensors are kept until `unmerge`.

    Raises:
        ValueError: no such adapter, or (``safe_merge``) a result that is not finite. No weight is changed.
        TypeError: a method cannot be merged, with the reason. No weight is changed.
    """
    names = session.active if names is None else session.check([names] if isinstance(names, str) else names)
    before = [(p, p.merged) for p in places(model)]
    try:
        put_in([(place, [*merged, *(n for n in names if n not in merged)]) for place, merged in before], safe_merge)
    except Exception:
        unmerge(model)
        put_in(before, check=False)
        raise
    tie_again(model)


def put_in(wanted: Sequence[tuple[AnyPlace, Sequence[str]]], check: bool) -> None:
    """Merge at each place these adapters. Where a module is retrained as a whole nothing else acts, so other adapters of its weights
    stay out, and come out before it goes in."""
    replaced = {part for p, names in wanted if isinstance(p, Retrained) and p.here(names) for part in p.module.modules()}
    for place, names in sorted(wanted, key=lambda each: isinstance(each[0], Retrained)):
        if isinstance(place, Place) and host_of(place) in replaced:
            place.unmerge()
        else:
            place.merge(names, check)


def tie_again(model: nn.Module) -> None:
    """Ends that share one adapter share the merged weight too."""
    found = list(places(model))
    by_adapter = {id(a): p for p in found if isinstance(p, Place) for a in p.adapters.values()}
    for place in found:
        if not isinstance(place, Place) or not place.merged:
            continue
        methods = [place.adapters[n].method for n in place.merged]
        if all(isinstance(m, Tied) for m in methods):
            source = by_adapter[id(methods[0].source)]  # type: ignore[attr-defined]
            host_of(place)._parameters["weight"] = host_of(source)._parameters["weight"]
    _tie_copies([p for p in found if isinstance(p, Retrained) and p.merged])


def _tie_copies(merged: Sequence[Retrained]) -> None:
    first: dict[int, nn.Module] = {}
    for place in merged:
        copied = place.adapters[place.merged[-1]]._parameters.get("weight")
        if copied is None:
            continue
        if id(copied) in first:
            place.module._parameters["weight"] = first[id(copied)]._parameters["weight"]
        first.setdefault(id(copied), place.module)


def unmerge(model: nn.Module) -> None:
    """Put the base's own tensors back."""
    for place in places(model):
        place.unmerge()


def unload(model: nn.Module, session: Session, keep_merged: bool) -> nn.Module:
    """Take all adapters out of a model; what is merged stays in the weights if ``keep_merged``."""
    had_ties = bool(tied_paths(model)) or any(p.merged for p in places(model))
    for place in list(places(model)):
        if keep_merged:
            place.settle()
        else:
            place.unmerge()
        lift(host_of(place), place.name)
    for q in session.frozen:
        q.requires_grad_(True)
    session.configs.clear()
    model.__dict__.pop("_inlay_session", None)
    if not keep_merged:
        for undo in session.undo.values():
            undo()
    session.undo.clear()
    drop_choices(model)
    for attribute in ("peft_config", "_hf_peft_config_loaded"):
        model.__dict__.pop(attribute, None)
    config: Any = getattr(model, "config", None)
    if had_ties and keep_merged and getattr(config, "tie_word_embeddings", False) and not tied_paths(model):
        # Only one of two tied weights was adapted: they are two weights now, and a file must hold both.
        config.tie_word_embeddings = False
    return model


__all__ = ["merge", "session_of", "unload", "unmerge"]
