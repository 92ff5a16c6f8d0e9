"""What hangs on the trainer: metrics.jsonl, the events for the listener, the stop on Ctrl-C and on a loss that is no number."""

from __future__ import annotations

import json
import math
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .events import Listener

# TRL's names in its log, and ours in metrics.jsonl.
STEP_NAMES = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "grad_norm",
    "mean_token_accuracy": "token_accuracy",
    "num_tokens": "tokens",
}
VALIDATION_NAMES = {"eval_loss": "val_loss", "eval_mean_token_accuracy": "val_token_accuracy"}


class RunRecorder(TrainerCallback):
    """Writes every logged step to metrics.jsonl and passes it on to the listener. Only for the main process."""

    def __init__(self, path: Path, listener: Listener) -> None:
        self.path = path
        self.listener = listener
        self.tokens_before = 0
        self.seconds_before = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        kept = [line for line in read_metrics(self.path) if line["step"] <= state.global_step]
        self.path.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        self.tokens_before = max((line["tokens"] for line in kept if "tokens" in line), default=0)
        self.seconds_before = max((line["seconds"] for line in kept), default=0.0)
        self.started = time.perf_counter()
        self.listener.training_started(state.global_step, state.max_steps)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        logs = logs or {}
        seconds = time.perf_counter() - self.started
        line: dict[str, Any] = {"step": state.global_step, "epoch": round(state.epoch or 0.0, 4)}
        total = {"seconds": round(self.seconds_before + seconds, 3)}
        if "loss" in logs:
            line |= {ours: logs[theirs] for theirs, ours in STEP_NAMES.items() if theirs in logs}
            tokens = int(line.get("tokens", 0))
            line |= {"tokens": self.tokens_before + tokens, "tokens_per_second": round(tokens / max(seconds, 1e-9), 1)} | total
            self._append(line)
            self.listener.stepped(line)
        elif "eval_loss" in logs:
            line |= {ours: logs[theirs] for theirs, ours in VALIDATION_NAMES.items() if theirs in logs} | total
            self._append(line)
            self.listener.validated(line)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.listener.training_ended()

    def _append(self, line: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as metrics:
            metrics.write(json.dumps(line) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, an unfinished last one left out."""
    lines = []
    if path.is_file():
        for text in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(text))
            except ValueError:
                break
    return lines


class StopOnInterrupt(TrainerCallback):
    """The first Ctrl-C (or SIGTERM) ends training after the step in progress, with a checkpoint; the second one stops at once."""

    def __init__(self, listener: Listener) -> None:
        self.listener = listener
        self.asked = False

    def __enter__(self) -> StopOnInterrupt:
        self.before = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.asked:
            if number == signal.SIGINT:  # a launcher sends SIGTERM after the Ctrl-C that its workers have heard already
                raise KeyboardInterrupt
            return
        self.asked = True
        self.listener.note("Stopping after this step and saving. Press Ctrl-C again to stop at once.")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        self.asked = self._anyone_asked(args)
        if self.asked:
            control.should_training_stop = True
            control.should_save = True
            control.should_evaluate = False
        return control

    def _anyone_asked(self, args: TrainingArguments) -> bool:
        """All processes stop after the same step, or those that go on would wait for the others for ever."""
        if args.world_size == 1 or not torch.distributed.is_initialized():
            return self.asked
        asked = torch.tensor(int(self.asked), device=args.device)
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> TrainerControl:
        if self.asked:  # saved with the step just now; whoever interrupts does not wait for a validation
            control.should_save = False
            control.should_evaluate = False
        return control


class StopOnNonFinite(TrainerCallback):
    """A loss or gradient that is no number never recovers: stop, and remember where."""

    def __init__(self) -> None:
        self.step: int | None = None

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> TrainerControl:
        values = [float((logs or {}).get(key, 0.0)) for key in ("loss", "grad_norm", "eval_loss")]
        if not all(map(math.isfinite, values)) and self.step is None:
            self.step = state.global_step
            control.should_training_stop = True
            control.should_save = False
        return control
