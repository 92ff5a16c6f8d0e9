"""Several adapters trained over one frozen base in one pass: each on its own rows, with its own loss, optimiser and clipping.

The base, which is most of the work, sees one large batch. The gradients of an adapter are those of a run of its own, since no row
of another's reaches it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .core.calls import penalty
from .core.inlaid import places, prompts_of

if TYPE_CHECKING:
    from .model import PeftModel

Batch = Mapping[str, Tensor]


def next_token_loss(logits: Tensor, batch: Batch) -> Tensor:
    """The mean cross-entropy of the next token over ``batch["labels"]``, -100 left out.

    Args:
        logits: ``(rows, length, vocabulary)``.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), ignore_index=-100)


@dataclass
class Job:
    """How one adapter is trained.

    Args:
        optimizer: of its parameters and of no other's.
        loss: of ``logits (rows, length, vocabulary)`` and its batch.
        max_grad_norm: clips the norm of its gradient; None leaves it.
        scheduler: stepped after the optimiser, if there is one.
    """

    optimizer: torch.optim.Optimizer
    loss: Callable[[Tensor, Batch], Tensor] = next_token_loss
    max_grad_norm: float | None = None
    scheduler: Any = None


def parameters_of(model: PeftModel, adapter_name: str) -> list[nn.Parameter]:
    """The trainable tensors of one adapter, for its optimiser."""
    model.session.check((adapter_name,))
    found = [place.adapters[adapter_name] for place in places(model.get_base_model()) if adapter_name in place.adapters]
    prompts = prompts_of(model)
    return [q for adapter in (*found, *(prompts[n] for n in prompts if n == adapter_name)) for q in adapter.parameters()]


def step_together(model: PeftModel, jobs: Mapping[str, Job], batches: Mapping[str, Batch]) -> dict[str, float]:
    """One step of every adapter that has a batch.

    Args:
        model: has the adapters; all of them active (``model.set_adapter([...])``), so that they take gradients.
        jobs: by adapter.
        batches: by adapter: ``input_ids``, and what else the model takes, each ``(rows, length)``. Lengths may differ.

    Returns:
        The loss of each adapter, with what its method adds to it in training.

    Raises:
        ValueError: an adapter has no job or is not active, or only some batches have an argument of the model.
    """
    if not batches:
        raise ValueError("There is no batch; give one for each adapter that takes a step.")
    for name in batches:
        if name not in jobs:
            raise ValueError(f"There is a batch for {name!r} and no job; jobs are there for {', '.join(jobs)}.")
        if name not in model.session.active:
            raise ValueError(f"Adapter {name!r} is not active and would take no gradients; call `set_adapter({sorted(batches)})`.")
    inputs = _joined(batches)
    rows = [name for name, batch in batches.items() for _ in range(len(batch["input_ids"]))]
    logits = model(**inputs, adapter_names=rows).logits
    losses, start, longest = {}, 0, inputs["input_ids"].shape[1]
    for name, batch in batches.items():
        count, length = batch["input_ids"].shape
        term = penalty(model.get_base_model(), name) if model.training else None
        # Virtual tokens are in front.
        own = logits[start : start + count, -longest:][:, :length]
        losses[name] = jobs[name].loss(own, batch) + (0 if term is None else term)
        start += count
    torch.stack(list(losses.values())).sum().backward()
    for name in batches:
        job = jobs[name]
        if job.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters_of(model, name), job.max_grad_norm)
        job.optimizer.step()
        if job.scheduler is not None:
            job.scheduler.step()
        job.optimizer.zero_grad()
    return {name: loss.item() for name, loss in losses.items()}


def _joined(batches: Mapping[str, Batch]) -> dict[str, Tensor]:
    """One batch of all, what the model takes of each. Shorter rows are filled up on the right, where nothing is attended to.

    Raises:
        ValueError: only some of them have an argument of the model.
    """
    longest = max(batch["input_ids"].shape[1] for batch in batches.values())
    given = {name: {"attention_mask": torch.ones_like(batch["input_ids"]), **batch} for name, batch in batches.items()}
    keys = sorted({key for batch in given.values() for key in batch} - {"labels"})
    for key in keys:
        without = [name for name, batch in given.items() if key not in batch]
        if without:
            raise ValueError(f"The batch of {without[0]!r} has no {key!r}, and others have; the model takes it for all rows or for none.")

    def filled(batch: Batch, key: str) -> Tensor:
        value, length = batch[key], batch["input_ids"].shape[1]
        return F.pad(value, (0, longest - length)) if value.ndim == 2 and value.shape[1] == length else value

    return {key: torch.cat([filled(batch, key) for batch in given.values()]) for key in keys}
