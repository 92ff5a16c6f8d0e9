"""How changes of several adapters become one: a pure function on stacked tensors each, registered under its name.

A rule takes ``t (n, ...)``, one tensor an adapter, and ``w (n,)``, their weights. What the tensors are is the combination's
`space`: the change of the weight, LoRA's factors one by one, or coordinates that the adapters have in common.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from ..core.config import nearest

Of = Callable[[Tensor], Tensor]


class Whole(Protocol):
    """What a rule may ask of all of the tensors, where it may be given slices of them alone.

    Attributes:
        size: how many numbers each tensor has.
    """

    size: int

    def least(self, of: Of, kept: int) -> Tensor:
        """The least of so many largest magnitudes in what is made of the tensors, ``(n,)``."""
        ...

    def sums(self, of: Of) -> Tensor:
        """What is made of the tensors, a sum over their slices."""
        ...

    def draws(self, t: Tensor) -> Tensor:
        """Numbers in [0, 1), one for each."""
        ...


@dataclass(frozen=True)
class Options:
    """What rules go by beside the weights.

    Args:
        density: the share of each tensor's numbers that stays, in [0, 1].
        majority_sign_method: elect the sign of a number by its ``"total"`` over the adapters, or by their ``"frequency"``.
        gamma: the share of the largest numbers that breadcrumbs leave out, in [0, 1).
        epsilon: by how much DELLA's chances to stay differ from the smallest number to the largest; no more than the density.
        generator: of the draws.
        whole: what is to be known of all of the tensors where a rule is given slices of them; None where it is given all.

    Raises:
        ValueError: an option is none of these; the message names it.
    """

    density: float = 1.0
    majority_sign_method: str = "total"
    gamma: float = 0.01
    epsilon: float = 0.1
    generator: torch.Generator = field(default_factory=torch.Generator)
    whole: Whole | None = None

    def __post_init__(self) -> None:
        # What is no number is in no interval either.
        if not self.density >= 0:
            raise ValueError(f"`density` is a share in [0, 1], not {self.density!r}.")
        if self.majority_sign_method not in ("total", "frequency"):
            raise ValueError(f"`majority_sign_method` is 'total' or 'frequency', not {self.majority_sign_method!r}.")
        if not 0 <= self.gamma < 1:
            raise ValueError(f"`gamma` is a share in [0, 1), not {self.gamma!r}.")
        if not self.epsilon >= 0:
            raise ValueError(f"`epsilon` is a number from 0 upwards, not {self.epsilon!r}.")

    def seen(self, t: Tensor) -> Whole:
        return self.whole or Held(t, self.generator)


class Held:
    """Tensors of which a rule is given all."""

    def __init__(self, t: Tensor, generator: torch.Generator) -> None:
        self.t, self.generator, self.size = t, generator, t[0].numel()

    def least(self, of: Of, kept: int) -> Tensor:
        return torch.stack([s.kthvalue(s.numel() - kept + 1).values for s in of(self.t).flatten(1).abs()])

    def sums(self, of: Of) -> Tensor:
        return of(self.t)

    def draws(self, t: Tensor) -> Tensor:
        return torch.rand(t.shape, generator=self.generator)


Rule = Callable[[Tensor, Tensor, Options], Tensor]


@dataclass(frozen=True)
class Combination:
    """A way to combine.

    Attributes:
        rule: on stacked tensors.
        space: ``"sum"`` (the rule is linear, and sums of products stay products), ``"delta"``, ``"factors"`` (A and B each by
            itself, where all adapters are LoRA), ``"invariant"`` (the change of the weight, in any orthonormal basis),
            ``"aligned"`` (`knots`) or ``"core"`` (`core_ties`).
        prunes: it goes by ``density``.
        fixed_rank: the result is of the largest rank that comes in unless another is asked for.
        elects: it goes by ``majority_sign_method``.
        paper: its number at arXiv.
        formula: of tensors t_i, one an adapter, and their weights w_i; D_i is the change of the weight, whatever the method.
        summary: what it does, in one line.
    """

    name: str
    rule: Rule
    space: str
    prunes: bool
    fixed_rank: bool
    paper: str
    formula: str
    summary: str
    elects: bool = False


COMBINATIONS: dict[str, Combination] = {}


# The share of numbers that stays where none is given.
DENSITY = 0.5


def density_of(chosen: Combination, density: float | None) -> float | None:
    """What a way to combine goes by; None where it does not prune."""
    return (DENSITY if density is None else density) if chosen.prunes else None


def rule(
    name: str, space: str, paper: str, formula: str, *, svd: bool = False, prunes: bool = False, elects: bool = False
) -> Callable[[Rule], Rule]:
    """Register a rule; its docstring's first line says what it does.

    Args:
        svd: also on the change of the weight, cut to the rank of LoRA, as ``<name>_svd``.
    """

    def register(function: Rule) -> Rule:
        summary = (function.__doc__ or "").split("\n")[0]
        COMBINATIONS[name] = Combination(name, function, space, prunes, False, paper, formula, summary, elects)
        if svd:
            cut = f"{summary.rstrip('.')}; on the change of the weight, cut to a rank."
            of_rank = f"the best of rank r for {formula.replace('t_i', 'D_i')}"
            COMBINATIONS[f"{name}_svd"] = Combination(f"{name}_svd", function, "delta", prunes, True, paper, of_rank, cut, elects)
        return function

    return register


def combination(name: str) -> Combination:
    """
    Raises:
        ValueError: there is none of this name.
    """
    if name not in COMBINATIONS:
        raise ValueError(f"Invalid combination_type: {name!r}.{nearest(name, COMBINATIONS)} Known: {', '.join(sorted(COMBINATIONS))}.")
    return COMBINATIONS[name]


# ---- what rules are made of -------------------------------------------------------------------------------------------------
def weighted(t: Tensor, w: Tensor) -> Tensor:
    """Each tensor times its weight."""
    return t * w.to(t).view(-1, *(1 for _ in t.shape[1:]))


def shares(w: Tensor) -> Tensor:
    """The weights as shares of their sum.

    Raises:
        ValueError: they have no positive sum.
    """
    if w.sum() <= 0:
        raise ValueError(f"The weights {[round(x, 6) for x in w.tolist()]} are taken as shares of their sum, which must be positive.")
    return w / w.sum()


def itself(t: Tensor) -> Tensor:
    return t


def largest(t: Tensor, density: float, o: Options, of: Of = itself) -> Tensor:
    """This share of each tensor's numbers by magnitude; the rest zero.

    Args:
        of: what is made of the tensors before.
    """
    whole, made = o.seen(t), of(t)
    kept = int(density * whole.size)
    if kept >= whole.size:
        return made
    if kept == 0:
        return torch.zeros_like(made)
    least = whole.least(of, kept).view(-1, *(1 for _ in made.shape[1:]))
    return torch.where(made.abs() >= least, made, 0)


def drawn(t: Tensor, o: Options) -> Tensor:
    """Each number with this chance, and divided by it (DARE)."""
    if o.density >= 1:
        return t
    kept = o.seen(t).draws(t).to(t.device) < o.density
    return torch.where(kept, t / o.density, 0) if o.density else torch.zeros_like(t)


def agreeing(t: Tensor, w: Tensor, method: str) -> Tensor:
    """At each number the mean of those adapters whose sign is that of the majority (TIES)."""
    positive = (t.sum(0) if method == "total" else t.sign().sum(0)) >= 0
    total, voices = torch.zeros_like(t[0]), torch.zeros_like(t[0])
    for each, weight in zip(t, w.tolist(), strict=True):
        agrees = torch.where(positive, each > 0, each < 0)
        total.add_(torch.where(agrees, each, 0), alpha=weight)
        voices += agrees
    return total / voices.clamp_min_(1)


# ---- HF peft's ----------------------------------------------------------------------------------------------------------
@rule("linear", "factors", "2212.04089", "sum_i w_i t_i")
def linear(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """The weighted sum; of LoRA's factors one by one, of anything else exactly."""
    return weighted(t, w).sum(0)


