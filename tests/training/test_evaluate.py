"""The figures: against hand computation, against one row at a time, and a bootstrap on numbers whose interval is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from inlay.training.data import Sample
from inlay.training.evaluate import (
    Score,
    answer,
    batches,
    exact_match,
    exp_ratio,
    metrics,
    paired_bootstrap,
    perplexity,
    ratio,
    score,
    token_accuracy,
)
from inlay.training.masking import IGNORED, Encoded, Encoder

DISTRIBUTION = torch.tensor([0.1, 0.2, 0.3, 0.4])


class Fixed(torch.nn.Module):
    """Predicts the same distribution everywhere."""

    device = torch.device("cpu")

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        return SimpleNamespace(logits=DISTRIBUTION.log().expand(*input_ids.shape, 4))


def test_scores_of_a_known_distribution() -> None:
    rows = [Encoded([0, 3, 1], [IGNORED, 3, 1]), Encoded([0, 2], [0, 2]), Encoded([0, 1, 3, 3], [IGNORED, IGNORED, IGNORED, 3])]
    scores = score(Fixed(), rows)
    assert [line.tokens for line in scores] == [2, 1, 1]  # the first token is never predicted
    assert [line.correct for line in scores] == [1, 0, 1]
    assert [line.nll for line in scores] == pytest.approx([-math.log(0.4 * 0.2), -math.log(0.3), -math.log(0.4)], rel=1e-6)
    assert perplexity(scores) == pytest.approx((0.4 * 0.2 * 0.3 * 0.4) ** (-1 / 4), rel=1e-6)
    assert token_accuracy(scores) == 0.5


def test_batches_do_not_change_the_scores_nor_the_mode(tiny_model: Any, tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    samples = [
        Sample(f"r:{n}", [{"role": "user", "content": "q" * n}, {"role": "assistant", "content": "answer"[: n + 1]}]) for n in range(1, 6)
    ]
    rows = [encoder.encode(sample)[0] for sample in samples]
    tiny_model.train()
    together = score(tiny_model, rows)
    assert tiny_model.training
    tiny_model.eval()
    for row, line in zip(rows, together, strict=True):
        with torch.no_grad():
            output = tiny_model(input_ids=torch.tensor([row.input_ids]), labels=torch.tensor([row.labels]))
        assert line.nll == pytest.approx(output.loss.item() * line.tokens, rel=1e-4)
        assert line.tokens == row.trained


def test_batches_hold_the_token_limit_and_every_row_once() -> None:
    lengths = [5, 100, 7, 60, 40, 8]
    made = list(batches(lengths, tokens_per_batch=100))
    assert sorted(index for batch in made for index in batch) == list(range(6))
    assert all(len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= 100 for batch in made)
    assert made[0] == [0, 2, 5]


def question(text: str) -> Sample:
    return Sample("rows.jsonl:1", [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}])


def test_answers_in_a_batch_are_those_one_by_one(talkative_model: Any, tokenizer: Any) -> None:
    samples = [question("a"), question("a longer question"), question("?")]
    together = answer(talkative_model, tokenizer, samples, stop=[2], max_new_tokens=6)
    assert together == [answer(talkative_model, tokenizer, [sample], stop=[2], max_new_tokens=6)[0] for sample in samples]
    assert all(together)


def test_answers_end_at_a_stop_token(talkative_model: Any, tokenizer: Any) -> None:
    free = answer(talkative_model, tokenizer, [question("a")], stop=[2], max_new_tokens=6)[0]
    stopped = answer(talkative_model, tokenizer, [question("a")], stop=range(3, len(tokenizer)), max_new_tokens=6)[0]
    assert len(free) > 2
    assert len(stopped) == 1  # whatever came first was a stop token


def test_prompts_and_answers_stay_within_the_context(talkative_model: Any, tokenizer: Any) -> None:
    # 256 positions, 6 of them for the answer: what is said before the last 250 tokens cannot matter
    early, late = question("a" * 100 + "z" * 300), question("b" * 100 + "z" * 300)
    answers = answer(talkative_model, tokenizer, [early, late], stop=[2], max_new_tokens=6)
    assert answers[0] == answers[1] != ""


def test_exact_match_ignores_white_space() -> None:
    samples = [Sample("r", [{"role": "assistant", "content": "ls  -l\n"}])] * 2
    assert exact_match(["ls -l", "ls -la"], samples) == [True, False]


def test_identical_rows_leave_no_uncertainty() -> None:
    base, tuned = np.tile([2.0, 4.0], (10, 1)), np.tile([3.0, 4.0], (10, 1))
    interval = paired_bootstrap(ratio, base, tuned)
    assert (interval.difference, interval.low, interval.high) == (0.25, 0.25, 0.25)
    assert interval.certain


def test_the_interval_of_a_mean_is_the_normal_one() -> None:
    differences = np.random.default_rng(1).normal(0.3, 1.0, 400)
    ones = np.ones(400)
    interval = paired_bootstrap(ratio, np.stack([0 * ones, ones], 1), np.stack([differences, ones], 1), resamples=4000)
    error = 1.96 * differences.std() / math.sqrt(400)
    assert interval.difference == pytest.approx(differences.mean())
    assert interval.low == pytest.approx(differences.mean() - error, abs=0.01)
    assert interval.high == pytest.approx(differences.mean() + error, abs=0.01)


def test_pairing_removes_what_rows_have_in_common() -> None:
    difficulty = np.random.default_rng(2).normal(5.0, 3.0, 60)
    base = np.stack([difficulty, np.ones(60)], 1)
    tuned = np.stack([difficulty - 0.1, np.ones(60)], 1)
    interval = paired_bootstrap(ratio, base, tuned)
    assert (interval.low, interval.high) == pytest.approx((-0.1, -0.1))  # rows drawn apart for both would give about +-1


def test_perplexity_is_a_statistic_of_sums() -> None:
    sums = np.array([[2.0 * math.log(8.0), 2.0], [0.0, 4.0]])
    assert exp_ratio(sums) == pytest.approx([8.0, 1.0])


def test_metrics_say_better_worse_or_unclear() -> None:
    base = [Score(nll=2.0, correct=1, tokens=2)] * 8
    tuned = [Score(nll=1.0, correct=2, tokens=2)] * 8
    lines = {line.name: line for line in metrics(base, tuned, [False] * 8, [True] + [False] * 7)}
    assert (lines["perplexity"].base, lines["perplexity"].tuned) == pytest.approx((math.e, math.exp(0.5)))
    assert lines["perplexity"].verdict == "better"
    assert (lines["token accuracy"].base, lines["token accuracy"].tuned) == (0.5, 1.0)
    assert lines["exact match"].tuned == 0.125
    assert lines["exact match"].verdict == "no clear difference"
    assert {line.verdict for line in metrics(tuned, base, [], [])} == {"worse"}
    assert [line.name for line in metrics(base[:1], tuned[:1], [], []) if line.interval is None] == ["perplexity", "token accuracy"]
