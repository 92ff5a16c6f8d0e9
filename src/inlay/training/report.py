"""report.html: the whole run on one page that needs nothing but itself."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from .chart import loss_chart
from .evaluate import Comparison

PERCENT_METRICS = ("token accuracy", "exact match")


def write_report(path: Path, record: dict[str, Any], metrics: list[dict[str, Any]], comparison: Comparison | None) -> None:
    """Write the page.

    Args:
        record: the content of run.json.
        metrics: the lines of metrics.jsonl.
        comparison: base and tuned on rows that were not trained on; None leaves these parts out.
    """
    path.write_text(render_report(record, metrics, comparison), encoding="utf-8")


def render_report(record: dict[str, Any], metrics: list[dict[str, Any]], comparison: Comparison | None) -> str:
    """The page as text. Everything that comes from data or models is escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": figure, "count": count, "duration": duration, "change": change}
    source = (resources.files("inlay.training") / "report.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(source).render(
        record=record, settings=record["settings"], chart=loss_chart(metrics), comparison=comparison, results=record.get("results", {})
    )


def figure(value: float | None, metric: str = "") -> str:
    """A number with the digits that matter: percentages for shares, three significant digits else."""
    if value is None:
        return "–"
    if metric in PERCENT_METRICS:
        return f"{100 * value:.1f} %"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def change(value: float, metric: str) -> str:
    """A difference with its sign; shares in percentage points."""
    return f"{100 * value:+.1f}" if metric in PERCENT_METRICS else f"{value:+.3g}"


def count(value: int | None) -> str:
    """12345 -> 12,345."""
    return "–" if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Seconds as people say them: 42 s, 3 min 5 s, 2 h 10 min."""
    if seconds is None:
        return "–"
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
