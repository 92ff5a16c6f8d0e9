"""What quantising costs, and how much of that each start of LoRA's factors gets back: per layer and in all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from ..core.site import Embedding, Stack
from .calibration import Progress
from .cloq import DAMPING, MEMORY, Calibration, Rooted, in_groups, own_samples, running, second_moments
from .compensation import best_factors
from .svd import precise

if TYPE_CHECKING:
    from ..core.site import Site

# What the keys of the errors stand for.
STARTS = {"plain": "plain", "loftq": "LoftQ", "own": "CLoQ, own samples", "cloq": "CLoQ, data"}


@dataclass(frozen=True)
class LayerErrors:
    """What is wrong with one weight and with its outputs, as shares of what they are before quantisation, by start (see `STARTS`)."""

    name: str
    weight: dict[str, float]
    output: dict[str, float]


@dataclass(frozen=True)
class StartErrors:
    """The errors of all quantised layers.

    Attributes:
        rank: of the factors.
        measured_on: which inputs the outputs are of: ``"held out"``, ``"calibration"`` or ``"own samples"``.
    """

    rank: int
    measured_on: str
    layers: list[LayerErrors]

    @property
    def weight(self) -> dict[str, float]:
        """The root mean square over all layers."""
        return self._mean([layer.weight for layer in self.layers])

    @property
    def output(self) -> dict[str, float]:
        """The root mean square over all layers."""
        return self._mean([layer.output for layer in self.layers])

    @staticmethod
    def _mean(errors: list[dict[str, float]]) -> dict[str, float]:
        return {start: (sum(e[start] ** 2 for e in errors) / len(errors)) ** 0.5 for start in errors[0]}


@torch.no_grad()
def start_errors(
    model: nn.Module,
    original: Any = None,
    calibration: Calibration | None = None,
    held_out: Calibration | None = None,
    *,
    rank: int = 8,
    damping: float = DAMPING,
    memory: int = MEMORY,
    progress: Progress | None = None,
) -> StartErrors:
    """How far each quantised layer is from what it was: plain, and with factors that start by LoftQ or by CLoQ.

    Nothing is changed, and the model need not have an adapter.

    Args:
        model: a quantised model, with adapters or without.
        original, calibration, damping, memory: as for `initialize_lora_cloq_weights`. Without data, CLoQ is shown on the model's own
            samples alone.
        held_out: other batches, on which the outputs are compared. Where None, the calibration data, or other own samples.
        rank: of the factors.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: no layer is quantised, a weight is not found, or a layer met no input.
    """
    from ..core.targets import bare_model
    from ..operations.dequantize import quantised_sites
    from ..operations.original import original_weights

    base = bare_model(model)
    sites = {f"{path}.{site.name}": site for site, path, _ in quantised_sites(base) if _has_inputs(site)}
    if not sites:
        raise ValueError("No layer of the model is quantised, so there is nothing that a start could make up for.")
    read = original_weights(base, original)
    data: dict[str, Callable[[], object]] = {}
    try:
        data["own"] = running(base, None)
    except ValueError:
        if calibration is None:
            raise
    if calibration is not None:
        data["cloq"] = running(base, calibration)
    if held_out is not None:
        measured_on, measure = "held out", running(base, held_out)
    elif calibration is not None:
        measured_on, measure = "calibration", data["cloq"]
    else:
        measured_on, measure = "own samples", running(base, own_samples(base, seed=1))
    layers: list[LayerErrors] = []
    for group in in_groups(sites, memory // (len(data) + 1)):
        moments = {start: second_moments(base, group, run) for start, run in data.items()}
        seen = second_moments(base, group, measure)
        rooted = {start: Rooted(damping) for start in data}
        for name, site in group.items():
            w = precise(site.matrix(read(name).to(site.device)))
            roots = {"loftq": None} | {start: rooted[start](moments[start].pop(name)) for start in data}
            layers.append(_errors(name, w, w - precise(site.read()[0]), roots, seen.pop(name), rank))
            if progress is not None:
                progress(len(layers), len(sites))
    return StartErrors(rank, measured_on, layers)


def _has_inputs(site: Site) -> bool:
    return isinstance(site, (Embedding, Stack)) or acts_on_last_axis(site)


def _errors(name: str, w: Tensor, lost: Tensor, roots: Mapping[str, Tensor | None], moments: Tensor, rank: int) -> LayerErrors:
    left = {"plain": lost}
    for start, root in roots.items():
        a, b = best_factors(lost, rank, 1.0, root)
        left[start] = lost - b @ a
    weight, output = float(w.norm()), _length(w, moments)
    return LayerErrors(
        name,
        {start: float(e.norm()) / max(weight, 1e-30) for start, e in left.items()},
        {start: _length(e, moments) / max(output, 1e-30) for start, e in left.items()},
    )


def _length(matrix: Tensor, moments: Tensor) -> float:
    """The norm of what the matrix makes of all inputs."""
    h = moments.to(matrix)
    squares = matrix.square() * h if h.ndim == 1 else matrix * (matrix @ h)
    return float(squares.sum().clamp_min(0)) ** 0.5
