"""A forward pass and a generation with the prompts that this thread or task chose.

Everything that a call needs is in its arguments; the base is shared by all calls and none of them changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.inlaid import prompts_of
from ..core.session import names_of
from .apart import forward_apart, generate_apart, kinds
from .inputs import rows_of
from .method import PromptMethod

if TYPE_CHECKING:
    from ..model import PeftModel


def forward_with_prompt(peft_model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """The base's forward with the chosen prompts; arguments and outputs are the base's, over virtual tokens and input.

    Raises:
        ValueError: prompts of several methods act on one row, or there is no input.
    """
    base = peft_model.get_base_model()

    def run(inputs: dict[str, Any]) -> Any:
        if not _acts(peft_model):
            return base(**inputs)
        method, vectors, options = chosen(peft_model, inputs)
        return method.forward(base, inputs, vectors, options)

    inputs, groups = named(base.forward, args, kwargs), kinds(peft_model)
    return forward_apart(peft_model, inputs, groups, run) if groups else run(inputs)


def generate_with_prompt(peft_model: PeftModel, *args: Any, **kwargs: Any) -> Any:
    """The base's ``generate`` with the chosen prompts; the tokens that come back are those of the base, without virtual ones.

    Raises:
        ValueError: as for `forward_with_prompt`.
    """
    base = peft_model.get_base_model()
    inputs = named(base.generate, args, kwargs)  # type: ignore[arg-type]
    if inputs.get("inputs") is not None:
        inputs["input_ids"] = inputs.pop("inputs")
    if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
        inputs["input_ids"] = _beginning(base)

    def run(inputs: dict[str, Any]) -> Any:
        if not _acts(peft_model):
            return base.generate(**inputs)  # type: ignore[operator]
        method, vectors, _ = chosen(peft_model, inputs)
        return method.generate(base, inputs, vectors)

    groups = kinds(peft_model)
    return generate_apart(peft_model, inputs, groups, run) if groups else run(inputs)


def _acts(peft_model: PeftModel) -> bool:
    return any(name in prompts_of(peft_model) for name in peft_model.session.choice().all)


def named(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    return {**signature(function).bind_partial(*args).arguments, **kwargs} if args else dict(kwargs)


def _beginning(base: nn.Module) -> Tensor:
    """The token that a text begins with: ``(1, 1)``."""
    config: Any = getattr(base, "generation_config", None)
    token = getattr(config, "bos_token_id", None)
    if token is None:
        raise ValueError("Give `input_ids` to generate from; the base has no token that begins a text.")
    return torch.tensor([[token]], device=next(base.parameters()).device)


def chosen(peft_model: PeftModel, inputs: dict[str, Any]) -> tuple[PromptMethod, Tensor, dict[str, Any]]:
    """The method that acts here and now, its vectors ``(batch, tokens, dim)`` and its own options, taken out of the inputs.

    Several adapters follow each other in the order in which they were named. Rows may differ in their adapters.

    Raises:
        ValueError: the adapters cannot act in one batch.
    """
    choice = peft_model.session.choice()
    known = prompts_of(peft_model)
    prompts: dict[str, Any] = {n: known[n] for n in choice.all if n in known}
    methods: list[PromptMethod] = [p.method for p in prompts.values()]
    if len({m.peft_type for m in methods}) > 1:
        kinds = ", ".join(f"{n} is {m.peft_type}" for n, m in zip(prompts, methods, strict=True))
        raise ValueError(f"Prompts of several methods cannot act together ({kinds}); use one at a time.")
    options = {name: inputs.pop(name) for name in methods[0].options if name in inputs}
    batch = rows_of(inputs)
    found = {n: _for_rows(p.method.vectors(p, options), batch) for n, p in prompts.items()}
    if choice.rows is None:
        return methods[0], torch.cat([found[n] for n in choice.names if n in found], 1), options
    acting = {row: [found[n] for n in names_of(row) if n in found] for row in choice.rows}
    if batch % len(choice.rows):
        raise ValueError(f"{len(choice.rows)} adapter names were given for a batch of {batch}; give one for each row.")
    times = batch // len(choice.rows)
    each = (torch.cat([v[i] for v in acting[choice.rows[i // times]]]) for i in range(batch))
    return methods[0], torch.stack(list(each)), options


def _for_rows(vectors: Tensor, batch: int) -> Tensor:
    return vectors if vectors.ndim == 3 else vectors.expand(batch, *vectors.shape)
