"""From a conversation to token ids and labels, in which only the answers carry the loss; and the proof that they do.

The answers are found by differences of prefixes: the rendered conversation up to an answer, once without it (as a server would
prompt the model) and once with it. What the second adds is what the model has to learn. That works for every template whose
rendering only grows; for one that rewrites earlier turns, its own ``{% generation %}`` marks are used instead. In both cases the
unmasked tokens are decoded and compared with the answers before a single step is taken.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from .data import Message, Sample
from .errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORED = -100
TEMPLATE_ERRORS = (TemplateError, TypeError, KeyError, ValueError, AttributeError)  # what a template may raise on a conversation
MARK_ALLOWANCE = 24  # characters of an end-of-turn mark that a template may count to the answer

# For tokenizers that bring no template: the layout of the Alpaca data, which base models have seen often.
FALLBACK_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message.role == 'assistant' %}{{ message.content + (eos_token or '') }}{% if not loop.last %}{{ '\\n\\n' }}{% endif %}"
    "{% elif message.role == 'user' %}{{ '### Instruction:\\n' + message.content + '\\n\\n### Response:\\n' }}"
    "{% else %}{{ message.content + '\\n\\n' }}{% endif %}{% endfor %}"
)

# --chat-template none: the prompt and the answer as they stand, as for a model that continues text.
BARE_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}{{ message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token or '' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Encoded:
    """One sample as tokens. ``labels[i]`` is ``input_ids[i]`` or IGNORED; the models shift by one themselves."""

    input_ids: list[int]
    labels: list[int]
    cut: int = 0  # tokens beyond max_length, left out

    @property
    def trained(self) -> int:
        """Tokens that carry the loss."""
        return sum(label != IGNORED for label in self.labels)


@dataclass
class EncodedSet:
    """The samples that can be trained on, and the account of those that were cut or dropped."""

    rows: list[Encoded] = field(default_factory=list)
    kept: list[Sample] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)  # where: no answer token is left within max_length
    ways: Counter[str] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def trained(self) -> int:
        return sum(row.trained for row in self.rows)

    @property
    def cut(self) -> int:
        return sum(row.cut > 0 for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """The counts that go into run.json and the report."""
        return {
            "rows": len(self.rows),
            "tokens": self.tokens,
            "trained_tokens": self.trained,
            "masked_tokens": self.tokens - self.trained,
            "cut_rows": self.cut,
            "dropped_rows": len(self.dropped),
        }


class MaskError(Exception):
    """The answers of a sample could not be located or verified."""


def apply_template_choice(tokenizer: PreTrainedTokenizerBase, choice: str) -> str:
    """Give the tokenizer the template of ``--chat-template`` and say in words which it is.

    Raises:
        InputError: the template file cannot be read.
    """
    if choice == "none":
        tokenizer.chat_template = BARE_TEMPLATE
        return "none: prompt and answer as they stand"
    if choice != "auto":
        try:
            tokenizer.chat_template = Path(choice).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"--chat-template {choice}: {error.strerror}; give auto, none or a .jinja file.") from None
        return f"from {choice}"
    if tokenizer.chat_template:
        return "the tokenizer's own"
    tokenizer.chat_template = FALLBACK_TEMPLATE
    return "plain (### Instruction / ### Response), because the tokenizer has none"


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: list[Any] | None = None, prompt: bool = False) -> str:
    """The conversation as text; with ``prompt`` it ends where the model's answer begins."""
    return str(tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt))


