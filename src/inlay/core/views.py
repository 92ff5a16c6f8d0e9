"""What other libraries expect to find on an adapted layer: HF peft's names, as thin views of the places behind them.

State lives in `Place` and `Session`; nothing here stores anything.
"""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .place import Place
    from .retrained import AnyPlace


class view:
    """A read-only attribute that gives way to one of the same name on the instance, which a property would hide."""

    def __init__(self, get: Any) -> None:
        self.get, self.__doc__ = get, get.__doc__

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self if instance is None else self.get(instance)


def _names(adapter_names: str | Sequence[str]) -> tuple[str, ...]:
    return (adapter_names,) if isinstance(adapter_names, str) else tuple(adapter_names)


class TunerLayer(nn.Module):
    """HF's ``BaseTunerLayer``: an adapted layer. ``isinstance`` holds for every layer that Inlay has set adapters into."""

    @property
    def _places(self) -> dict[str, AnyPlace]:
        return self.__dict__["_inlay"]

    @property
    def _place(self) -> AnyPlace:
        return next(iter(self._places.values()))

    # -- the base --
    def get_base_layer(self) -> nn.Module:
        """The layer without its adapters: a module of the host's own class that holds the very same tensors."""
        from .inlaid import bare

        return bare(self)

    @view
    def base_layer(self) -> nn.Module:
        return self.get_base_layer()

    # -- who is active --
    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Choose the active adapters of the whole model: there is one record of it, the session."""
        from .attach import activate

        session = self._place.session
        activate(session, _names(adapter_names))
        for place in self._places.values():
            for name, adapter in place.adapters.items():
                adapter.requires_grad_(name in session.trainable and name in session.active)

    def enable_adapters(self, enabled: bool) -> None:
        self._place.session.enabled = enabled

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        for name in _names(adapter_names):
            for place in self._places.values():
                if name in place.adapters:
                    place.adapters[name].requires_grad_(requires_grad)

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out of this layer. Others call this for each layer, so the adapter is no longer active anywhere."""
        from .inlaid import unseat

        session = self._place.session
        session.forget(adapter_name)
        for place in list(self._places.values()):
            if adapter_name in place.adapters:
                unseat(place, self, adapter_name)

    @view
    def active_adapters(self) -> list[str]:
        return list(self._place.session.active)

    @view
    def active_adapter(self) -> str | list[str]:
        return self._place.session.shown

    @view
    def disable_adapters(self) -> bool:
        return not self._place.session.enabled

    # -- merging --
    @view
    def merged_adapters(self) -> list[str]:
        return list(self._place.merged)

    @view
    def merged(self) -> bool:
        return bool(self._place.merged)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        session = self._place.session
        for place in self._places.values():
            place.merge(session.active if adapter_names is None else session.check(adapter_names), safe_merge)

    def unmerge(self) -> None:
        for place in self._places.values():
            place.unmerge()

    def get_delta_weight(self, adapter: str) -> Tensor:
        """What the adapter adds to the weight, in the host's own shape."""
        site = self._place.site  # type: ignore[union-attr]
        with torch.no_grad():
            return site.raw(self._place.fold((adapter,))[0] - self._place.site.read()[0])  # type: ignore[union-attr]

    # -- strength --
    def _each(self, names: Sequence[str]) -> Iterator[tuple[Place, str]]:
        from .place import Place

        for place in self._places.values():
            if isinstance(place, Place):
                yield from ((place, n) for n in names if n in place.adapters)

    def set_scale(self, adapter: str, scale: float) -> None:
        """Set the strength of an adapter on this layer: 0 is the base, 1 the adapter."""
        for place, name in self._each((adapter,)):
            place.set_strength(name, scale)

    def scale_layer(self, scale: float) -> None:
        """Multiply the strength of the active adapters."""
        for place, name in self._each(self._place.session.active):
            place.set_strength(name, place.adapters[name].strength * scale)

    def unscale_layer(self, scale: float | None = None) -> None:
        """Undo `scale_layer`; without a value, go back to strength 1."""
        for place, name in self._each(self._place.session.active):
            place.set_strength(name, 1.0 if scale is None else place.adapters[name].strength / scale)

    # -- the adapters' own attributes, by name of adapter --
    @view
    def adapter_layer_names(self) -> tuple[str, ...]:
        found = {name: None for place, n in self._each(tuple(self._place.adapters)) for name in place.adapters[n].declared}
        return tuple(found)

    @view
    def in_features(self) -> int:
        return self._place.site.size("in")  # type: ignore[union-attr]

    @view
    def out_features(self) -> int:
        return self._place.site.size("out")  # type: ignore[union-attr]


