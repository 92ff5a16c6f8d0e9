"""Callbacks of ``transformers.Trainer`` by HF peft's names."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class AdamssAsaCallback(TrainerCallback):
    """Tells AdaMSS (``use_asa=True``) which step of the training it is.

    It leaves groups out by itself after each step of the optimiser, with or without this; with it, a training that was resumed
    counts on where it was.
    """

    def on_optimizer_step(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model = kwargs.get("model")
        allocate = getattr(getattr(model, "base_model", model), "update_and_allocate", None)
        if allocate is not None:
            allocate(state.global_step)
