"""A method under one more idea: classes that are made when they are first needed, the idea's in front of the method's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .method import Method

M = TypeVar("M", bound="Method")


@cache
def mixed_in(idea: type[Method], method: type[M]) -> type[M]:
    """``method`` with ``idea`` in front of it. The class is in no module, so its objects are pickled by what it is made of."""
    body = {"__module__": method.__module__, "__reduce__": _reduced, "mixed": (idea, method)}
    return type(f"{idea.__name__}{method.__name__}", (idea, method), body)  # type: ignore[return-value]


def _reduced(self: Method) -> tuple[Any, ...]:
    ideas, cls = [], type(self)
    while "mixed" in vars(cls):
        idea, cls = vars(cls)["mixed"]
        ideas.append(idea)
    return _revived, (tuple(ideas), cls, self.__dict__)


def _revived(ideas: tuple[type[Method], ...], cls: type[Method], state: dict[str, Any]) -> Method:
    for idea in reversed(ideas):
        cls = mixed_in(idea, cls)
    made = object.__new__(cls)
    made.__dict__.update(state)
    return made
