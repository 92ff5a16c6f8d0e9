"""How two adapters differ: at each weight the size of what they add, how alike it is, and which subspaces it fills."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..initializers.svd import singular_vectors, singular_vectors_of_product
from .cutting import EPS
from .effects import Update, base_and_configs, effects
from .slicing import Sliced

# Dense updates are compared in this many directions of each, those of the largest singular values.
DIRECTIONS = 16
# Rows of a matrix that are formed at once.
ROWS = 1024


@dataclass(frozen=True)
class LayerDiff:
    """Two updates of one weight, A and B; None where one of them is nothing.

    Attributes:
        rank_a, rank_b: of the factors; of a dense update the number of directions that are compared.
        norm_a, norm_b, distance: Frobenius norms of both and of their difference.
        cosine: of the updates, as vectors of all their numbers.
        overlap_in, overlap_out: mean squared cosine of the principal angles between what they read, and between what they
            write: 1 where the smaller space lies in the larger one, 0 where they are orthogonal.
        angles_in, angles_out: the principal angles in degrees, the smallest first.
        conflicts: share of the entries whose signs are opposite, among those that neither leaves alone.
    """

    name: str
    rank_a: int
    rank_b: int
    norm_a: float
    norm_b: float
    distance: float
    cosine: float | None
    overlap_in: float | None
    overlap_out: float | None
    angles_in: list[float] | None
    angles_out: list[float] | None
    conflicts: float | None


@torch.no_grad()
def compare(model: nn.Module, one: str, other: str) -> list[LayerDiff]:
    """The differences of two adapters of a model, weight by weight.

    Raises:
        ValueError: an adapter is not there.
        TypeError: a method is no function of the weight.
    """
    base, _ = base_and_configs(model, (one, other))
    a, b = (effect.weights for effect in effects(base, (one, other), sliced=Sliced.of))
    return [_layer(a.get(key), b.get(key)) for key in dict.fromkeys((*a, *b))]


def _layer(a: Update | None, b: Update | None) -> LayerDiff:
    known = a or b
    assert known is not None
    # Of all matrices only those of one layer are in memory.
    a, b = (None if u is None else u.held() for u in (a, b))
    aa, bb = _inner(a, a), _inner(b, b)
    ab = _inner(a, b)
    distance = math.sqrt(max(aa + bb - 2 * ab, 0.0))
    if distance < 1e-3 * math.sqrt(aa + bb) and a is not None and b is not None:
        # Too near for the difference of squares.
        distance = _distance(a, b)
    spaces = [None if u is None else _spaces(u) for u in (a, b)]
    ranks = [0 if s is None else s[0].shape[-1] for s in spaces]
    common = aa > 0 and bb > 0 and a is not None and b is not None
    angles: list[list[float] | None] = [None, None]
    if common and spaces[0] is not None and spaces[1] is not None:
        angles = [_angles(x, y) for x, y in zip(spaces[0], spaces[1], strict=True)]
    out, inner = angles
    return LayerDiff(
        name=known.name,
        rank_a=ranks[0],
        rank_b=ranks[1],
        norm_a=math.sqrt(aa),
        norm_b=math.sqrt(bb),
        distance=distance,
        cosine=max(-1.0, min(1.0, ab / math.sqrt(aa * bb))) if common else None,
        overlap_in=_overlap(inner),
        overlap_out=_overlap(out),
        angles_in=inner,
        angles_out=out,
        conflicts=_conflicts(a, b) if common and a is not None and b is not None else None,
    )


def _inner(a: Update | None, b: Update | None) -> float:
    """The sum of the products of all entries; from the factors where both have them."""
    if a is None or b is None:
        return 0.0
    if a.dense is not None or b.dense is not None:
        return sum(float((x * y).sum()) for x, y in _rows(a, b))
    (a1, b1), (a2, b2) = ([t.double() for t in u.factors()] for u in (a, b))
    return float(((b1.mT @ b2) * (a1 @ a2.mT)).sum())


def _distance(a: Update, b: Update) -> float:
    return math.sqrt(sum(float((x - y).square().sum()) for x, y in _rows(a, b)))


def _rows(a: Update, b: Update) -> Iterator[tuple[Tensor, Tensor]]:
    """Both matrices in double precision, some rows at a time."""
    if a.dense is None and b.dense is None:
        (a1, b1), (a2, b2) = ([t.double() for t in u.factors()] for u in (a, b))
        for start in range(0, b1.shape[-2], ROWS):
            part = slice(start, start + ROWS)
            yield b1[..., part, :] @ a1, b2[..., part, :] @ a2
        return
    yield from ((x.double(), y.double()) for x, y in zip(a.slices(), b.slices(), strict=True))


def _conflicts(a: Update, b: Update) -> float:
    opposite = acting = 0
    for x, y in _rows(a, b):
        signs = x.sign() * y.sign()
        opposite += int((signs < 0).sum())
        acting += int((signs != 0).sum())
    return opposite / acting if acting else 0.0


def _spaces(update: Update) -> tuple[Tensor, Tensor]:
    """Orthonormal bases ``(*batch, out, k)`` and ``(*batch, in, k)`` of what an update writes and reads."""
    if update.dense is None:
        a, b = update.factors()
        u, s, v = singular_vectors_of_product(b, a)
    else:
        u, s, v = singular_vectors(update.dense, min(DIRECTIONS, *update.site.shape[-2:]))
    # Ranks that no matrix of a batch has.
    used = (s > s[..., :1] * 16 * EPS).sum(-1)
    k = max(int(used.max()) if used.numel() else 0, 1)
    return u[..., :k].float(), v[..., :k].float()


def _angles(x: Tensor, y: Tensor) -> list[float]:
    """The principal angles between two spaces in degrees; of a stack of matrices their mean."""
    cosines = torch.linalg.svdvals(x.double().mT @ y.double()).clamp(0, 1)
    cosines = cosines.flatten(0, -2).square().mean(0).sqrt() if cosines.ndim > 1 else cosines
    return [math.degrees(math.acos(c)) for c in cosines.tolist()]


def _overlap(angles: list[float] | None) -> float | None:
    return None if not angles else sum(math.cos(math.radians(a)) ** 2 for a in angles) / len(angles)


# ---- a picture ------------------------------------------------------------------------------------------------------------
def grid(layers: list[LayerDiff]) -> tuple[list[str], list[str], dict[tuple[str, str], LayerDiff]]:
    """The layers as rows (blocks, by their number) and columns (kinds of layers)."""
    cells: dict[tuple[str, str], LayerDiff] = {}
    for layer in layers:
        found = re.search(r"(?:^|\.)(\d+)\.", layer.name)
        row = found.group(1) if found else "-"
        column = layer.name[found.end() :] if found else layer.name
        cells[row, column] = layer
    rows = sorted({r for r, _ in cells}, key=lambda r: (r == "-", int(r) if r != "-" else 0))
    return rows, list(dict.fromkeys(c for _, c in cells)), cells


# What is shown, its lowest and highest value (None stands for the largest norm there is), and its colours.
PANELS: Mapping[str, tuple[str, float, float | None, str]] = {
    "norm_a": ("norm of A", 0, None, "viridis"),
    "norm_b": ("norm of B", 0, None, "viridis"),
    "cosine": ("cosine of A and B", -1, 1, "RdBu"),
    "overlap_in": ("overlap of what they read", 0, 1, "viridis"),
    "overlap_out": ("overlap of what they write", 0, 1, "viridis"),
    "conflicts": ("share of opposite signs (chance: 0.5)", 0, 1, "RdBu_r"),
}
# Numbers are written into the cells of grids up to this size.
LEGIBLE = 40, 10


def draw(layers: list[LayerDiff], path: Path, title: str = "") -> None:
    """A heat map of the layers, blocks downwards and kinds of layers across, for each of six measures. Grey is what only one of
    the adapters changes."""
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows, columns, cells = grid(layers)
    figure = Figure(figsize=(3 * (1.8 + 0.5 * len(columns)), 2 * (1.5 + 0.22 * len(rows))), layout="constrained")
    FigureCanvasAgg(figure)
    largest = max((max(layer.norm_a, layer.norm_b) for layer in layers), default=1.0)
    for place, (name, (label, low, high, colours)) in enumerate(PANELS.items(), 1):
        axes = figure.add_subplot(2, 3, place)
        axes.set_facecolor("0.85")
        values = [[_value(cells.get((r, c)), name) for c in columns] for r in rows]
        high = largest if high is None else high
        image = axes.imshow(values, cmap=colours, vmin=low, vmax=high, aspect="auto")
        axes.set_xticks(range(len(columns)), columns if place > 3 else [""] * len(columns), rotation=45, ha="right", fontsize=7)
        axes.set_yticks(range(len(rows)), rows, fontsize=7)
        axes.set_title(label, fontsize=9)
        axes.set_ylabel("block", fontsize=7)
        figure.colorbar(image, ax=axes, shrink=0.8).ax.tick_params(labelsize=7)
        if len(rows) <= LEGIBLE[0] and len(columns) <= LEGIBLE[1]:
            for i, line in enumerate(values):
                for j, value in enumerate(line):
                    if not math.isnan(value):
                        red, green, blue, _ = colormaps[colours]((value - low) / ((high - low) or 1))
                        dark = 0.3 * red + 0.6 * green + 0.1 * blue < 0.5
                        axes.text(j, i, f"{value:.2g}", ha="center", va="center", fontsize=5, color="white" if dark else "black")
    if title:
        figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150, format="png")


def _value(layer: LayerDiff | None, name: str) -> float:
    value = None if layer is None else getattr(layer, name)
    return math.nan if value is None or (name.startswith("norm") and not value) else value


def altogether(layers: list[LayerDiff]) -> tuple[float, float, float, float | None]:
    """Of all layers as one: the norms of A and B, that of their difference, and the cosine."""
    a, b, distance = (math.sqrt(sum(getattr(layer, name) ** 2 for layer in layers)) for name in ("norm_a", "norm_b", "distance"))
    return a, b, distance, sum((layer.cosine or 0) * layer.norm_a * layer.norm_b for layer in layers) / (a * b) if a and b else None
