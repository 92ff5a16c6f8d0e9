"""What the adapters of a model are doing, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from .core.inlaid import host_of, places, prompts_of, session_of
from .core.place import host_class
from .core.retrained import AnyPlace, Retrained
from .core.session import Session
from .core.targets import bare_model

Irregular = Literal["irregular"]


@dataclass
class TunerLayerStatus:
    """One adapted layer.

    Attributes:
        name: the layer's name in the model.
        module_type: the host's type.
        enabled: whether adapters act at all.
        active_adapters, merged_adapters, available_adapters: names.
        requires_grad: by adapter; ``"irregular"`` where its tensors differ.
        devices: types of the devices that an adapter is on.
        quantization_backend: the store's name, or None.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None = None


@dataclass
class TunerModelStatus:
    """The whole model; fields as in `TunerLayerStatus`, with ``"irregular"`` where layers differ."""

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None = None


def _one(values: Iterable[bool | Irregular]) -> bool | Irregular:
    found = set(values)
    return found.pop() if len(found) == 1 else "irregular"


def _layer(
    name: str, kind: str, session: Session, adapters: Mapping[str, nn.Module], merged: Sequence[str] = (), backend: str | None = None
) -> TunerLayerStatus:
    tensors = {n: list(a.parameters()) for n, a in adapters.items()}
    return TunerLayerStatus(
        name=name,
        module_type=kind,
        enabled=session.enabled,
        active_adapters=list(session.active),
        merged_adapters=list(merged),
        requires_grad={n: _one(q.requires_grad for q in qs) for n, qs in tensors.items() if qs},
        available_adapters=sorted(adapters),
        devices={n: sorted({q.device.type for q in qs}) for n, qs in tensors.items()},
        quantization_backend=backend,
    )


def _of_place(place: AnyPlace, prefix: str) -> TunerLayerStatus:
    host = host_class(host_of(place))
    backend = None if isinstance(place, Retrained) or place.site.store.dense else type(place.site.store).__name__
    kind = f"{host.__module__.partition('.')[0]}.{host.__name__}"
    return _layer(f"{prefix}{place.path}", kind, place.session, place.adapters, place.merged, backend)


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapted layer of a model, wrapped or injected into.

    Raises:
        ValueError: the model has no adapters.
    """
    base = bare_model(model)
    session = session_of(base)
    if session is None:
        raise ValueError("This model has no adapters; set one into it with `get_peft_model`.")
    prompts = [_layer("prompt_encoder", "inlay.Prompt", session, prompts_of(model))] if prompts_of(model) else []
    return [*prompts, *(_of_place(p, "" if base is model else "model.") for p in places(base))]


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of the adapters of a model as a whole.

    Raises:
        ValueError: the model has no adapters.
    """
    layers = get_layer_status(model)
    base = bare_model(model)
    session = session_of(base)
    assert session is not None
    parameters = list(model.parameters())
    names: Sequence[str] = sorted({n for layer in layers for n in layer.available_adapters})
    merged = {tuple(layer.merged_adapters) for layer in layers}
    backends = {layer.quantization_backend for layer in layers}
    return TunerModelStatus(
        base_model_type=host_class(base).__name__,
        adapter_model_type="Prompt" if prompts_of(model) else "None" if base is model else type(model._modules["base_model"]).__name__,
        peft_types={n: str(c.peft_type) for n, c in session.configs.items()},
        trainable_params=sum(q.numel() for q in parameters if q.requires_grad),
        total_params=sum(q.numel() for q in parameters),
        num_adapter_layers=len(layers),
        enabled=session.enabled,
        active_adapters=list(session.active),
        merged_adapters=list(merged.pop()) if len(merged) == 1 else "irregular",
        requires_grad={n: _one(layer.requires_grad[n] for layer in layers if n in layer.requires_grad) for n in names},
        available_adapters=list(names),
        devices={n: sorted({d for layer in layers for d in layer.devices.get(n, ())}) for n in names},
        quantization_backend=backends.pop() if len(backends) == 1 else "irregular",
    )


__all__ = ["TunerLayerStatus", "TunerModelStatus", "get_layer_status", "get_model_status"]