def per_adapter(attribute: str) -> view:
    """A dictionary ``{adapter: field of its method}``, as HF keeps ``layer.r`` or ``layer.lora_alpha``."""

    def get(layer: Any) -> dict[str, Any]:
        return {n: getattr(p.method, attribute) for n, p in layer._place.adapters.items() if hasattr(p.method, attribute)}

    return view(get)


class TensorView(MutableMapping[str, Any]):
    """``layer.lora_A["default"].weight``: the tensors of one name over the adapters of a layer, shaped as in a file."""

    def __init__(self, place: Place, name: str) -> None:
        self.place, self.name = place, name

    def __getitem__(self, adapter: str) -> Any:
        p = self.place.adapters[adapter]
        tensor = getattr(p, self.name)
        return tensor if p.declared[self.name].key in (None, self.name) else Weight(tensor)

    def __iter__(self) -> Iterator[str]:
        return (n for n, p in self.place.adapters.items() if self.name in getattr(p, "declared", ()))

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __contains__(self, adapter: object) -> bool:
        return adapter in set(self)

    def __setitem__(self, adapter: str, value: Any) -> None:
        own, value = getattr(self.place.adapters[adapter], self.name), getattr(value, "weight", value)
        with torch.no_grad():
            # Values of another device move the tensor there.
            own.data = own.data.to(value.device)
            own.copy_(value)

    def __delitem__(self, adapter: str) -> None:
        raise TypeError(f"Delete the adapter {adapter!r} with `delete_adapter`; one tensor of it cannot go alone.")


class Weight:
    """Stands for the ``nn.Linear`` that HF keeps a factor in."""

    bias = None

    def __init__(self, weight: nn.Parameter) -> None:
        self.weight = weight

    def parameters(self) -> Iterator[nn.Parameter]:
        yield self.weight

    def to(self, *args: Any, **kwargs: Any) -> Weight:
        """Move or convert the adapter's own tensor, in place as ``nn.Module.to`` does."""
        self.weight.data = self.weight.data.to(*args, **kwargs)
        return self

    def __call__(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.weight)


class Scaling(MutableMapping[str, float]):
    """``layer.scaling["default"]``: the factor in front of an adapter; setting it sets the strength."""

    def __init__(self, place: Place) -> None:
        self.place = place

    def _own(self, adapter: str) -> float:
        return getattr(self.place.adapters[adapter].method, "scaling", 1.0)

    def __getitem__(self, adapter: str) -> float:
        return self._own(adapter) * self.place.adapters[adapter].strength

    def __setitem__(self, adapter: str, value: float) -> None:
        self.place.set_strength(adapter, float(value) / self._own(adapter))

    def __iter__(self) -> Iterator[str]:
        return iter(self.place.adapters)

    def __len__(self) -> int:
        return len(self.place.adapters)

    def __delitem__(self, adapter: str) -> None:
        raise TypeError("A scaling cannot be deleted without its adapter.")


def tensors(name: str) -> view:
    return view(lambda layer: TensorView(layer._place, name))


for _name in ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector"):
    setattr(TunerLayer, _name, tensors(_name))
for _name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "lora_bias"):
    setattr(TunerLayer, _name, per_adapter(_name))
TunerLayer.scaling = view(lambda layer: Scaling(layer._place))  # type: ignore[attr-defined]
