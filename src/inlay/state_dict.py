"""An adapter's tensors out of a model and into one, under the names and with the signatures of HF peft."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor, nn

from .core.inlaid import prompts_of, session_of
from .core.targets import bare_model
from .formats.filling import LoadReport, fill
from .formats.folder import read_tensors, weight_files
from .formats.saving import adapter_tensors
from .formats.slots import PREFIX, slots_of_model


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one adapter, by the keys that they have in a file.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into (whose keys then have no prefix).
        state_dict: take the values from this state dict of the model.
        adapter_name: which.
        unwrap_compiled: look through ``torch.compile``.
        save_embedding_layers: see `PeftModel.save_pretrained`.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    if adapter_name in prompts_of(model):
        from .prompts import prompt_tensors

        prompted: Any = model
        return prompt_tensors(prompted, adapter_name, state_dict, save_embedding_layers)
    base = bare_model(model)
    prefix = "" if base is model else PREFIX
    session = session_of(base)
    if session is None:
        raise ValueError("The model has no adapters to save.")
    return adapter_tensors(base, session, adapter_name, prefix=prefix, state_dict=state_dict, save_embedding_layers=save_embedding_layers)


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> LoadReport:
    """Give an adapter that is in place the values of a state dict, as other libraries do: what does not fit is reported.

    Returns:
        A report with ``missing_keys`` (live names) and ``unexpected_keys``.

    Raises:
        ValueError: shapes differ and ``ignore_mismatched_sizes`` is not set.
    """
    if adapter_name in prompts_of(model):
        from .prompts import load_prompt

        prompted: Any = model
        return load_prompt(prompted, adapter_name, peft_model_state_dict, False, ignore_mismatched_sizes)
    base = bare_model(model)
    slots = slots_of_model(base, adapter_name)
    live = {s.key: s.live for s in slots}
    report = fill(slots, base, peft_model_state_dict, adapter_name, strict=False, ignore_mismatched_sizes=ignore_mismatched_sizes)
    report.missing_keys = [live.get(k.removeprefix(PREFIX), k) for k in report.missing_keys]
    return report


def load_peft_weights(
    model_id: str, device: str | None = None, key_mapping: dict[str, str] | None = None, *, allow_pickle: bool = False, **hub: Any
) -> dict[str, Tensor]:
    """The tensors of an adapter's folder or repository.

    Args:
        device: where to; the CPU where None.
        key_mapping: regular expressions and replacements for keys, which then lose HF's prefix.
        allow_pickle: read an ``adapter_model.bin``, weights only.

    Raises:
        ValueError: there is no such file, or it is damaged.
    """
    tensors = read_tensors(weight_files(model_id, allow_pickle=allow_pickle, **hub), device or "cpu")
    if key_mapping:
        renamed = {}
        for key, tensor in tensors.items():
            key = key.removeprefix(PREFIX)
            for pattern, replacement in key_mapping.items():
                key = re.sub(pattern, replacement, key)
            renamed[key] = tensor
        tensors = renamed
    return tensors
