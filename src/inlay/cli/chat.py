"""``inlay chat``: talk to the model, and hear base and tuned in turn."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from .output import console
from .tuned import Device, Dtype, Model, Quantization, Tuned, load

HELP = "/base switches between base and tuned · /reset forgets the conversation · /quit leaves"


def chat(
    model: Model = None,
    adapter: Annotated[Path | None, typer.Option("--adapter", help="Adapter folder, as `inlay train` writes it.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="A system message to begin with.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer in tokens.")] = 512,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token, always.")] = 0.0,
    quantization: Quantization = None,
    dtype: Dtype = "auto",
    device: Device = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line on stdout for each answer.")] = False,
) -> None:
    """Talk to a model, with its adapter or without."""
    screen = console(to_stderr=as_json)
    tuned = load(model, adapter, dtype, device, quantization)
    conversation = Conversation(tuned, system, max_new_tokens, temperature)
    kept = "" if tuned.quantization == "none" else f" in {tuned.quantization}"
    who = f"{tuned.base}{kept} with {adapter}" if adapter else f"{tuned.base}{kept}"
    screen.print(f"[bold]{who}[/]\n[dim]{HELP}[/]")
    for line in _lines(screen):
        if line.startswith("/"):
            if line == "/quit":
                return
            screen.print(f"[dim]{conversation.command(line)}[/]")
            continue
        pieces = []
        for piece in conversation.say(line):
            pieces.append(piece)
            if not as_json:
                screen.print(piece, end="", markup=False, soft_wrap=True)
        if as_json:
            sys.stdout.write(json.dumps({"role": "assistant", "by": conversation.speaker, "content": "".join(pieces).strip()}) + "\n")
            sys.stdout.flush()
        else:
            screen.print()


def _lines(screen: Any) -> Iterator[str]:
    """What the user types, until the end of input. Ctrl-C at the prompt leaves, too."""
    while True:
        try:
            line = input("› " if sys.stdin.isatty() and screen.is_terminal else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line:
            yield line


class Conversation:
    """The turns so far, and who answers next."""

    def __init__(self, tuned: Tuned, system: str | None, max_new_tokens: int, temperature: float) -> None:
        self.tuned = tuned
        self.start = [{"role": "system", "content": system}] if system else []
        self.messages: list[dict[str, str]] = list(self.start)
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.use_base = tuned.adapter is None

    @property
    def speaker(self) -> str:
        """base or tuned."""
        return "base" if self.use_base else "tuned"

    def command(self, line: str) -> str:
        """Carry out a line that begins with a slash; what to tell the user."""
        if line == "/reset":
            self.messages = list(self.start)
            return "forgotten"
        if line == "/base":
            if self.tuned.adapter is None:
                return "there is no adapter to switch off; start with --adapter"
            self.use_base = not self.use_base
            return f"now speaking: {self.speaker}"
        return HELP

    def say(self, text: str) -> Iterator[str]:
        """The answer, piece by piece. Ctrl-C ends it; what was said so far stays in the conversation."""
        from threading import Thread

        from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

        from inlay.training.evaluate import greedy
        from inlay.training.masking import render

        self.messages.append({"role": "user", "content": text})
        tokenizer, model = self.tuned.tokenizer, self.tuned.model
        encoded = tokenizer(render(tokenizer, self.messages, prompt=True), add_special_tokens=False, return_tensors="pt").to(model.device)
        config = greedy(model, tokenizer, [tokenizer.eos_token_id], self.max_new_tokens)
        if self.temperature > 0:
            config.do_sample, config.temperature = True, self.temperature
        streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        stopped = False

        class Stop(StoppingCriteria):
            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> bool:
                return stopped

        failures: list[BaseException] = []

        def generate() -> None:
            # The adapter is switched off in the thread that generates: such a choice belongs to the thread that makes it.
            try:
                with self._speaking():
                    model.generate(
                        input_ids=encoded["input_ids"],
                        attention_mask=encoded["attention_mask"],
                        generation_config=config,
                        streamer=streamer,
                        stopping_criteria=StoppingCriteriaList([Stop()]),
                    )
            except BaseException as error:  # handed over to the thread that waits
                failures.append(error)
                streamer.end()

        thread = Thread(target=generate, daemon=True)
        thread.start()
        said = []
        try:
            for piece in streamer:
                said.append(piece)
                yield piece
        except KeyboardInterrupt:
            stopped = True
        thread.join()
        if failures:
            raise failures[0]
        self.messages.append({"role": "assistant", "content": "".join(said).strip()})

    def _speaking(self) -> AbstractContextManager[Any]:
        return self.tuned.model.disable_adapter() if self.use_base and self.tuned.adapter is not None else nullcontext()
