"""What a run tells whoever watches it. The command line draws a progress bar from these; a notebook may do something else."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any


class Listener:
    """Hears everything and does nothing; override what you want to see."""

    def note(self, message: str) -> None:
        """A sentence worth reading, for example that samples were cut."""

    def data_ready(self, facts: dict[str, Any]) -> None:
        """The data is read, masked and verified. ``facts``: schema, rendered sample with its trained parts, counts."""

    def training_started(self, first_step: int, last_step: int) -> None:
        """Optimizer steps ``first_step + 1`` to ``last_step`` follow."""

    def stepped(self, line: dict[str, Any]) -> None:
        """One optimizer step: step, epoch, loss, learning_rate, grad_norm, tokens, tokens_per_second."""

    def validated(self, line: dict[str, Any]) -> None:
        """One validation: step, epoch, val_loss, val_token_accuracy."""

    def training_ended(self) -> None:
        """No more steps follow."""

    def counting(self, what: str, total: int) -> AbstractContextManager[Callable[[int], None]]:
        """A stretch of ``total`` rows of other work; the function it gives is called with the rows done."""
        return nullcontext(lambda _: None)
