"""Prompts of a model: put in, filled from files, read out. The session of the base says who of them is active and trained."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from ..core.attach import attach
from ..core.config import PeftConfig
from ..core.plan import Part, adapter_dtype
from ..core.session import Session
from ..formats.filling import AdapterMismatch, LoadReport, fill, warn_of
from ..formats.saving import adapter_tensors
from ..formats.slots import PREFIX, Slot, slots_of_model, slots_of_parts
from .method import PromptMethod, words_of
from .prompt import Prompt

if TYPE_CHECKING:
    from ..model import PeftModel

# In front of the keys of retrained modules in a file; the prompts' own keys have nothing in front.
BASE_PREFIX = "base_model."


# ---- in and out ----------------------------------------------------------------------------------------------------------
def attach_prompt(
    peft_model: PeftModel,
    config: PeftConfig,
    adapter_name: str,
    activate_it: bool = True,
    autocast_adapter_dtype: bool = True,
    tensors: Mapping[str, Tensor] | None = None,
    strict: bool = True,
) -> Session:
    """Give a model one more prompt, and the retrained modules that belong to it.

    Args:
        peft_model: the model.
        config: a method on inputs.
        adapter_name: what to call the prompt.
        activate_it: make it the active one.
        autocast_adapter_dtype: float32 over a base in half precision.
        tensors: a file's, to be its values. Nothing is allocated before they fit.
        strict: refuse tensors that do not fit; False warns and takes those that do.

    Raises:
        ValueError: the name is taken, or configuration or tensors (`AdapterMismatch`) do not fit. The model is as it was.
    """
    if not isinstance(config, PromptMethod):
        raise ValueError(f"{config.peft_type} is no method on inputs.")
    base = peft_model.get_base_model()
    config.prepare(base)
    words = words_of(base)
    weight = next(words.parameters())
    method = config if tensors is None and not config.inference_mode else config.settled()
    prompt = Prompt(method, adapter_dtype(weight.dtype, autocast_adapter_dtype))

    def values(parts: list[Part]) -> None:
        slots = [*_own_slots(prompt, adapter_name), *slots_of_parts(parts, adapter_name)]
        warn_of(_fill(slots, base, tensors or {}, adapter_name, strict))
        # What a file leaves open starts as declared and no further: a file must not make its reader fetch a tokenizer.
        prompt.materialise(weight.device)

    if tensors is None:
        prompt.materialise(weight.device)
        with torch.no_grad():
            method.start(prompt, words)
    session = attach(
        base,
        config,
        adapter_name,
        activate_it=activate_it,
        autocast_adapter_dtype=autocast_adapter_dtype,
        fill=None if tensors is None else values,
    )
    if "prompt_encoder" not in peft_model._modules:
        peft_model.prompt_encoder = nn.ModuleDict()
    peft_model.prompt_encoder[adapter_name] = prompt.train(base.training)
    show_trainable(peft_model)
    return session


def show_trainable(peft_model: PeftModel) -> None:
    """Let those prompts take gradients that are trained and active."""
    session = peft_model.session
    for name, prompt in peft_model.prompt_encoder.items():
        prompt.requires_grad_(name in session.trainable and name in session.active)


# ---- files ---------------------------------------------------------------------------------------------------------------
def prompt_tensors(
    peft_model: PeftModel,
    name: str,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of one prompt by their keys in a file (``prompt_embeddings``), and its retrained modules (``base_model.<name>``).

    Args:
        peft_model: the model.
        name: the prompt.
        state_dict: take the values from this state dict of the model.
        save_embedding_layers: see `PeftModel.save_pretrained`.

    Raises:
        ValueError: no such prompt, or ``state_dict`` lacks a tensor of it.
    """
    base, session = peft_model.get_base_model(), peft_model.session
    session.check((name,))
    prompt = _prompt(peft_model, name)
    live = None
    if state_dict is not None:
        own = {k.rpartition(f"prompt_encoder.{name}.")[2]: t for k, t in state_dict.items() if f"prompt_encoder.{name}." in k}
        try:
            prompt = prompt.with_values(own)
        except RuntimeError as error:
            raise ValueError(f"The given state_dict does not hold the prompt {name!r}: {error}") from error
        live = {re.sub(r"^((module|_orig_mod|_fsdp_wrapped_module)\.)*base_model\.", "", k): t for k, t in state_dict.items()}
    with torch.no_grad():
        found = prompt.method.in_file(prompt)
    heads = adapter_tensors(base, session, name, prefix=BASE_PREFIX, state_dict=live, save_embedding_layers=save_embedding_layers)
    return {k: t.detach() for k, t in found.items()} | heads


def load_prompt(
    peft_model: PeftModel, name: str, tensors: Mapping[str, Tensor], strict: bool = True, ignore_mismatched_sizes: bool | None = None
) -> LoadReport:
    """Give a prompt that is in place the values of a file.

    Args:
        peft_model: the model.
        name: the prompt.
        tensors: by their keys in the file.
        strict: refuse tensors that do not fit; False takes those that do.
        ignore_mismatched_sizes: pass over tensors of other shapes; where None, if not ``strict``.

    Raises:
        AdapterMismatch: the tensors do not fit; nothing is changed.
    """
    peft_model.session.check((name,))
    base, prompt = peft_model.get_base_model(), _prompt(peft_model, name)
    settled = prompt.method.settled()
    live = prompt if settled is prompt.method else Prompt(settled, next(prompt.parameters()).dtype)
    slots = [*_own_slots(live, name), *slots_of_model(base, name)]
    report = _fill(slots, base, tensors, name, strict, ignore_mismatched_sizes)
    if live is not prompt:
        if any(s.tensor.is_meta for s in live.slots("")):
            return report
        # The file has what the network made, and not the network.
        live.materialise(next(prompt.parameters()).device)
        peft_model.prompt_encoder[name] = live.train(prompt.training)
        show_trainable(peft_model)
    with torch.no_grad():
        live.method.loaded(live)
    return report


def _prompt(peft_model: PeftModel, name: str) -> Prompt:
    return peft_model.prompt_encoder[name]  # type: ignore[return-value]


def _own_slots(prompt: Prompt, name: str) -> list[Slot]:
    return prompt.slots(f"prompt_encoder.{name}.")


def _fill(
    slots: Sequence[Slot],
    base: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    strict: bool,
    ignore_mismatched_sizes: bool | None = None,
) -> LoadReport:
    """`formats.state.fill` under the names that this kind of file has."""
    device = next(words_of(base).parameters()).device
    names = {k.removeprefix(BASE_PREFIX): k for k in tensors}
    plain = {k: tensors[name_in_file].to(device) for k, name_in_file in names.items()}
    own = {s.key for s in slots if s.live.startswith("prompt_encoder.")}

    def renamed(report: LoadReport) -> LoadReport:
        missing = [k.removeprefix(PREFIX) for k in report.missing_keys]
        return LoadReport(
            missing_keys=[k if k in own else BASE_PREFIX + k for k in missing],
            unexpected_keys=[names[k] for k in report.unexpected_keys],
            mismatched_keys=[(names[k], *shapes) for k, *shapes in report.mismatched_keys],  # type: ignore[misc]
            bad_keys=[names[k] for k in report.bad_keys],
        )

    if ignore_mismatched_sizes is None:
        ignore_mismatched_sizes = not strict
    try:
        return renamed(fill(slots, base, plain, name, strict=strict, ignore_mismatched_sizes=ignore_mismatched_sizes))
    except AdapterMismatch as error:
        raise AdapterMismatch(renamed(error.report)) from None
