"""The page stands alone, escapes what comes from data and models, and shows the figures; the axis has round numbers."""

from __future__ import annotations

import re
from typing import Any

import pytest

from inlay.training.chart import loss_chart, nice_range, running_mean, step_ticks
from inlay.training.evaluate import Comparison, Exchange, Interval, Metric
from inlay.training.report import duration, figure, render_report

COUNTS = {"rows": 9, "tokens": 1234, "trained_tokens": 400, "masked_tokens": 834, "cut_rows": 0, "dropped_rows": 0}


@pytest.fixture
def record() -> dict[str, Any]:
    return {
        "status": "finished",
        "started": "2026-01-02T03:04:05+00:00",
        "device": "cpu",
        "settings": {"method": "lora", "model": "some/base", "lr": 0.001, "adapter": {}},
        "data": {
            "path": "/data/<rows>.jsonl",
            "schema": "text",
            "chat_template": "auto",
            "sha256": "abc",
            "train": COUNTS,
            "validation": COUNTS,
        },
        "adapter_config": {"r": 8},
        "versions": {"python": "3.11"},
        "parameters": {"trainable": 500, "total": 10000, "groups": [{"group": "q_proj", "tensors": 4, "parameters": 500}]},
        "results": {"steps": 2, "train_loss": 1.5, "val_loss": 1.25, "best_step": 2, "tokens_per_second": 10.4, "training_seconds": 65.0},
    }


METRICS = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}, {"step": 2, "val_loss": 1.25}]


def test_everything_from_outside_is_escaped_and_nothing_is_fetched(record: dict[str, Any]) -> None:
    script = "<script>alert(1)</script>"
    comparison = Comparison(
        1,
        [Metric("perplexity", 9.0, 3.0, Interval(-6.0, -7.0, -5.0), False)],
        [Exchange(script, script, script, script, False, True)],
    )
    page = render_report(record, METRICS, comparison)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") == 4
    assert "&lt;rows&gt;.jsonl" in page
    assert not re.search(r"(src|href)=|url\(|@import", page)
    assert "9 → 3" in page
    assert '<td class="better">better</td>' in page
    assert "5 %" in page  # 500 of 10,000


def test_without_validation_the_comparison_is_left_out(record: dict[str, Any]) -> None:
    record["data"]["validation"] = {**COUNTS, "rows": 0}
    record["results"] |= {"val_loss": None, "best_step": None}
    page = render_report(record, METRICS[:2], None)
    assert "Base and tuned" not in page
    assert "No rows were kept for validation." in page


def test_the_chart_puts_points_where_they_belong() -> None:
    chart = str(loss_chart(METRICS))
    # Steps 0 to 2 span 52 to 764; losses from 1.2 to 2.0 (bottom 260, top 16) because the ticks are 0.2 apart.
    assert 'class="train" points="408.0,16.0 764.0,168.5"' in chart
    assert '<circle class="val" cx="764.0" cy="244.8"' in chart
    assert loss_chart([]) == ""


@pytest.mark.parametrize(("low", "high", "wanted"), [(1.25, 2.0, (1.2, 2.0, 0.2)), (0, 100, (0, 100, 20)), (3.0, 3.0, (3.0, 3.1, 0.1))])
def test_axes_have_round_numbers(low: float, high: float, wanted: tuple[float, float, float]) -> None:
    assert nice_range(low, high) == pytest.approx(wanted)


def test_step_ticks_are_whole() -> None:
    assert step_ticks(3) == [0, 1, 2, 3]
    assert step_ticks(472) == [0, 100, 200, 300, 400]


def test_the_running_mean_starts_at_the_first_value() -> None:
    assert running_mean([(1, 4.0), (2, 4.0)]) == [(1, pytest.approx(4.0)), (2, pytest.approx(4.0))]
    # weights 0.09 and 0.1 of 0.19
    assert running_mean([(1, 0.0), (2, 19.0)])[1][1] == pytest.approx(10.0)


def test_figures_read_well() -> None:
    assert [figure(0.1234, "token accuracy"), figure(12345.6), figure(1.23456), figure(None)] == ["12.3 %", "12,346", "1.23", "–"]
    assert [duration(4.2), duration(65), duration(7260)] == ["4.2 s", "1 min 5 s", "2 h 1 min"]
