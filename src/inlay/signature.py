"""The base's own signature on the forward of the model around it: trainers read from it which columns of a dataset the model takes."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn


def show_signature(model: nn.Module, base: nn.Module) -> None:
    """Give a model a ``forward`` that does what its class's does and shows the arguments that the base takes.

    It sits on the instance and is a method of it, so that copies and pickles of the model have their own.
    """
    made = _like(type(model).forward, type(base).forward)  # type: ignore[arg-type]
    if made is not None:
        model.__dict__["forward"] = types.MethodType(made, model)


def twin(function: types.FunctionType) -> types.FunctionType:
    """A second function that runs the same code, to be shown in another way."""
    made = types.FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__, made.__doc__, made.__qualname__ = function.__kwdefaults__, function.__doc__, function.__qualname__
    return made


@cache
def _like(forward: types.FunctionType, shown: Callable[..., Any]) -> types.FunctionType | None:
    """A function that runs as one and shows the parameters of another beside its own; None where those cannot be read."""
    try:
        theirs = [p for p in list(inspect.signature(shown).parameters.values())[1:] if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    except (TypeError, ValueError):
        return None
    own = inspect.signature(forward)
    kinds = {p.kind: p for p in own.parameters.values()}
    first = next(iter(own.parameters.values()))
    named = [p for p in theirs if p.kind is not p.KEYWORD_ONLY and p.name not in own.parameters]
    keyword = [p for p in theirs if p.kind is p.KEYWORD_ONLY and p.name not in own.parameters]
    options = [p for p in own.parameters.values() if p.kind is p.KEYWORD_ONLY]
    rest = [kinds[k] for k in (inspect.Parameter.VAR_KEYWORD,) if k in kinds]
    made = twin(forward)
    if any(p.default is p.empty for p in named) and any(p.default is not p.empty for p in named):
        named = [p.replace(default=None) if p.default is p.empty else p for p in named]
    made.__signature__ = own.replace(parameters=[first, *named, *keyword, *options, *rest])  # type: ignore[attr-defined]
    return made
