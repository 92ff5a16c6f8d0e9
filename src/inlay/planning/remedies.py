"""What would make a step fit into a memory that it does not fit into."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from .step import MemoryPlan, Setting


@dataclass(frozen=True)
class Remedy:
    """
    Attributes:
        change: the settings that differ from the one before.
        plan: what all changes up to this one come to.
        fits: whether that is little enough.
    """

    change: dict[str, Any]
    plan: MemoryPlan
    fits: bool


def remedies(planned: MemoryPlan, again: Callable[[Setting], MemoryPlan], memory: int) -> list[Remedy]:
    """Changes one after the other, those first that cost least, until the step fits; a change that saves nothing is left out.

    Args:
        planned: what does not fit.
        again: plans another setting.
        memory: of one device.
    """
    found: list[Remedy] = []
    for change in _changes(planned.setting):
        setting = planned.setting if not found else found[-1].plan.setting
        new = again(replace(setting, **change))
        if new.bytes < (found[-1].plan if found else planned).bytes:
            found.append(Remedy(change, new, new.bytes <= memory))
        if new.bytes <= memory:
            break
    return found


def _changes(setting: Setting) -> Iterator[dict[str, Any]]:
    if not setting.gradient_checkpointing:
        yield {"gradient_checkpointing": True}
    batch, steps = setting.batch_size, setting.grad_accum
    while batch > 1:
        batch, steps = batch // 2, steps * 2
        yield {"batch_size": batch, "grad_accum": steps}
    if setting.dtype == "float32":
        yield {"dtype": "bfloat16"}
    if setting.quantization == "none":
        yield {"quantization": "nf4"}
    if setting.loss == "model":
        yield {"loss": "chunked"}
    if setting.devices > 1 and setting.sharding == "ddp":
        yield {"sharding": "fsdp"}
    length = setting.seq_length
    while length > 256:
        length //= 2
        yield {"seq_length": length}
