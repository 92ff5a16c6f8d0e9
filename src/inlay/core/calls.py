"""A call of the whole model: what its adapters take from the arguments, and what they add to the loss."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from .inlaid import adapters_of, session_of
from .method import Method
from .session import Session


@contextmanager
def calling(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Hand to the adapters what they want to know of a call, and take from ``kwargs`` what is meant for them alone.

    Args:
        model: the bare model that holds the adapters.
    """
    session = session_of(model)
    # Only these are looked at, however many adapters are loaded.
    if session is None or not session.listening:
        yield
        return
    listening = {n: c.acting() for n in session.listening if isinstance(c := session.configs.get(n), Method)}
    choice = session.choice()
    acting = [n for n in choice.all if n in listening]
    call = {name: listening[name].given(model, args, kwargs) for name in acting}
    for key in {key for method in listening.values() for key in method.takes}:
        kwargs.pop(key, None)
    with session.calling(call):
        yield


def penalised(model: nn.Module, output: Any, training: bool) -> Any:
    """The model's output with the terms that its active adapters add to the loss in training."""
    session = session_of(model)
    if session is None or not session.adds_to_loss:
        return output
    added = []
    for name in session.choice().names if training and getattr(output, "loss", None) is not None else ():
        extra = penalty(model, name)
        if extra is not None:
            output.loss = output.loss + extra
            added.append(name)
    if added or session.in_loss:
        session.in_loss = tuple(added)
    return output


def _penalising(session: Session, name: str) -> Method | None:
    """The method of an adapter that has a term of the loss."""
    config = session.configs[name]
    method = config.acting() if isinstance(config, Method) else None
    return None if method is None or type(method).penalty is Method.penalty else method


def penalty(model: nn.Module, name: str) -> Tensor | None:
    """The term that an adapter adds to the loss in training; None where it adds none.

    Args:
        model: the bare model that holds it.
    """
    session = session_of(model)
    method = None if session is None else _penalising(session, name)
    return None if method is None else method.penalty(adapters_of(model, name))


def penalties(model: nn.Module) -> Tensor | float:
    """The terms that the active adapters add to the loss, for a trainer that makes its loss of logits.

    Args:
        model: the bare model that holds the adapters.
    """
    session = session_of(model)
    found: Tensor | float = 0.0
    for name in () if session is None else session.choice().names:
        extra = penalty(model, name)
        found = found if extra is None else found + extra
    return found


def not_in_loss(model: nn.Module, option: str, names: Sequence[str]) -> Tensor | float:
    """The term of the loss of those adapters that have an option set, for code that adds it by hand: without what the last call of
    the model has added to its loss, so that the sum has each term once.

    Args:
        model: the bare model that holds the adapters.
    """
    session = session_of(model)
    if session is None:
        return 0.0
    left = [name for name in names if name in session.configs and name not in session.in_loss]
    methods = {name: method for name in left if (method := _penalising(session, name)) is not None and getattr(method, option, None)}
    if not methods:
        return 0.0
    term = next(iter(methods.values())).penalty([p for name in methods for p in adapters_of(model, name)])
    return 0.0 if term is None else term