@rule("cat", "sum", "2212.04089", "sum_i w_i D_i")
def cat(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """The weighted sum, exactly: ranks side by side."""
    return linear(t, w, o)


@rule(
    "ties",
    "factors",
    "2306.01708",
    "mean of w_i trim(t_i) over the i that agree with sign(sum_i trim(t_i))",
    svd=True,
    prunes=True,
    elects=True,
)
def ties(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Trim to the largest numbers, elect a sign, and average who agrees with it."""
    return agreeing(largest(t, o.density, o), w, o.majority_sign_method)


@rule("dare_linear", "factors", "2311.03099", "sum_i w_i drop(t_i)", svd=True, prunes=True)
def dare_linear(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Drop numbers at random, scale up the rest, and sum."""
    return linear(drawn(t, o), w, o)


@rule(
    "dare_ties",
    "factors",
    "2311.03099",
    "mean of w_i drop(t_i) over the i that agree with sign(sum_i drop(t_i))",
    svd=True,
    prunes=True,
    elects=True,
)
def dare_ties(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Drop numbers at random, scale up the rest, elect a sign, and average who agrees with it."""
    return agreeing(drawn(t, o), w, o.majority_sign_method)


@rule("magnitude_prune", "factors", "2306.01708", "sum_i w_i trim(t_i)", svd=True, prunes=True)
def magnitude_prune(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Trim to the largest numbers, and sum."""
    return linear(largest(t, o.density, o), w, o)


# ---- ours ---------------------------------------------------------------------------------------------------------------
@rule("soup", "sum", "2203.05482", "sum_i w_i D_i / sum_i w_i")
def soup(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """The mean, by shares: a model soup."""
    return linear(t, shares(w), o)


@rule("karcher", "invariant", "", "L m, with m the mean of the D_i / |D_i| on the sphere and L that of the |D_i|")
def karcher(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """The mean of directions on the sphere (Karcher 1977), by shares, at the mean of the lengths."""
    flat, w = t.flatten(1), shares(w).to(t)
    lengths = flat.norm(dim=1)
    there = lengths > 0
    if not there.any():
        return torch.zeros_like(t[0])
    units, part, total = flat[there] / lengths[there, None], w[there], w[there].sum()
    part = part / total if total else part
    mean = linear(units, part, o)
    # Opposite directions have no mean; start from the first, as any start would do.
    mean = mean / mean.norm() if mean.norm() > 1e-6 else units[0]
    for _ in range(50):
        cosines = (units @ mean).clamp(-1, 1)
        angles = cosines.arccos()
        # The way from the mean to each direction, along the sphere.
        to = (units - cosines[:, None] * mean) * torch.where(angles > 1e-6, angles / angles.sin().clamp_min(1e-7), 1)[:, None]
        step = linear(to, part, o)
        size = step.norm()
        if size < 1e-7:
            break
        mean = size.cos() * mean + size.sin() * step / size
    return ((w * lengths).sum() * mean).view_as(t[0])


@rule("slerp", "invariant", "", "(sin((1 - s) a) D_1 + sin(s a) D_2) / sin a, with a the angle between them and s = w_2 / (w_1 + w_2)")
def slerp(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """From one adapter to the other along the sphere (Shoemake 1985), by shares; of more than two, their Karcher mean."""
    if len(t) != 2:
        return karcher(t, w, o)
    one, other = t
    share = float(shares(w)[1])
    lengths = one.norm() * other.norm()
    cosine = float((one.flatten() @ other.flatten()) / lengths) if lengths > 0 else 1.0
    if abs(cosine) > 1 - 1e-6:
        return torch.lerp(one, other, share)
    angle = torch.tensor(cosine, dtype=torch.float64).arccos()
    left, right = (((1 - share) * angle).sin() / angle.sin()).item(), ((share * angle).sin() / angle.sin()).item()
    return left * one + right * other


def kept_by_rank(t: Tensor, o: Options) -> Tensor:
    """Numbers at random, the larger of a row the likelier, each divided by its chance (DELLA's MagPrune)."""
    if o.density >= 1:
        return t
    width = t.shape[-1]
    ranks = t.abs().argsort(-1).argsort(-1).to(t.dtype)
    # A number that hardly ever stays would be scaled up beyond measure where it does.
    spread = min(o.epsilon, o.density) * (ranks - (width - 1) / 2) / max(width - 1, 1)
    chance = (o.density + spread).clamp_max(1)
    kept = o.seen(t).draws(t).to(t.device) < chance
    return torch.where(kept, t / chance, 0)


@rule("della_linear", "delta", "2406.11617", "sum_i w_i magprune(D_i)", svd=True, prunes=True)
def della_linear(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Drop numbers at random, the small ones of a row rather than the large, scale up the rest, and sum."""
    return linear(kept_by_rank(t, o), w, o)


@rule(
    "della",
    "delta",
    "2406.11617",
    "mean of w_i magprune(D_i) over the i that agree with sign(sum_i magprune(D_i))",
    svd=True,
    prunes=True,
    elects=True,
)
def della(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Drop numbers at random, the small ones of a row rather than the large, elect a sign, and average who agrees with it."""
    return agreeing(kept_by_rank(t, o), w, o.majority_sign_method)


def crumbs(t: Tensor, o: Options) -> Tensor:
    """The share ``density`` of each tensor by magnitude, below the share ``gamma`` of outliers."""
    whole, kept = o.seen(t), largest(t, o.density + o.gamma, o)
    # A number that is as large as those which stay is no outlier.
    most = whole.least(itself, int(o.gamma * whole.size) + 1).view(-1, *(1 for _ in t.shape[1:]))
    return torch.where(t.abs() > most, 0, kept)


@rule("breadcrumbs", "delta", "2312.06795", "sum_i w_i crumbs(D_i)", svd=True, prunes=True)
def breadcrumbs(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Leave out the smallest numbers and the few largest, and sum."""
    return linear(crumbs(t, o), w, o)


@rule(
    "breadcrumbs_ties",
    "delta",
    "2312.06795",
    "mean of w_i crumbs(D_i) over the i that agree with sign(sum_i crumbs(D_i))",
    svd=True,
    prunes=True,
    elects=True,
)
def breadcrumbs_ties(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Leave out the smallest numbers and the few largest, elect a sign, and average who agrees with it."""
    return agreeing(crumbs(t, o), w, o.majority_sign_method)


@rule(
    "sce",
    "delta",
    "2408.07990",
    "sum of e_i D_i over the i that agree with the sign of the sum, over the sum of their e_i = w_i |D_i|^2, where the D_i differ most",
    svd=True,
    prunes=True,
)
def sce(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """Select numbers in which the adapters differ most, weigh each adapter by its energy there, erase the minority's signs."""

    def turned(t: Tensor) -> Tensor:
        # An adapter of negative weight counts the other way round.
        return weighted(t, w.sign())

    def differing(t: Tensor) -> Tensor:
        return turned(t).var(0).unsqueeze(0)

    def select(t: Tensor) -> Tensor:
        return turned(t) if o.density >= 1 else turned(t) * (largest(t, o.density, o, differing) != 0)

    def energies(t: Tensor) -> Tensor:
        return select(t).flatten(1).square().sum(1)

    if len(t) == 1:
        return turned(t)[0]
    chosen, energy = select(t), w.abs().to(t) * o.seen(t).sums(energies)
    total = energy.sum()
    sign = torch.where(chosen.sum(0) >= 0, 1, -1)
    part = weighted((chosen.sign() == sign).to(t), energy / total if total > 0 else energy)
    voices = part.sum(0)
    return (part * chosen).sum(0) / torch.where(voices > 0, voices, 1)


@rule("knots", "aligned", "2410.19735", "U S ties(V_1, ..., V_n), with [D_1 ... D_n] = U S [V_1 ... V_n]", prunes=True, elects=True)
def knots(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """TIES on what the adapters have along the left singular vectors of all of them (KnOTS); of low rank where they are."""
    return ties(t, w, o)


@rule(
    "core_ties",
    "core",
    "2509.17786",
    "U ties(U' D_1 V, ..., U' D_n V) V', with U and V bases of all B_i and all A_i'",
    prunes=True,
    elects=True,
)
def core_ties(t: Tensor, w: Tensor, o: Options) -> Tensor:
    """TIES on the small cores between bases of all left and all right factors (Core Space); of low rank where they are."""
    return ties(t, w, o)


COMBINATIONS["svd"] = Combination(
    "svd", linear, "sum", False, True, "2212.04089", "the best of rank r for sum_i w_i D_i",
    "The weighted sum, cut exactly to the rank of the largest adapter.",
)  # fmt: skip
