"""RandLoRA: an update of full rank from frozen random bases with trained gains (Albert et al. 2025, arXiv 2502.00987).

``W + s sum_n B_n diag(lambda_n) A diag(gamma_n)``: as many bases as it takes for the full rank, all layers with the same ones. The
longer side of a weight goes with B, so a weight that is higher than wide takes the sum as it is, and any other its transpose.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, constant, normal, zeros
from ..core.site import Site
from .banks import Corners, widest
from .spread import Spread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


Shape = tuple[int, int, int]
# How many numbers are drawn at once.
AT_ONCE = 2**22
# A part of a basis, and where in its first two axes it begins.
Drawn = tuple[int, int, Tensor]
RANK_COUNTS = "the larger r is, the fewer bases there are, so an update of one r is none of another"


@register
@dataclass
class RandLoraConfig(Spread):
    """Gains on random bases that together have full rank.

    Args:
        r: rank of each basis; there are ``ceil(min(in, out) / r)``, so a smaller rank trains more numbers.
        projection_prng_key: seed of the bases.
        save_projection: write the bases to the file; else they are drawn again from their seed when the file is loaded.
        sparse: bases of -1, 0 and 1, of which two thirds are 0.
        very_sparse: bases of -1, 0 and 1, of which all but one in ``sqrt(min(in, out))`` are 0.
        randlora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        randlora_alpha: the update is scaled by ``randlora_alpha / r``.
        init_weights: start from the base; False starts from normal numbers, for tests.

    Raises:
        ValueError: the rank is no positive integer, or the dropout no share.
    """

    peft_type: str | None = PeftType.RANDLORA
    r: int = field(default=32, metadata={"help": "Rank of each basis.", "positive": True})
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the random bases."})
    save_projection: bool = field(default=True, metadata={"help": "Write the random bases to the file."})
    sparse: bool = field(default=False, metadata={"help": "Bases of -1, 0 and 1, two thirds of them 0."})
    very_sparse: bool = field(default=False, metadata={"help": "Bases of -1, 0 and 1, almost all of them 0."})
    randlora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    randlora_alpha: int = field(default=640, metadata={"help": "The update is scaled by randlora_alpha / r."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "randlora_"
    dropout_option: ClassVar[str] = "randlora_dropout"
    paper: ClassVar[str] = "2502.00987"
    equation: ClassVar[str] = "W + s sum_n B_n diag(lambda_n) A diag(gamma_n), with B_n and A frozen and shared"
    count_formula: ClassVar[str] = "min(in, out)·(1 + min(in, out) / r)"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "randlora_alpha": 8},
        "sparse": {"r": 6, "randlora_alpha": 6, "sparse": True, "projection_prng_key": 99},
        "dropout": {"r": 2, "randlora_alpha": 4, "randlora_dropout": 0.3, "save_projection": False},
    }
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    # -- the bank --
    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        """A for the widest short side ``(r, 1, min)``, B for the widest long side ``(max, bases, r)``."""
        shapes = self._shapes(*widest(sites.values()))
        return self._drawn(nn.Module(), sites, shapes, shapes)

    def shared_to_fold(self, sites: Mapping[str, Site]) -> nn.Module:
        # The widest input and the widest output are seldom those of one layer, and B holds their product.
        sides = [sorted((site.size("out"), site.size("in"))) for site in sites.values()]
        used, bank = self._shapes(max(s for s, _ in sides), max(long for _, long in sides)), Corners()
        bank.shapes = self._shapes(*widest(sites.values()))
        if not self.save_projection:
            return self._drawn(bank, sites, bank.shapes, used)
        for name, shape in used.items():
            bank.register_buffer(name, torch.empty(shape, dtype=self._bank_dtype(sites)))
        return bank

    def _shapes(self, *sides: int) -> dict[str, Shape]:
        short, long = sorted(sides)
        return {"randlora_A": (self.r, 1, short), "randlora_B": (long, self._bases(short), self.r)}

    def _bank_dtype(self, sites: Mapping[str, Site]) -> torch.dtype:
        dtype = next(iter(sites.values())).dtype
        return dtype if dtype.itemsize > 1 else torch.float32

    def _drawn(self, bank: nn.Module, sites: Mapping[str, Site], shapes: dict[str, Shape], kept: dict[str, Shape]) -> nn.Module:
        """All numbers are drawn, as each depends on those before, and some kept. B is as large as a weight, and never there twice."""
        generator, drawing = torch.Generator().manual_seed(self.projection_prng_key), _uniform
        if self.very_sparse or self.sparse:
            density = 1 / (math.sqrt(shapes["randlora_A"][-1]) if self.very_sparse else 3)
            drawing = partial(_signs, density)
        for name, shape in shapes.items():
            basis = _of_unit_deviation(drawing(shape, generator), math.prod(shape), kept[name]).to(self._bank_dtype(sites))
            bank.register_buffer(name, basis, persistent=self.save_projection)
        return bank

    def repeated(self, p: Adapter) -> dict[str, str]:
        return {name: name for name in ("randlora_A", "randlora_B")} if self.save_projection else {}

    def _bases(self, short: int) -> int:
        return -(-short // self.r)

    def _corners(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """A ``(r, 1, short)`` and B ``(long, bases * r)``, as they are kept.

        The columns of B go basis by basis and the rows of the sum's right side gain by gain; so HF pairs them, and any pairing of
        random numbers is as good.
        """
        short, long = sorted((p.whole.size("out"), p.whole.size("in")))
        a, b = p.shared.randlora_A[:, :, :short], p.shared.randlora_B[:long, : self._bases(short)]
        return a, b.flatten(1)

    # -- the layers --
    def params(self, site: Site) -> dict[str, Param]:
        short, long = sorted((site.size("out"), site.size("in")))
        bases = self._bases(short)
        start = (zeros, constant(1 / max(bases, short))) if self.init_weights else (normal(), constant(1 / long))
        return {"randlora_lambda": Param((self.r, bases), start[0]), "randlora_gamma": Param((bases, short), start[1])}

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        if small.method.r != self.r:  # type: ignore[attr-defined]
            raise ValueError(RANK_COUNTS)
        return super().padded(p, small)

    def padded_shared(self, shared: nn.Module, small: nn.Module) -> dict[str, Tensor]:
        if shared.randlora_A.shape[0] != small.randlora_A.shape[0]:  # type: ignore[union-attr]
            raise ValueError(RANK_COUNTS)
        return super().padded_shared(shared, small)

    @property
    def scaling(self) -> float:
        return self.randlora_alpha / self.r

    def values(self, p: Adapter) -> tuple[Tensor, ...]:
        return p.randlora_lambda, p.randlora_gamma

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        lambda_, gamma = map(full, values)
        a, b = self._corners(p)
        a = a.to(lambda_.dtype)
        tall, rows = p.whole.size("in") <= p.whole.size("out"), slice(p.first_row, p.first_row + p.site.size("out"))
        if not tall:
            # Rows of the update are columns of the gains.
            a, gamma = a[..., rows], gamma[..., rows]
        right = (self.scaling * lambda_.unsqueeze(-1) * a * gamma.unsqueeze(-3)).flatten(-3, -2)
        b = (b[rows] if tall else b).to(right.dtype)
        return b @ right if tall else right.mT @ b.mT

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        # The weight's whole gradient at once: what follows is as much work for some of its rows as for all.
        return self.with_spread(p, inner, x, partial(self.spread, p), partial(self.gather, p))

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        lambda_, gamma = values
        a, b = (t.to(lambda_.dtype) for t in self._corners(p))
        tall = p.site.size("in") <= p.site.size("out")
        # The gradient of the product's right side.
        right = (b.t() @ (g.t() @ x) if tall else b.t() @ (x.t() @ g)).view(*lambda_.shape, -1).mul_(a)
        return (
            torch.einsum("knj,nj->kn", right, gamma).mul_(self.scaling),
            torch.einsum("knj,kn->nj", right, lambda_).mul_(self.scaling),
        )


def _of_unit_deviation(parts: Iterable[Drawn], count: int, kept: Shape) -> Tensor:
    """What is kept of a basis, divided by the deviation of all its numbers."""
    basis, total, squares = torch.empty(0), 0.0, 0.0
    for row, n, part in parts:
        basis = basis if basis.numel() else part.new_empty(kept)
        numbers = part.double()
        total, squares = total + numbers.sum().item(), squares + numbers.square_().sum().item()
        here = basis[row : row + part.shape[0], n : n + part.shape[1]]
        here.copy_(part[: here.shape[0], : here.shape[1], : here.shape[2]])
    deviation = math.sqrt(max(squares - total**2 / count, 0.0) / max(count - 1, 1))
    return basis.div_(torch.tensor(deviation, dtype=basis.dtype)) if deviation > 0 else basis


def _uniform(shape: Shape, generator: torch.Generator) -> Iterator[Drawn]:
    """Basis by basis, in bfloat16, as HF peft draws them, whose files hold these numbers."""
    bound = 1 / math.sqrt(shape[2])
    for n in range(shape[1]):
        yield 0, n, torch.empty(shape[0], 1, shape[2], dtype=torch.bfloat16).uniform_(-bound, bound, generator=generator)


def _signs(density: float, shape: Shape, generator: torch.Generator) -> Iterator[Drawn]:
    """-1 and 1 with half of the density each (Li et al., Very Sparse Random Projections, KDD 2006)."""
    height = max(1, AT_ONCE // (shape[1] * shape[2]))
    for row in range(0, shape[0], height):
        drawn = torch.rand(min(height, shape[0] - row), *shape[1:], generator=generator)
        yield row, 0, (drawn > 1 - density / 2).float() - (drawn < density / 2).float()
