"""What optimisers keep of a parameter between two steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

FLOAT = torch.float32.itemsize
# bitsandbytes: numbers that share a scale, and the size from which a tensor is kept in 8 bits.
BLOCK, WORTH_8_BITS = 256, 4096


@dataclass(frozen=True)
class Optimizer:
    """
    Attributes:
        state: the bytes it keeps of a parameter.
        paged: they lie in the host's memory and come when they are needed.
        passing: tensors like the parameter that its step makes on its way.
    """

    state: Callable[[Tensor], int]
    paged: bool = False
    passing: int = 2

    def bytes_of(self, parameters: list[Tensor]) -> int:
        return sum(map(self.state, parameters))


def _copies(count: int) -> Callable[[Tensor], int]:
    """So many tensors like the parameter."""
    return lambda t: count * t.numel() * t.element_size()


def _in_8_bits(count: int) -> Callable[[Tensor], int]:
    """So many tensors in 8 bits with a scale a block; small ones in full precision."""

    def state(t: Tensor) -> int:
        n = t.numel()
        return count * (n + FLOAT * -(-n // BLOCK)) if n >= WORTH_8_BITS else count * n * FLOAT

    return state


def _in_32_bits(count: int) -> Callable[[Tensor], int]:
    return lambda t: count * t.numel() * FLOAT


def _factored(t: Tensor) -> int:
    """A sum a row and a sum a column of a matrix."""
    if t.ndim < 2:
        return t.numel() * FLOAT
    return FLOAT * (t.numel() // t.shape[-1] + prod(t.shape[:-2]) * t.shape[-1])


OPTIMIZERS: dict[str, Optimizer] = {
    "adamw": Optimizer(_copies(2)),
    "adamw_8bit": Optimizer(_in_8_bits(2)),
    "paged_adamw": Optimizer(_in_32_bits(2), paged=True),
    "paged_adamw_8bit": Optimizer(_in_8_bits(2), paged=True),
    "sgd": Optimizer(_copies(0), passing=0),
    "sgd_momentum": Optimizer(_copies(1), passing=0),
    "adafactor": Optimizer(_factored),
    "adagrad": Optimizer(_copies(1)),
    "rmsprop": Optimizer(_copies(1)),
    "lion": Optimizer(_in_32_bits(1)),
    "lion_8bit": Optimizer(_in_8_bits(1)),
    "paged_lion": Optimizer(_in_32_bits(1), paged=True),
    "paged_lion_8bit": Optimizer(_in_8_bits(1), paged=True),
}

# As transformers.Trainer and torch call them.
ALSO = {
    "adam": "adamw",
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
    "lion_32bit": "lion",
    "paged_lion_32bit": "paged_lion",
}


def optimizer(name: str) -> Optimizer:
    """
    Raises:
        ValueError: there is no such optimiser, with a near miss.
    """
    from ..core.config import nearest

    known = name.lower().replace("-", "_")
    known = ALSO.get(known, known)
    if known not in OPTIMIZERS:
        raise ValueError(f"optimizer {name!r}: use one of {', '.join(OPTIMIZERS)}.{nearest(name, [*OPTIMIZERS, *ALSO])}")
    return OPTIMIZERS[known]
