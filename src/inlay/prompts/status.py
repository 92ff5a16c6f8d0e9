"""What can be asked of the prompts of a model: they are one layer, before the base's first."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ..status import TunerLayerStatus, TunerModelStatus, get_model_status
from .prompt import Prompt

if TYPE_CHECKING:
    from ..model import PeftModel


def prompt_layer_status(peft_model: PeftModel) -> TunerLayerStatus:
    """All prompts of a model.

    Raises:
        ValueError: the model has no adapters.
    """
    session = peft_model.session
    trained: dict[str, bool | Literal["irregular"]] = {}
    devices = {}
    for name, prompt in peft_model.prompt_encoder.items():
        flags = {q.requires_grad for q in prompt.parameters()}
        trained[name] = flags.pop() if len(flags) == 1 else "irregular"
        devices[name] = sorted({q.device.type for q in prompt.parameters()})
    return TunerLayerStatus(
        name="prompt_encoder",
        module_type=f"{Prompt.__module__.partition('.')[0]}.{Prompt.__name__}",
        enabled=session.enabled,
        active_adapters=list(session.active),
        merged_adapters=[],
        requires_grad=trained,
        available_adapters=sorted(trained),
        devices=devices,
    )


def prompt_model_status(peft_model: PeftModel) -> TunerModelStatus:
    """The whole model: its prompts and their retrained modules.

    Raises:
        ValueError: the model has no adapters.
    """
    prompts, rest = prompt_layer_status(peft_model), get_model_status(peft_model)
    trained = {n: flag if rest.requires_grad.get(n, flag) == flag else "irregular" for n, flag in prompts.requires_grad.items()}
    return replace(
        rest,
        adapter_model_type=Prompt.__name__,
        num_adapter_layers=1 + rest.num_adapter_layers,
        merged_adapters=[],
        requires_grad=trained,
        available_adapters=prompts.available_adapters,
        devices={n: sorted({*found, *rest.devices.get(n, ())}) for n, found in prompts.devices.items()},
        quantization_backend=None,
    )
