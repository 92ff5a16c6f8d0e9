"""The loss curves as a piece of SVG whose colours come from the page's style sheet, so that it follows light and dark."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup, escape

WIDTH, HEIGHT = 860, 300
LEFT, RIGHT, TOP, BOTTOM = 52, 96, 16, 40
SMOOTHING = 0.9  # of the exponential mean that the bold training line shows
SMOOTHED_FROM = 20  # steps; a shorter run is shown as it is

Points = list[tuple[float, float]]


def loss_chart(metrics: list[dict[str, Any]]) -> Markup:
    """Training loss per step (faint), its running mean (bold) and the validation loss (dots), over optimizer steps.

    Returns an empty string when there is nothing to draw.
    """
    train = [(line["step"], line["loss"]) for line in metrics if _drawable(line.get("loss"))]
    validation = [(line["step"], line["val_loss"]) for line in metrics if _drawable(line.get("val_loss"))]
    if not train:
        return Markup("")
    smooth = running_mean(train) if len(train) >= SMOOTHED_FROM else train
    shown = [*train, *validation]
    low, high, step = nice_range(min(y for _, y in shown), max(y for _, y in shown))
    last = max(x for x, _ in shown)

    def place(point: tuple[float, float]) -> tuple[float, float]:
        x = LEFT + (point[0] / last) * (WIDTH - LEFT - RIGHT)
        y = TOP + (high - point[1]) / (high - low) * (HEIGHT - TOP - BOTTOM)
        return round(x, 1), round(y, 1)

    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="Training and validation loss over steps">']
    for number in range(round((high - low) / step) + 1):
        value = low + number * step
        _, y = place((0, value))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 8}" y="{y + 4}" text-anchor="end">{value:g}</text>')
    for value in step_ticks(last):
        x, _ = place((value, low))
        parts.append(f'<text class="tick" x="{x}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{value}</text>')
    parts.append(f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 4}" text-anchor="middle">optimizer step</text>')
    if smooth is not train:
        parts.append(_line([place(point) for point in train], "raw"))
    parts.append(_line([place(point) for point in smooth], "train"))
    ends = [("training", "train", place(smooth[-1]))]
    if validation:
        dots = [place(point) for point in validation]
        parts.append(_line(dots, "val"))
        for (x, y), (at, loss) in zip(dots, validation, strict=True):
            parts.append(f'<circle class="val" cx="{x}" cy="{y}" r="4.5"><title>step {at}: validation loss {loss:.4f}</title></circle>')
        ends.append(("validation", "val", dots[-1]))
    for name, kind, (x, y) in apart(ends):
        parts.append(f'<text class="name {kind}" x="{x + 9}" y="{y + 4}">{escape(name)}</text>')
    parts.append("</svg>")
    return Markup("".join(parts))


def _drawable(value: Any) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _line(points: Points, kind: str) -> str:
    return f'<polyline class="{kind}" points="{" ".join(f"{x},{y}" for x, y in points)}"/>'


def apart(ends: list[tuple[str, str, tuple[float, float]]], distance: float = 16) -> list[tuple[str, str, tuple[float, float]]]:
    """The labels at the ends of the lines, moved so that they do not cover each other."""
    ordered = sorted(ends, key=lambda end: end[2][1])
    placed: list[tuple[str, str, tuple[float, float]]] = []
    for name, kind, (x, y) in ordered:
        if placed:
            y = max(y, placed[-1][2][1] + distance)
        placed.append((name, kind, (x, y)))
    return placed


def running_mean(points: Points) -> Points:
    """An exponential mean without the pull towards zero at the start."""
    mean, weight, smooth = 0.0, 0.0, []
    for x, y in points:
        mean = SMOOTHING * mean + (1 - SMOOTHING) * y
        weight = SMOOTHING * weight + (1 - SMOOTHING)
        smooth.append((x, mean / weight))
    return smooth


def nice_range(low: float, high: float, ticks: int = 5) -> tuple[float, float, float]:
    """(lowest tick, highest tick, distance), with distances of 1, 2, 2.5 or 5 times a power of ten that cover low to high."""
    span = max(high - low, abs(high) * 0.1, 1e-6)
    power = 10 ** math.floor(math.log10(span / ticks))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= span / ticks)
    return math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step, step


def step_ticks(last: float, ticks: int = 8) -> list[int]:
    """Whole step numbers from 0 to ``last``."""
    distance = max(1, round(nice_range(0, last, ticks)[2]))
    return list(range(0, int(last) + 1, distance))
