"""How good the answers are: perplexity, token accuracy, greedy answers, and what of a difference is more than chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .data import Sample
from .masking import IGNORED, Encoded, render
from .models import positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS_PER_BATCH = 4096  # of padded input; bounds the memory of the logits
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Score:
    """Teacher-forced scores of one sample's answer tokens."""

    nll: float  # sum of -log p, in nats
    correct: int  # tokens that were the likeliest
    tokens: int


@dataclass(frozen=True)
class Interval:
    """A difference (tuned - base) with the bounds of its bootstrap interval."""

    difference: float
    low: float
    high: float

    @property
    def certain(self) -> bool:
        """Whether zero lies outside."""
        return self.low > 0 or self.high < 0


def batches(lengths: Sequence[int], tokens_per_batch: int = TOKENS_PER_BATCH) -> Iterator[list[int]]:
    """Indices of samples of similar length, at most ``tokens_per_batch`` padded tokens together."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda number: lengths[number]):
        if batch and (len(batch) + 1) * lengths[index] > tokens_per_batch:
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def score(model: Any, rows: Sequence[Encoded], advance: Callable[[int], None] = lambda _: None) -> list[Score]:
    """Score every row's labelled tokens with ``model`` (which is left in the mode it was in).

    Args:
        advance: called with the number of rows done since the last call.
    """
    import torch

    scores: list[Score | None] = [None] * len(rows)
    with _evaluating(model), torch.inference_mode():
        for batch in batches([len(row.input_ids) for row in rows]):
            width = max(len(rows[index].input_ids) for index in batch)
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            labels = torch.full((len(batch), width), IGNORED)
            mask = torch.zeros(len(batch), width, dtype=torch.long)
            for line, index in enumerate(batch):
                length = len(rows[index].input_ids)
                ids[line, :length] = torch.tensor(rows[index].input_ids)
                labels[line, :length] = torch.tensor(rows[index].labels)
                mask[line, :length] = 1
            logits = model(input_ids=ids.to(model.device), attention_mask=mask.to(model.device)).logits
            logits = logits[:, -width:]  # prompt methods put virtual tokens in front
            targets = labels[:, 1:].to(logits.device)
            for line, index in enumerate(batch):
                wanted = targets[line] != IGNORED
                goal = targets[line][wanted]
                here = logits[line, :-1][wanted].float()
                nll = torch.nn.functional.cross_entropy(here, goal, reduction="sum").item() if len(goal) else 0.0
                scores[index] = Score(nll, int((here.argmax(-1) == goal).sum()) if len(goal) else 0, len(goal))
            advance(len(batch))
    return [row for row in scores if row is not None]


def perplexity(scores: Sequence[Score]) -> float:
    """exp of the mean -log p over all answer tokens."""
    return math.exp(sum(row.nll for row in scores) / max(1, sum(row.tokens for row in scores)))


def token_accuracy(scores: Sequence[Score]) -> float:
    """Share of the answer tokens that were the likeliest."""
    return sum(row.correct for row in scores) / max(1, sum(row.tokens for row in scores))


def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    stop: Sequence[int],
    max_new_tokens: int = 128,
    batch_size: int = 16,
    advance: Callable[[int], None] = lambda _: None,
) -> list[str]:
    """Greedy answers to the samples' prompts, without special tokens and surrounding white space.

    Prompt and answer stay within the model's context: a prompt that leaves too little room loses its beginning.
    """
    import torch

    context = positions(model.config)
    max_new_tokens = min(max_new_tokens, context // 2)
    prompts = [
        list(tokenizer(render(tokenizer, sample.prompt, sample.tools, prompt=True), add_special_tokens=False)["input_ids"])[  # type: ignore[arg-type]
            -(context - max_new_tokens) :
        ]
        for sample in samples
    ]
    answers = [""] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    pad: Any = tokenizer.pad_token_id
    with _evaluating(model), torch.inference_mode():
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            width = max(len(prompts[index]) for index in chosen)
            ids = torch.tensor([[pad] * (width - len(prompts[index])) + prompts[index] for index in chosen])
            mask = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in chosen])
            made = model.generate(
                input_ids=ids.to(model.device),
                attention_mask=mask.to(model.device),
                generation_config=greedy(model, tokenizer, stop, max_new_tokens),
            )
            for line, index in enumerate(chosen):
                answers[index] = str(tokenizer.decode(made[line, width:], skip_special_tokens=True)).strip()
            advance(len(chosen))
    return answers


def greedy(model: Any, tokenizer: PreTrainedTokenizerBase, stop: Sequence[int], max_new_tokens: int) -> Any:
    """A generation config that always takes the likeliest token and stops at an answer's end."""
    from transformers import GenerationConfig

    own = getattr(model, "generation_config", None)
    ends = getattr(own, "eos_token_id", None)
    ends = [ends] if isinstance(ends, int) else list(ends or [])
    return GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=sorted({*ends, *stop}) or None, pad_token_id=tokenizer.pad_token_id
    )


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def exact_match(answers: Sequence[str], samples: Sequence[Sample]) -> list[bool]:
    """Whether each answer is the reference, white space aside."""
    return [" ".join(given.split()) == " ".join(sample.reference.split()) for given, sample in zip(answers, samples, strict=True)]


