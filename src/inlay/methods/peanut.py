"""PEANuT: ``W + s B h(W' A')'`` with a small network h: an update that is a function of the weight (Zhong et al. 2024,
arXiv 2410.01870)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.config import PeftType, nearest
from ..core.families import in_full_precision
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, zeros
from ..core.site import Site
from .conditioned import Conditioned

if TYPE_CHECKING:
    from ..core.adapter import Adapter

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "linear": lambda x: x,
}


@register
@dataclass
class PeanutConfig(Conditioned):
    """A low-rank update that a small network makes of the weight.

    Args:
        r: width of the network.
        depth: how many hidden layers it has on either side, encoding and decoding, with shortcuts between them.
        act_fn: its activation, by the name that transformers has for it.
        scaling: the factor in front of the update.
        init_weights: start from the base; False starts from random numbers, for tests.

    Raises:
        ValueError: the rank is no positive integer, the depth negative, or the activation unknown.
    """

    peft_type: str | None = PeftType.PEANUT
    r: int = field(default=32, metadata={"help": "Width of the network.", "positive": True})
    depth: int = field(default=0, metadata={"help": "Hidden layers on either side."})
    act_fn: str = field(default="relu", metadata={"help": "The activation, as transformers calls it."})
    scaling: float = field(default=1.0, metadata={"help": "The factor in front of the update."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "peanut_"
    paper: ClassVar[str] = "2410.01870"
    equation: ClassVar[str] = "W + s B h(W' A')'"
    ours: ClassVar[frozenset[str]] = Method.ours
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "act_fn": "gelu"},
        "deep": {"r": 3, "depth": 2, "act_fn": "tanh", "scaling": 0.5},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.depth, bool) or not isinstance(self.depth, int) or self.depth < 0:
            raise ValueError(f"`depth` should be a whole number from 0 on, not {self.depth!r}.")
        _activation(self.act_fn)

    def _hidden(self) -> list[str]:
        return [f"peanut_{side}_{i}" for side in ("encoder", "decoder") for i in range(self.depth)]

    def params(self, site: Site) -> dict[str, Param]:
        r = self.r
        declared = {
            "peanut_A": Param((r, "out"), kaiming_uniform, "peanut_A.weight"),
            "peanut_B": Param(("out", r), zeros if self.init_weights else kaiming_uniform, "peanut_B.weight"),
        }
        for name in self._hidden():
            stem, _, index = name.rpartition("_")
            declared[name] = Param((r, r), kaiming_uniform, f"{stem}s.{index}.weight")
        return declared

    def factors(self, p: Adapter, w: Tensor) -> tuple[Tensor, Tensor]:
        act, hidden = _activation(self.act_fn), [full(getattr(p, name)) for name in self._hidden()]
        with in_full_precision(p):
            a = full(p.peanut_A)
            # Columns of the weight are what the network sees, one at a time: (r, in).
            h, shortcuts = act(a @ w.to(a.dtype)), []
            for encoder in hidden[: self.depth]:
                shortcuts.append(h)
                h = act(encoder @ h)
            for decoder in hidden[self.depth :]:
                h = act(decoder @ h) + shortcuts.pop()
            return h, self.scaling * full(p.peanut_B)


@cache
def _activation(name: str) -> Callable[[Tensor], Tensor]:
    if name in ACTIVATIONS:
        return ACTIVATIONS[name]
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        raise ValueError(f"Unknown act_fn={name!r}.{nearest(str(name), ACT2FN)} Known: {', '.join(sorted(ACT2FN))}.")
    return ACT2FN[name]
