"""A call of the whole model: what its adapters take from the arguments, and what they add to the loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from .inlaid import adapters_of, session_of
from .method import Method


@contextmanager
def calling(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
    """Hand to the adapters what they want to know of a call, and take from ``kwargs`` what is meant for them alone.

    Args:
        model: the bare model that holds the adapters.
    """
    session = session_of(model)
    methods = {n: c.acting() for n, c in session.configs.items() if isinstance(c, Method)} if session is not None else {}
    listening = {n: c for n, c in methods.items() if c.takes or type(c).given is not Method.given}
    if session is None or not listening:
        yield
        return
    choice = session.choice()
    acting = [n for n in choice.all if n in listening]
    call = {name: listening[name].given(model, args, kwargs) for name in acting}
    for key in {key for method in listening.values() for key in method.takes}:
        kwargs.pop(key, None)
    with session.calling(call):
        yield


def penalised(model: nn.Module, output: Any) -> Any:
    """The model's output with the terms that its active adapters add to the loss."""
    session = session_of(model)
    if session is None or getattr(output, "loss", None) is None:
        return output
    for name in session.choice().names:
        config = session.configs[name]
        method = config.acting() if isinstance(config, Method) else None
        if method is not None and type(method).penalty is not Method.penalty:
            extra = method.penalty(adapters_of(model, name))
            if extra is not None:
                output.loss = output.loss + extra
    return output
