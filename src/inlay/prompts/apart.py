"""Rows of one batch whose prompts are of several lengths or methods: each kind of rows runs by itself, and the outputs are joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..core.rows import WITHOUT_BATCH, Group, put_back, taken
from ..core.session import Row, names_of
from ..kernels.mixed import selector
from .generation import tokens_in
from .inputs import IGNORED_LABEL, setting

if TYPE_CHECKING:
    from ..model import PeftModel
    from .method import PromptMethod


def kinds(peft_model: PeftModel) -> tuple[Group, ...]:
    """The rows of this thread's or task's batch that can run together, for their prompts are of one method and one length; none is
    a kind of its own. Nothing where the whole batch is of one kind."""
    rows = peft_model.session.choice().rows
    if rows is None:
        return ()
    methods = _methods(peft_model)
    found: dict[tuple[tuple[str, ...], int], list[int]] = {}
    names: dict[tuple[tuple[str, ...], int], tuple[str, ...]] = {}
    for i, row in enumerate(rows):
        acting = tuple(name for name in names_of(row) if name in methods)
        length = sum(methods[name].num_virtual_tokens or 0 for name in acting)
        kind = tuple(sorted({str(methods[name].peft_type) for name in acting})), length
        found.setdefault(kind, []).append(i)
        names[kind] = tuple(dict.fromkeys((*names.get(kind, ()), *acting)))
    return tuple(Group(names[kind], tuple(mine)) for kind, mine in found.items()) if len(found) > 1 else ()


def _methods(peft_model: PeftModel) -> dict[str, PromptMethod]:
    prompts: Any = peft_model.prompt_encoder
    return {name: p.method for name, p in prompts.items()}


def forward_apart(peft_model: PeftModel, inputs: dict[str, Any], groups: Sequence[Group], run: Callable[..., Any]) -> Any:
    """The outputs of all rows; those of shorter prompts begin with zeros, so that the input's own positions stand one below the other.
    The loss is the mean over all that has a label. Attentions and caches, which are of several lengths, do not come back.

    Args:
        run: the forward pass of rows of one kind.

    Raises:
        ValueError: a cache is wanted or given, or a method makes a loss of its own.
    """
    if tokens_in(inputs.get("past_key_values")) or inputs.get("use_cache") or inputs.get("encoder_outputs") is not None:
        raise ValueError(_apart(peft_model, groups, "a cache or an encoder's output of one length. Use `generate`"))
    methods = _methods(peft_model)
    if inputs.get("labels") is not None and any(methods[name].own_loss for group in groups for name in group.names):
        raise ValueError(_apart(peft_model, groups, "one loss, where a method makes its own. Take the logits"))
    as_tuple = inputs.get("return_dict") is False
    outputs, counts = [], []
    for group, own in _each(peft_model, inputs | {"return_dict": True}, groups):
        outputs.append(run(own))
        counts.append(_labelled(peft_model, own, bool(group.names)))
    joined = {key: _joined(groups, [o[key] for o in outputs]) for key in outputs[0] if key != "loss" and all(key in o for o in outputs)}
    found = {key: value for key, value in joined.items() if value is not None}
    if all(o.get("loss") is not None for o in outputs):
        found = {"loss": _mean([o["loss"] for o in outputs], counts, "num_items_in_batch" in inputs), **found}
    return tuple(found.values()) if as_tuple else type(outputs[0])(**found)


def generate_apart(peft_model: PeftModel, inputs: dict[str, Any], groups: Sequence[Group], run: Callable[..., Any]) -> Tensor:
    """The tokens of all rows, filled up on the right.

    Args:
        run: the generation of rows of one kind.

    Raises:
        ValueError: more than tokens is asked for, or they are wanted while they come.
    """
    base, given = peft_model.get_base_model(), inputs.get("generation_config")
    for name in ("streamer", "return_dict_in_generate"):
        if setting(name, inputs, given, base):
            raise ValueError(_apart(peft_model, groups, f"one generation for `{name}`. Leave it out"))
    ends = setting("eos_token_id", inputs, given, base)
    padding = setting("pad_token_id", inputs, given, base)
    filling = padding if padding is not None else ends[0] if isinstance(ends, (list, tuple)) else ends
    outputs = [run(own) for _, own in _each(peft_model, inputs, groups)]
    longest = max(o.shape[1] for o in outputs)
    filled = [pad(o, (0, longest - o.shape[1]), value=filling or 0) for o in outputs]
    return put_back(groups, filled, len(outputs[0]) // len(groups[0].rows))


def _each(peft_model: PeftModel, inputs: dict[str, Any], groups: Sequence[Group]) -> Any:
    """Each group with its rows of the arguments, while these rows are the choice of this thread or task."""
    session = peft_model.session
    rows: tuple[Row, ...] = session.choice().rows or ()
    methods = _methods(peft_model)
    options = {option for method in methods.values() for option in method.options}
    for group in groups:
        known = methods[group.names[0]].options if group.names else ()
        own = {}
        for name, value in inputs.items():
            if name not in options or name in known:
                like = isinstance(value, Tensor) and name not in WITHOUT_BATCH
                own[name] = taken(value, selector(group.rows, 1, value.device), len(rows)) if like else value
        with session.local(rows=[rows[i] for i in group.rows]):
            yield group, own


def _joined(groups: Sequence[Group], parts: Sequence[Any]) -> Any:
    """One tensor, or a tuple of such, with the input's positions at its end; None where lengths differ in another way."""
    if isinstance(parts[0], (tuple, list)):
        found = [_joined(groups, each) for each in zip(*parts, strict=True)]
        return None if any(t is None for t in found) else tuple(found)
    if not isinstance(parts[0], Tensor) or not parts[0].ndim:
        return None
    if len({p.shape[1:] for p in parts}) > 1:
        if len({p.shape[2:] for p in parts}) > 1:
            return None
        longest = max(p.shape[1] for p in parts)
        # A score for each position must not be one for a position that is none.
        nothing = torch.finfo(parts[0].dtype).min if parts[0].ndim == 2 else 0.0
        parts = [pad(p, (0, 0) * (p.ndim - 2) + (longest - p.shape[1], 0), value=nothing) for p in parts]
    return put_back(groups, parts, 1)


