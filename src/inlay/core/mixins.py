"""A method under one more idea: classes that are made when they are first needed, the idea's in front of the method's."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .method import Method

M = TypeVar("M", bound="Method")


@cache
def mixed_in(idea: type[Method], method: type[M]) -> type[M]:
    """``method`` with ``idea`` in front of it. The class is in no module, so its objects are pickled by the two."""
    body = {"__module__": method.__module__, "__reduce__": _reduced}
    return type(f"{idea.__name__}{method.__name__}", (idea, method), body)  # type: ignore[return-value]


def _reduced(self: Method) -> tuple[Any, ...]:
    return _revived, (*type(self).__bases__, self.__dict__)


def _revived(idea: type[Method], method: type[Method], state: dict[str, Any]) -> Method:
    made = object.__new__(mixed_in(idea, method))
    made.__dict__.update(state)
    return made
