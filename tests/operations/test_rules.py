"""The rules of combining, number by number, against formulas that know nothing of tensors; also at the ends of their options."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from inlay.operations.arithmetic import COMBINATIONS, Options

N, SHAPE = 3, (4, 5)
SIZE = SHAPE[0] * SHAPE[1]
# A weight a number is a list of all the adapters' numbers there.
Flat = list[list[float]]

WEIGHTS = [(1.0, 1.0, 1.0), (0.5, -1.5, 2.0), (-1.0, -0.25, -2.0), (1.0, 0.0, -0.5)]
DENSITIES = [0.0, 0.04, 0.3, 0.5, 0.97, 1.0]


def stack(seed: int = 0) -> Tensor:
    return torch.randn(N, *SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def uniform() -> Flat:
    return torch.rand(N, SIZE, generator=generator()).tolist()


def by_size(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda j: -abs(row[j]))


def trim(t: Flat, d: float) -> Flat:
    return [[x if j in by_size(row)[: int(d * SIZE)] else 0.0 for j, x in enumerate(row)] for row in t]


def drop(t: Flat, d: float) -> Flat:
    return [[x / d if u < d else 0.0 for x, u in zip(row, draws, strict=True)] for row, draws in zip(t, uniform(), strict=True)]


def magprune(t: Flat, d: float) -> Flat:
    found = []
    for row, draws in zip(t, uniform(), strict=True):
        found.append(new := [0.0] * SIZE)
        for start in range(0, SIZE, SHAPE[1]):
            ascending = by_size(row[start : start + SHAPE[1]])[::-1]
            for place, j in enumerate(ascending):
                chance = d + min(0.1, d) * (place / (SHAPE[1] - 1) - 0.5)
                if d >= 1:
                    new[start + j] = row[start + j]
                elif draws[start + j] < chance:
                    new[start + j] = row[start + j] / min(chance, 1)
    return found


def crumbs(t: Flat, d: float) -> Flat:
    gamma = 0.1
    return [[x if j in by_size(row)[int(gamma * SIZE) : int((d + gamma) * SIZE)] else 0.0 for j, x in enumerate(row)] for row in t]


def total(t: Flat, w: tuple[float, ...], _: str) -> list[float]:
    return [sum(v * row[j] for v, row in zip(w, t, strict=True)) for j in range(SIZE)]


def elected(t: Flat, w: tuple[float, ...], method: str) -> list[float]:
    found = []
    for j in range(SIZE):
        numbers = [row[j] for row in t]
        ballot = numbers if method == "total" else [(x > 0) - (x < 0) for x in numbers]
        sign = 1 if sum(ballot) >= 0 else -1
        agreeing = [v * x for v, x in zip(w, numbers, strict=True) if x * sign > 0]
        found.append(sum(agreeing) / max(len(agreeing), 1))
    return found


def whole(t: Flat, _: float) -> Flat:
    return t


PRUNED: dict[str, tuple[Callable[[Flat, float], Flat], Callable[[Flat, tuple[float, ...], str], list[float]]]] = {
    "linear": (whole, total), "cat": (whole, total), "svd": (whole, total), "magnitude_prune": (trim, total), "ties": (trim, elected),
    "dare_linear": (drop, total), "dare_ties": (drop, elected), "della_linear": (magprune, total), "della": (magprune, elected),
    "breadcrumbs": (crumbs, total), "breadcrumbs_ties": (crumbs, elected),
}  # fmt: skip


@pytest.mark.parametrize("name", PRUNED)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("method", ["total", "frequency"])
def test_what_is_pruned_elected_and_summed(name: str, weights: tuple[float, ...], method: str) -> None:
    t, (prune, merge) = stack(), PRUNED[name]
    for density in DENSITIES:
        o = Options(density, method, gamma=0.1, generator=generator())
        found = COMBINATIONS[name].rule(t, torch.tensor(weights, dtype=torch.float64), o)
        wanted = merge(prune(t.flatten(1).tolist(), density), weights, method)
        torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-9)


def sce(t: Flat, w: tuple[float, ...], density: float) -> list[float]:
    t = [[math.copysign(v != 0, v) * x for x in row] for v, row in zip(w, t, strict=True)]
    columns = list(zip(*t, strict=True))
    differ = [sum((x - sum(c) / N) ** 2 for x in c) for c in columns]
    chosen = by_size(differ)[: int(density * SIZE)]
    energies = [abs(v) * sum(row[j] ** 2 for j in chosen) for v, row in zip(w, t, strict=True)]
    found = []
    for j in range(SIZE):
        sign = 1 if sum(columns[j]) >= 0 else -1
        agreeing = [(e, x) for e, x in zip(energies, columns[j], strict=True) if x * sign > 0 and j in chosen]
        voices = sum(e for e, _ in agreeing)
        found.append(sum(e * x for e, x in agreeing) / voices if voices else 0.0)
    return found


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("density", DENSITIES)
def test_select_calculate_erase(weights: tuple[float, ...], density: float) -> None:
    """No number is larger than the largest of those that it is a mean of, whatever the signs of the weights."""
    t = stack(1)
    found = COMBINATIONS["sce"].rule(t, torch.tensor(weights, dtype=torch.float64), Options(density))
    wanted = torch.tensor(sce(t.flatten(1).tolist(), weights, density), dtype=torch.float64)
    torch.testing.assert_close(found.flatten(), wanted, rtol=1e-9, atol=1e-12)
    assert (found.abs() <= t.abs().amax(0) + 1e-12).all()


def test_equal_adapters_have_themselves_for_a_mean() -> None:
    """Where they do not differ nothing is selected, but at a density of 1 all is."""
    one = stack()[:1]
    for name in ("soup", "karcher", "slerp", "sce", "ties"):
        found = COMBINATIONS[name].rule(one.repeat(2, 1, 1), torch.ones(2, dtype=torch.float64), Options(1.0))
        torch.testing.assert_close(found, one[0])


@pytest.mark.parametrize("density", [0.01, 0.04, 0.1])
def test_what_hardly_ever_stays_is_not_scaled_up_beyond_measure(density: float) -> None:
    t = torch.randn(1, 200, 300, generator=torch.Generator().manual_seed(0))
    found = COMBINATIONS["della_linear"].rule(t, torch.ones(1), Options(density, generator=generator()))
    assert (found.abs() <= t[0].abs() * 2.0001 / density).all()
    assert (found != 0).double().mean().item() == pytest.approx(density, rel=0.1)
    assert found[found != 0].abs().mean().item() < 1.5 * t.abs().mean().item() / density


def test_a_number_alone_in_its_row_stays_by_the_density() -> None:
    found = COMBINATIONS["della_linear"].rule(torch.ones(1, 20000, 1), torch.ones(1), Options(0.3, epsilon=0.2, generator=generator()))
    assert (found != 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    torch.testing.assert_close(found[found != 0], torch.full((int((found != 0).sum()),), 1 / 0.3))


def test_outliers_are_larger_than_what_stays() -> None:
    """Numbers of one size are no outliers among themselves."""
    t = torch.ones(1, 10, 10)
    t[0, 0, :3] = torch.tensor([5.0, -7.0, 6.0])
    found = COMBINATIONS["breadcrumbs"].rule(t, torch.ones(1), Options(0.5, gamma=0.03))
    assert found.tolist() == [[0.0] * 3 + [1.0] * 7, *[[1.0] * 10] * 9]
    assert COMBINATIONS["breadcrumbs"].rule(torch.ones(1, 10, 10), torch.ones(1), Options(0.5, gamma=0.03)).eq(1).all()


# ---- on the sphere --------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.2, 0.6), (3.0, -1.0), (0.0, 2.0)])
def test_the_way_along_the_sphere(weights: tuple[float, float]) -> None:
    one, other = stack(2)[:2].flatten(1).tolist()
    share = weights[1] / sum(weights)
    dot, lengths = sum(x * y for x, y in zip(one, other, strict=True)), [math.hypot(*one), math.hypot(*other)]
    angle = math.acos(dot / (lengths[0] * lengths[1]))
    wanted = [(math.sin((1 - share) * angle) * x + math.sin(share * angle) * y) / math.sin(angle) for x, y in zip(one, other, strict=True)]
    found = COMBINATIONS["slerp"].rule(stack(2)[:2], torch.tensor(weights, dtype=torch.float64), Options())
    torch.testing.assert_close(found.flatten(), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (0.2, 0.6, 3.0), (2.0, -0.5, 1.0)])
def test_from_the_mean_on_the_sphere_all_ways_cancel_out(weights: tuple[float, ...]) -> None:
    t = stack(3) + 0.7
    found = COMBINATIONS["karcher"].rule(t, torch.tensor(weights, dtype=torch.float64), Options()).flatten()
    mean, ways = found / found.norm(), torch.zeros(SIZE, dtype=torch.float64)
    for v, d in zip(weights, t.flatten(1), strict=True):
        unit = d / d.norm()
        angle = torch.arccos(unit @ mean)
        across = unit - (unit @ mean) * mean
        ways += v * angle * across / across.norm()
    assert ways.norm().item() < 1e-6
    length = sum(v * d.norm().item() for v, d in zip(weights, t, strict=True)) / sum(weights)
    assert found.norm().item() == pytest.approx(length)


def test_who_does_nothing_has_no_direction() -> None:
    t = stack()[:2] * torch.tensor([0.0, 1.0]).view(2, 1, 1)
    for name in ("karcher", "slerp"):
        for share in (0.25, -1.0, 2.0):
            found = COMBINATIONS[name].rule(t, torch.tensor([1 - share, share], dtype=torch.float64), Options())
            torch.testing.assert_close(found, share * t[1])


# ---- what is refused ------------------------------------------------------------------------------------------------------
def test_options_that_mean_nothing_are_refused() -> None:
    for name, wrong in {"density": (-0.1, math.nan), "gamma": (1.0, -0.1), "epsilon": (-1.0, math.nan)}.items():
        for value in wrong:
            with pytest.raises(ValueError, match=rf"`{name}` is a .*not {value}"):
                Options(**{name: value})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'total' or 'frequency', not 'most'"):
        Options(majority_sign_method="most")
