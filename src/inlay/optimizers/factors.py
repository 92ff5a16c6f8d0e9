"""The trained factors of a model's active adapters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import nn
from torch.nn import Parameter

from ..core.adapter import Adapter
from ..core.additive import LowRank
from ..core.inlaid import adapters_of, session_of
from ..core.targets import bare_model


class Pair(NamedTuple):
    """The factors of one layer's update ``scaling * B A``: A is ``(*batch, r, in)`` and B ``(*batch, out, r)``."""

    a: Parameter
    b: Parameter
    scaling: float
    adapter: Adapter


def active_adapters(model: nn.Module) -> Iterator[Adapter]:
    """The adapters of the active names at all layers.

    Raises:
        ValueError: the model has none.
    """
    base = bare_model(model)
    session = session_of(base)
    if session is None:
        raise ValueError("The model has no adapters; call `get_peft_model` first.")
    for name in session.active:
        yield from adapters_of(base, name)


def factor_pairs(model: nn.Module, wanted_by: str) -> list[Pair]:
    """The pairs of factors that are parameters themselves.

    Raises:
        ValueError: no adapter has any; the message says why.
    """
    found, without = [], {}
    for p in active_adapters(model):
        method = p.method
        if not isinstance(method, LowRank):
            without[str(method.peft_type)] = "is no product of two factors"
            continue
        a, b = method.factors(p)
        if isinstance(a, Parameter) and isinstance(b, Parameter):
            found.append(Pair(a, b, method.scaling * p.strength, p))
        else:
            without[str(method.peft_type)] = "has factors that are computed from what is trained"
    if not found:
        why = "; ".join(f"the update of {name} {reason}" for name, reason in without.items()) or "no layer is adapted"
        raise ValueError(f"{wanted_by} works on two factors that are trained as they are, such as LoRA's, and finds none here: {why}.")
    return found