def paired_bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], base: np.ndarray, tuned: np.ndarray, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """The percentile interval of ``statistic(tuned) - statistic(base)`` when the same rows are drawn again for both.

    Args:
        statistic: maps sums over rows, shape (..., columns), to a value, shape (...). For perplexity: exp(column 0 / column 1).
        base: shape (rows, columns), the columns that the statistic sums.
        tuned: the same rows, tuned.
    """
    rows = len(base)
    draws = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=resamples)  # (resamples, rows): how often each
    differences = statistic(draws @ tuned) - statistic(draws @ base)
    low, high = np.quantile(differences, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(float(statistic(tuned.sum(0)) - statistic(base.sum(0))), float(low), float(high))


def ratio(sums: np.ndarray) -> np.ndarray:
    """column 0 / column 1: token accuracy, share of exact matches."""
    return sums[..., 0] / np.maximum(sums[..., 1], 1)


def exp_ratio(sums: np.ndarray) -> np.ndarray:
    """exp(column 0 / column 1): perplexity."""
    return np.exp(ratio(sums))


@dataclass(frozen=True)
class Metric:
    """One line of the comparison; an interval needs at least two rows."""

    name: str
    base: float
    tuned: float
    interval: Interval | None
    higher_is_better: bool

    @property
    def verdict(self) -> str:
        """better, worse, or not distinguishable from chance."""
        if self.interval is None or not self.interval.certain:
            return "no clear difference"
        return "better" if (self.interval.difference > 0) == self.higher_is_better else "worse"


@dataclass(frozen=True)
class Exchange:
    """A prompt with the reference and both answers; no reference for a prompt of the user's own."""

    prompt: str
    reference: str | None
    base: str
    tuned: str
    base_exact: bool | None = None
    tuned_exact: bool | None = None


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same rows."""

    rows: int
    metrics: list[Metric]
    exchanges: list[Exchange]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "rows": self.rows,
            "metrics": {
                metric.name: {
                    "base": metric.base,
                    "tuned": metric.tuned,
                    "verdict": metric.verdict,
                    "interval_95": None if metric.interval is None else asdict(metric.interval),
                }
                for metric in self.metrics
            },
            "answers": [asdict(exchange) for exchange in self.exchanges],
        }


def metrics(base: Sequence[Score], tuned: Sequence[Score], base_exact: Sequence[bool], tuned_exact: Sequence[bool]) -> list[Metric]:
    """Perplexity, token accuracy and, where there are answers, exact match, each with its paired interval."""
    lines = []
    for name, statistic, column, better in (
        ("perplexity", exp_ratio, lambda row: row.nll, False),
        ("token accuracy", ratio, lambda row: row.correct, True),
    ):
        before, after = (np.array([[column(row), row.tokens] for row in scores], dtype=float) for scores in (base, tuned))
        lines.append(_metric(name, statistic, before, after, better))
    if base_exact:
        before, after = (np.array([[hit, 1] for hit in hits], dtype=float) for hits in (base_exact, tuned_exact))
        lines.append(_metric("exact match", ratio, before, after, True))
    return lines


def _metric(name: str, statistic: Callable[[np.ndarray], np.ndarray], before: np.ndarray, after: np.ndarray, better: bool) -> Metric:
    interval = paired_bootstrap(statistic, before, after) if len(before) > 1 else None
    return Metric(name, float(statistic(before.sum(0))), float(statistic(after.sum(0))), interval, better)


def compare(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[Sample],
    rows: Sequence[Encoded],
    stop: Sequence[int],
    answers: int | None = None,
    max_new_tokens: int = 128,
    advance: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Base and tuned on the same rows with one model: the base is the tuned model with its adapter switched off.

    Args:
        model: a PeftModel.
        rows: the samples, encoded.
        answers: generate for the first so many samples only; None for all.
        advance: called with the number of forward or generation rows done; in all 2 * (rows + answers).
    """
    asked = [sample for sample in samples if sample.messages][:answers]
    tuned_scores = score(model, rows, advance)
    tuned = answer(model, tokenizer, asked, stop, max_new_tokens, advance=advance)
    with model.disable_adapter():
        base_scores = score(model, rows, advance)
        base = answer(model, tokenizer, asked, stop, max_new_tokens, advance=advance)
    base_exact, tuned_exact = exact_match(base, asked), exact_match(tuned, asked)
    exchanges = [
        Exchange(last_question(sample), sample.reference, *given)
        for sample, given in zip(asked, zip(base, tuned, base_exact, tuned_exact, strict=True), strict=True)
    ]
    lines = metrics(base_scores, tuned_scores, base_exact, tuned_exact) if rows else []
    return Comparison(len(rows), lines, exchanges)


def last_question(sample: Sample) -> str:
    """The last thing said before the answer."""
    return str(sample.prompt[-1].get("content") or "") if sample.prompt else ""