def _labelled(peft_model: PeftModel, inputs: dict[str, Any], prompted: bool) -> int:
    """How many labels the loss of these rows is the mean over."""
    labels = inputs.get("labels")
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return next(len(t) for name, t in inputs.items() if isinstance(t, Tensor) and t.ndim and name not in WITHOUT_BATCH)
    # The first token has something in front that it is predicted from where that is a virtual one.
    shifted = getattr(peft_model.get_base_model(), "loss_type", None) == "ForCausalLM" and not prompted
    return int(((labels[:, 1:] if shifted else labels) != IGNORED_LABEL).sum())


def _mean(losses: Sequence[Tensor], counts: Sequence[int], summed: bool) -> Tensor:
    """The loss of the whole batch. Losses of no label at all are not numbers.

    Args:
        summed: the losses are shares of one sum already.
    """
    there = [(loss, count) for loss, count in zip(losses, counts, strict=True) if count]
    if not there:
        return losses[0]
    whole = sum(count for _, count in there)
    return torch.stack([loss if summed else loss * (count / whole) for loss, count in there]).sum()


def _apart(peft_model: PeftModel, groups: Sequence[Group], what: str) -> str:
    """Why something cannot be."""
    methods, rows = _methods(peft_model), peft_model.session.choice().rows or ()
    firsts = [rows[group.rows[0]] for group in groups]
    lengths = [sum(methods[n].num_virtual_tokens or 0 for n in names_of(row)) for row in firsts]
    told = ", ".join(f"{' and '.join(names_of(row)) or row}: {n}" for row, n in zip(firsts, lengths, strict=True))
    return f"Rows with prompts of several kinds (virtual tokens are {told}) have not {what}, or run them as batches of their own."
