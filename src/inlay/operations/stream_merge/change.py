"""The parts of a plan: what changes together, what becomes of it, and what rounding took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...core.retrained import AnyPlace
from ..arithmetic import Combination, Options
from ..combine import Weights
from ..disk_base import Group


@dataclass
class Change:
    """What becomes of one weight.

    Attributes:
        name: in the model.
        how: the methods that act on it, in order; or what else happens.
    """

    name: str
    shape: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Rounding:
    """What quantising a merged weight again lost, in squares of norms."""

    error: float
    weight: float
    change: float

    @property
    def of_weight(self) -> float:
        """The error as a share of the weight."""
        return (self.error / max(self.weight, 1e-30)) ** 0.5

    @property
    def of_change(self) -> float:
        """The error as a share of what the adapters changed."""
        return (self.error / max(self.change, 1e-30)) ** 0.5

    @staticmethod
    def total(all_of_them: Iterable[Rounding]) -> Rounding:
        found = list(all_of_them)
        return Rounding(sum(r.error for r in found), sum(r.weight for r in found), sum(r.change for r in found))


@dataclass(frozen=True)
class Combining:
    """How several adapters become one change."""

    chosen: Combination
    weights: Weights
    options: Options
    seed: int | None

    def fingerprint(self) -> list[Any]:
        o = self.options
        return [self.chosen.name, self.weights, o.density, o.majority_sign_method, o.gamma, o.epsilon, self.seed]


@dataclass(eq=False)
class Unit:
    """Weights that have to be computed together, and the tensors of the files that they are made of.

    Attributes:
        new: names of tensors that the base's files do not have.
        marks: what it has in common with places and groups that belong to it.
    """

    places: list[AnyPlace] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    marks: set[Any] = field(default_factory=set)
