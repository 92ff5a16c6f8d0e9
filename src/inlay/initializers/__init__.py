"""How the factors of a low-rank method start: one file each, all of them functions of a weight or of data.

`Started` is what the methods that can start so have in common; `KINDS` has the classes that carry the mathematics of a start. The
plain starts need none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .corda import CordaConfig, corda_start
from .eva import EvaConfig
from .loftq import LoftQConfig, loftq
from .loraga import LoraGAConfig, loraga_start
from .mica import mica
from .offset import Offset, Starter, offset
from .olora import olora
from .pissa import pissa
from .started import Started
from .together import weights

if TYPE_CHECKING:
    from ..core.site import Site


def _pissa(sites: Sequence[Site], method: Offset, _: Sequence[str]) -> tuple[Tensor, Tensor]:
    rounds = str(method.init).partition("_niter_")[2]
    return pissa(weights(sites), method.rank_at(sites[0]), method.scaling, int(rounds) if rounds else None)


def _olora(sites: Sequence[Site], method: Offset, _: Sequence[str]) -> tuple[Tensor, Tensor]:
    return olora(weights(sites), method.rank_at(sites[0]), method.scaling)


# Starts whose product is not zero.
STARTS: dict[str, Starter] = {
    "pissa": Starter(_pissa),
    "olora": Starter(_olora),
    "corda": Starter(corda_start, from_data=True),
    "lora_ga": Starter(loraga_start, from_data=True, again=False),
}
NAMES = ("pissa_niter_[n]", "gaussian", "orthogonal", "eva", "loftq", "mica", *STARTS)
# What makes of a method's class that of a start.
KINDS: dict[str, Callable[[type[Started]], type[Started]]] = {"mica": mica, "loftq": loftq, **dict.fromkeys(STARTS, offset)}

# The options that a start has, as a field of the configuration.
OPTIONS: dict[str, tuple[str, type[Any]]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
    "loftq": ("loftq_config", LoftQConfig),
}