class Encoder:
    """Turns samples into tokens and verified labels with one tokenizer and its chat template."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, train_on: str = "answers") -> None:
        self.tokenizer = tokenizer
        self.train_on = train_on
        added = {index: token for index, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids: set[int] = {*tokenizer.all_special_ids, *added}
        self.special_texts: tuple[str, ...] = (*tokenizer.all_special_tokens, *(token.content for token in added.values()))

    def encode_all(self, samples: Sequence[Sample], max_length: int) -> EncodedSet:
        """Encode and verify every sample; the end of one longer than ``max_length`` tokens is cut.

        Raises:
            InputError: the mask of a sample cannot be verified; the sample is named.
        """
        result = EncodedSet()
        for sample in samples:
            row, way = self.encode(sample)
            row = truncate(row, max_length)
            if row.trained == 0:
                result.dropped.append(sample.where)
                continue
            result.rows.append(row)
            result.kept.append(sample)
            result.ways[way] += 1
        return result

    def encode(self, sample: Sample) -> tuple[Encoded, str]:
        """(tokens and labels, the way the answers were found: "text", "prefixes" or "generation marks").

        Raises:
            InputError: the mask cannot be verified; the message names the sample and the remedy.
        """
        if not sample.messages:
            ids = self._with_end(list(self.tokenizer(sample.text)["input_ids"]))  # type: ignore[arg-type]
            return Encoded(ids, list(ids)), "text"
        try:
            row, way = self._conversation(sample)
        except MaskError as problem:
            raise InputError(
                f"{sample.where}: {problem}. Give a template whose rendering only grows or that has {{% generation %}} marks "
                "(--chat-template FILE), or --train-on all."
            ) from None
        return (Encoded(row.input_ids, list(row.input_ids)) if self.train_on == "all" else row), way

    def _conversation(self, sample: Sample) -> tuple[Encoded, str]:
        try:
            text, spans = self.answer_spans(sample)
            row = self._spanned(text, spans)
            self.verify(row, sample, [text[start:end] for start, end in spans])
            return row, "prefixes"
        except MaskError:
            if not re.search(r"\{%-?\s*generation\b", str(self.tokenizer.chat_template)):
                raise
        row = self._marked(sample)
        self.verify(row, sample, None)
        return row, "generation marks"

    def answer_spans(self, sample: Sample) -> tuple[str, list[tuple[int, int]]]:
        """(rendered conversation, [(start, end) in characters of each answer with its end-of-turn mark]).

        Raises:
            MaskError: the rendering of a shorter conversation is not the beginning of the longer one.
        """
        messages = sample.messages
        text = self._render(sample, len(messages))
        spans = []
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before = self._render(sample, number, prompt=True)
            after = text if number + 1 == len(messages) else self._render(sample, number + 1)
            if not after.startswith(before):
                raise MaskError(f"the chat template renders the prompt of turn {number + 1} differently once it is answered")
            if not text.startswith(after.rstrip()):
                raise MaskError(f"the chat template renders turn {number + 1} differently once the conversation goes on")
            spans.append((len(before), len(before) + len(self._answer(after[len(before) :]))))
        return text, spans

    def _render(self, sample: Sample, turns: int, prompt: bool = False) -> str:
        try:
            return render(self.tokenizer, sample.messages[:turns], sample.tools, prompt)
        except TEMPLATE_ERRORS as error:
            raise MaskError(f"the chat template refuses this conversation ({' '.join(str(error).split())})") from None

    def _answer(self, rendered: str) -> str:
        """The answer through its end-of-turn token: white space that a template puts behind it is nothing to learn."""
        bare = rendered.rstrip()
        return bare if bare.endswith(self.special_texts) else rendered

    def _spanned(self, text: str, spans: list[tuple[int, int]]) -> Encoded:
        """Tokens of the text; those inside a span carry labels."""
        cuts = [position for span in spans for position in span]
        if self.tokenizer.is_fast:
            encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
            ids: list[int] = list(encoding["input_ids"])  # type: ignore[arg-type]
            offsets: list[tuple[int, int]] = list(encoding["offset_mapping"])  # type: ignore[arg-type]
            if not any(start < cut < end for cut in cuts for start, end in offsets):
                return self._labelled(ids, [any(first <= start < end <= last for first, last in spans) for start, end in offsets])
        # A token reaches over a boundary (or the tokenizer gives no offsets): encode the pieces on their own, which is also
        # what a model is given when it is asked: the prompt alone, and then its own tokens.
        ids, inside = [], []
        borders = [0, *cuts, len(text)]
        for number, (start, end) in enumerate(pairwise(borders)):
            piece = self._ids(text[start:end]) if end > start else []
            ids += piece
            inside += [number % 2 == 1] * len(piece)
        return self._labelled(ids, inside)

    def _marked(self, sample: Sample) -> Encoded:
        """Tokens whose labels come from the template's own ``{% generation %}`` marks."""
        try:
            encoding: Any = self.tokenizer.apply_chat_template(
                list(sample.messages), tools=sample.tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
        except TEMPLATE_ERRORS as error:
            raise MaskError(f"the chat template refuses this conversation ({' '.join(str(error).split())})") from None
        return self._labelled(list(encoding["input_ids"]), [bool(mark) for mark in encoding["assistant_masks"]])

    def _labelled(self, ids: list[int], inside: list[bool]) -> Encoded:
        labels = [token if trained else IGNORED for token, trained in zip(ids, inside, strict=True)]
        if inside and inside[-1]:  # the last answer ends the text: it has to end in a token on which generation stops
            ended = self._with_end(ids)
            return Encoded(ended, labels + ended[len(ids) :])
        return Encoded(ids, labels)

    def _with_end(self, ids: list[int]) -> list[int]:
        end: Any = self.tokenizer.eos_token_id
        return ids if end is None or (ids and ids[-1] in self.special_ids) else [*ids, end]

    def verify(self, row: Encoded, sample: Sample, pieces: list[str] | None) -> None:
        """Decode the unmasked tokens and compare them with the answers.

        Args:
            pieces: the text that should be unmasked, answer by answer; None when only the answers themselves are known.

        Raises:
            MaskError: an answer is missing from the unmasked tokens, or something else is among them.
        """
        found = _squeeze(self._decode([label for label in row.labels if label != IGNORED]))
        answers = [self._round_trip(str(message["content"])) for message in sample.messages if message["role"] == "assistant"]
        position = 0
        for answer in answers:
            start = found.find(answer, position)
            if start < 0:
                raise MaskError(f"the unmasked tokens do not contain the answer {_shorten(answer)}")
            position = start + len(answer)
        if pieces is None:
            # The marks may include an end of turn, so the exact text is unknown; between the answers there is room for that only.
            if len(found) > sum(map(len, answers)) + len(answers) * MARK_ALLOWANCE:
                raise MaskError(f"the unmasked tokens hold more than the answers: {_shorten(found)}")
            return
        expected = "".join(self._round_trip(piece) for piece in pieces)
        if found not in (expected, expected + _squeeze(str(self.tokenizer.eos_token))):
            raise MaskError(f"the unmasked tokens read {_shorten(found)}, the answers {_shorten(expected)}")

    def _round_trip(self, text: str) -> str:
        """The text as the tokenizer gives it back: unknown characters and lower-casing are no fault of the mask."""
        return _squeeze(self._decode(self._ids(text)))

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def stop_tokens(self, rows: Sequence[Encoded]) -> list[int]:
        """The ids on which an answer ends: the tokenizer's end token and the special tokens that close the trained answers."""
        closing = {next(label for label in reversed(row.labels) if label != IGNORED) for row in rows if row.trained and not row.cut}
        end: Any = self.tokenizer.eos_token_id
        return sorted({*(closing & self.special_ids), *([] if end is None else [end])})


def truncate(row: Encoded, max_length: int) -> Encoded:
    """Keep the first ``max_length`` tokens."""
    beyond = len(row.input_ids) - max_length
    return row if beyond <= 0 else Encoded(row.input_ids[:max_length], row.labels[:max_length], cut=beyond)


def _squeeze(text: str) -> str:
    return "".join(text.split())


def _shorten(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:40]}...{text[-15:]}")
