"""C3A: ``W + C / in`` with C made of circulant blocks, each of which one vector tells (Chen et al. 2024, arXiv 2407.19342)."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import reduce
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import add
from ..core.config import PeftType, nearest
from ..core.families import acts_on_last_axis
from ..core.method import Method, full, register
from ..core.param import Init, Param, normal, zeros
from ..core.part import blocks_of
from ..core.site import Site
from ..kernels import lowrank
from ..kernels.spread import pieces
from .spread import Spread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

INITS = ("gaussian", "kaiming_uniform", "xavier_uniform")


@register
@dataclass
class C3AConfig(Spread):
    """Circular convolutions between blocks of the input and of the output.

    Args:
        block_size: length of a block; a divisor of what goes into a layer and of what comes out.
        block_size_pattern: other lengths by pattern of module names.
        init_weights: True starts from the base; ``"gaussian"``, ``"kaiming_uniform"`` or ``"xavier_uniform"`` (as does False) from
            random numbers.

    Raises:
        ValueError: the length is no positive integer, or the start unknown.
    """

    peft_type: str | None = PeftType.C3A
    block_size: int = field(default=256, metadata={"help": "Length of a block.", "positive": True})
    block_size_pattern: dict[str, int] | None = field(default_factory=dict, metadata={"help": "Other lengths by module pattern."})
    init_weights: bool | str | None = field(default="xavier_uniform", metadata={"help": f"true, {', '.join(INITS)}."})

    prefix: ClassVar[str] = "c3a_"
    paper: ClassVar[str] = "2407.19342"
    count_formula: ClassVar[str] = "in·out / block_size"
    equation: ClassVar[str] = "W + C / in, C of circulant blocks"
    patterns: ClassVar[dict[str, str]] = {"block_size_pattern": "block_size"}
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"block_size": 2, "init_weights": True},
        "xavier": {"block_size": 2},
        "dropout": {"block_size": 1, "init_weights": "gaussian", "input_dropout": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        init = self.init_weights
        if not isinstance(init, bool) and init is not None and init not in INITS:
            raise ValueError(f"Unknown init_weights={init!r}.{nearest(str(init), INITS)} Known: True, False, {', '.join(INITS)}.")

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights is True else f"the blocks start from random numbers (init_weights={self.init_weights!r})"

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"gpt2": ["mlp.c_proj"], "gpt_bigcode": ["mlp.c_proj"]}

    def refuses(self, site: Site) -> str | None:
        for axis in ("in", "out"):
            if site.size(axis) % self.block_size:
                return f"block_size={self.block_size} does not divide its {site.size(axis)} {axis}puts"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        out, inp = site.size("out"), site.size("in")
        start = {True: zeros, "gaussian": normal(), "kaiming_uniform": _uniform(inp**-0.5)}
        init = start.get(self.init_weights, _uniform((6 / (out + inp)) ** 0.5))  # type: ignore[arg-type]
        return {"c3a_kernel": Param((out // self.block_size, inp // self.block_size, self.block_size), init)}

    def values(self, p: Adapter) -> tuple[Tensor]:
        return (p.c3a_kernel,)

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        blocks, rows = blocks_of(p, self.block_size)
        kernel = full(values[0])[..., blocks, :, :] / p.site.size("in")
        # Row i of a block is the vector turned by i places to the right.
        turned = torch.cat((kernel, kernel), -1).unfold(-1, self.block_size, 1)[..., 1:, :].flip(-2)
        return turned.transpose(-3, -2).flatten(-2).flatten(-3, -2)[..., rows, :]

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        """The transform of each block's gradient is the product of the transforms of its g and x."""
        product = reduce(torch.add, (self._product(*part) for part in pieces(g, x)))
        return (torch.fft.irfft(product.permute(1, 2, 0), self.block_size).div_(p.site.size("in")),)

    def _product(self, g: Tensor, x: Tensor) -> Tensor:
        ghat, xhat = (torch.fft.rfft(t.unflatten(-1, (-1, self.block_size))) for t in (g, x))
        return ghat.conj().permute(2, 1, 0) @ xhat.permute(2, 0, 1)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not acts_on_last_axis(inner.site) or x.numel() > lowrank.FEW_ROWS * x.shape[-1] or self.dropout:
            return super().around(p, inner, x)
        y, kernel = inner(x), full(p.c3a_kernel)
        xhat = torch.fft.rfft(x.to(kernel.dtype).unflatten(-1, (-1, self.block_size)))
        yhat = torch.einsum("...nf,mnf->...mf", xhat, torch.fft.rfft(kernel).conj())
        return add(y, torch.fft.irfft(yhat, self.block_size).flatten(-2), p.strength / x.shape[-1])


def _uniform(bound: float) -> Init:
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)
