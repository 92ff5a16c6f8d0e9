"""HF's classes of adapted layers. Here they are questions: an instance is any layer whose places have adapters of that kind.

A layer keeps its own type, whichever adapters it has; so membership is looked up and not inherited.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import nn

from ..core.adapter import Adapter
from ..core.inlaid import Inlaid
from ..core.method import METHODS, Method
from ..core.retrained import AnyPlace, Retrained
from ..core.tied import Tied
from ..core.views import TunerLayer
from .keys import load_map


def _places(module: Any) -> Iterator[AnyPlace]:
    if isinstance(module, Inlaid):
        yield from module._inlay.values()


def _methods(module: Any) -> Iterator[Method]:
    """The methods of the adapters on a layer; an end that is tied to another layer has that one's."""
    for place in _places(module):
        for adapter in place.adapters.values():
            if isinstance(adapter, Adapter):
                method = adapter.method
                yield method.source.method if isinstance(method, Tied) and method.source is not None else method


def _is_part(method: Method) -> bool:
    """Whether it only goes with another method: biases and tokens that are trained beside it."""
    return method.peft_type is None or bool(getattr(method, "as_part", False))


class _Kind(type):
    """Classes whose instances are found by their ``holds``."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, nn.Module) and cls.holds(instance)  # type: ignore[attr-defined]


class BaseTunerLayer(TunerLayer, metaclass=_Kind):
    """A layer with an adapter of any method on weights."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return any(not _is_part(m) for m in _methods(module))


class AuxiliaryTrainingWrapper(TunerLayer, metaclass=_Kind):
    """A layer with tensors whose names in the model do not follow from those in a file by the method's prefix: retrained copies,
    tokens, biases, several parameters of one module."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        names = {name for place in _places(module) for name in place.adapters}
        return any(load_map(module, name) for name in names)


class ModulesToSaveWrapper(TunerLayer, metaclass=_Kind):
    """A module that is retrained as a whole."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return any(isinstance(place, Retrained) for place in _places(module))


class TrainableTokensWrapper(TunerLayer, metaclass=_Kind):
    """An embedding some rows of which are retrained beside a method."""

    @staticmethod
    def holds(module: nn.Module) -> bool:
        return any(getattr(m, "as_part", False) for m in _methods(module))


# Layers that other libraries ask for by name, with the tensors that HF lists for them.
_NAMED = {
    "LORA": ("LoraLayer", ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")),
    "LOHA": ("LoHaLayer", ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")),
    "LOKR": ("LoKrLayer", ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")),
}
_HOSTS: dict[str, type[nn.Module]] = {
    cls.__name__: cls for cls in (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
}


@cache
def kind(peft_type: str) -> type[Any]:
    """The layers with an adapter of one method: ``LoraLayer``, ``IA3Layer``, ..."""
    name, tensors = _NAMED.get(peft_type, ("", ()))
    name = name or f"{METHODS[peft_type].__name__.removesuffix('Config')}Layer"

    def holds(module: nn.Module) -> bool:
        return any(m.peft_type == peft_type and not _is_part(m) for m in _methods(module))

    return _Kind(name, (TunerLayer,), {"holds": staticmethod(holds), "adapter_layer_names": tensors, "__module__": __name__})


@cache
def kind_on(peft_type: str, host: str) -> type[Any] | None:
    """The layers of one method on hosts of one type: ``peft.tuners.lora.Linear``. None for an unknown type."""
    if host not in _HOSTS:
        return None
    any_host = kind(peft_type)

    def holds(module: nn.Module) -> bool:
        return isinstance(module, _HOSTS[host]) and isinstance(module, any_host)

    return _Kind(host, (any_host,), {"holds": staticmethod(holds), "__module__": __name__})


LoraLayer, LoHaLayer, LoKrLayer = (kind(t) for t in _NAMED)
