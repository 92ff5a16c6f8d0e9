"""Setting adapters into a model and taking them out again: all of it or nothing.

`attach` has everything planned and built before it touches the model. What fails, fails before that.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator

from torch import nn

from .config import PeftConfig
from .inlaid import host_of, inlay, places, seat, session_of, unseat
from .method import Method
from .place import Place
from .plan import Part, Plan, materialise
from .retrained import Retrained
from .session import BASE, Session, drop_choices
from .steps import watch
from .stores import store_of


def check_name(name: str, session: Session | None) -> None:
    """
    Raises:
        ValueError: the name is taken, or could not stand in a module's name or a folder's.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0]+", name) or name == BASE or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot name an adapter: use letters, digits, '-' and '_', and no name of a Python dict's method.")
    if session is not None and name in session.configs:
        raise ValueError(f"There is an adapter {name!r} already; delete it or choose another name.")


def attach(
    model: nn.Module,
    config: PeftConfig,
    name: str = "default",
    *,
    activate_it: bool = True,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    only: Collection[str] | None = None,
    fill: Callable[[list[Part]], object] | None = None,
    only_folds: bool = False,
) -> Session:
    """Set an adapter into a model.

    Args:
        model: the bare model, or one that has adapters.
        config: a method on weights; for a method on inputs only its ``modules_to_save`` are set in.
        name: what to call the adapter.
        activate_it: make it the active one.
        low_cpu_mem_usage: leave the tensors on the meta device, to be filled by a file.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        only: names of the modules to adapt, where the configuration is not to decide.
        fill: gives the tensors their values from a file. Nothing is allocated before it has seen the shapes.
        only_folds: see `Method.shared_to_fold`.

    Raises:
        ValueError: the name, a target or an option is wrong; the message says how to mend it. The model is untouched.
    """
    session = session_of(model)
    check_name(name, session)
    undo = config.rebuild(model) if isinstance(config, Method) else None
    try:
        # What was changed may be that other adapters have been set in.
        session = session_of(model) or Session()
        check_name(name, session)
        plan = Plan(model, config, low_cpu_mem_usage or fill is not None, autocast_adapter_dtype, only_folds)
        parts = plan.parts(only)
        if fill is not None:
            fill(parts)
            for part in parts:
                materialise(part)
    except BaseException:
        if undo is not None:
            undo()
        raise
    if undo is not None:
        session.undo[name] = undo
    for part in parts:
        if part.shares_weight_of is not None:
            part.adapter._parameters["weight"] = part.shares_weight_of.adapter._parameters["weight"]
    if not session.configs:
        for module in model.modules():
            store_of(module).adopt(module)
        own = {id(q) for q in _adapter_parameters(model)}
        session.frozen = [q for q in model.parameters() if q.requires_grad and id(q) not in own]
    for q in session.frozen:
        q.requires_grad_(False)
    for part in parts:
        _set_in(session, name, part)
    model.__dict__["_inlay_session"] = session
    if hasattr(config, "target_modules"):
        config.target_modules = plan.target_modules  # type: ignore[attr-defined]
    session.configs[name] = config
    if isinstance(config, Method) and config.acting().listens:
        session.listening.add(name)
    if not config.inference_mode:
        session.trainable.add(name)
    if activate_it or not session.active:
        activate(session, (name,), model)
    _show_trainable(model, session, (name,))
    watch(session, model)
    return session


def _set_in(session: Session, name: str, part: Part) -> None:
    place = part.module.__dict__.get("_inlay", {}).get(part.key)
    if place is None:
        place = Retrained(session, part.path, part.module) if part.site is None else Place(session, part.path, part.site)
        place.in_file = part.in_file
        inlay(part.module, place)
    seat(place, part.module, name, part.adapter)


def _adapter_parameters(model: nn.Module) -> Iterator[nn.Parameter]:
    for place in places(model):
        for adapter in place.adapters.values():
            yield from adapter.parameters()


def activate(session: Session, names: Iterable[str], model: nn.Module | None = None) -> None:
    """Make these the active adapters, in this order. What is trainable stays so; it takes gradients while it is active."""
    before, session.active = session.active, session.check(names)
    changed = {*before, *session.active}
    # Where none of them is trained there is nothing to show, however many layers and adapters there are.
    if model is not None and changed & session.trainable:
        _show_trainable(model, session, changed)


def _show_trainable(model: nn.Module, session: Session, names: Iterable[str]) -> None:
    for place in places(model):
        for name in names:
            if name in place.adapters:
                place.adapters[name].requires_grad_(name in session.trainable and name in session.active)


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model; with the last one the model is what it was, trainable parameters included."""
    session = session_of(model)
    if session is None:
        raise ValueError("The model has no adapters.")
    session.check((name,))
    for place in list(places(model)):
        if name in place.adapters:
            unseat(place, host_of(place), name)
    session.forget(name)
    del session.configs[name]
    if name in session.undo:
        session.undo.pop(name)()
    _show_trainable(model, session, session.active)
    if not session.configs:
        for q in session.frozen:
            q.requires_grad_(True)
        drop_choices(model)
        model.__dict__.pop("_inlay_session", None)
