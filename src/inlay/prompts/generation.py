"""Generations with something put in at their first step. The base's own loop runs, on a second module over the same tensors:
the base itself is shared by all calls, and none of them changes it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor, nn

Model = TypeVar("Model", bound=nn.Module)


def twin(module: Model, **own: Any) -> Model:
    """A second module of the same class over the same parts, with attributes of its own."""
    other = object.__new__(type(module))
    other.__dict__ = {**vars(module), **own}
    return other


def generating(base: nn.Module, length: int, prepare: Callable[..., dict[str, Any]]) -> nn.Module:
    """The base with another ``prepare_inputs_for_generation``.

    Args:
        base: a model of transformers.
        length: how many more positions a cache of fixed size must hold.
        prepare: is given the base's own function, the tokens and the arguments.
    """
    own: Any = base.prepare_inputs_for_generation
    size: Any = base._prepare_static_cache

    @functools.wraps(own)
    def prepared(input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        return prepare(own, input_ids, **kwargs)

    @functools.wraps(size)
    def sized(*args: Any, max_cache_len: int, **kwargs: Any) -> Any:
        return size(*args, max_cache_len=max_cache_len + length, **kwargs)

    return twin(base, prepare_inputs_for_generation=prepared, _prepare_static_cache=sized)


def tokens_in(cache: Any) -> int:
    """How many tokens a cache holds."""
    return 0 if cache is None else int(cache.get_seq_length())


def for_rows(vectors: Tensor, rows: int) -> Tensor:
    """``(rows, ...)``: each row of the caller's as often as beams or samples are made of it."""
    return vectors if len(vectors) == rows else vectors.repeat_interleave(rows // len(vectors), 0)
