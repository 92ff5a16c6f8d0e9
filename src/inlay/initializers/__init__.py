"""How the factors of a low-rank method start: one file each, all of them functions of a weight or of data.

`initialized` chooses the class that a method has by its ``init_lora_weights``. The plain starts need no class of their own.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.config import nearest
from .corda import CordaConfig, corda_start
from .eva import EvaConfig
from .loftq import LoftQConfig, loftq
from .loraga import LoraGAConfig, loraga_start
from .mica import mica
from .offset import Offset, Starter, Starts, offset, weights
from .olora import olora
from .pissa import pissa

if TYPE_CHECKING:
    from ..core.method import LowRank, Method
    from ..core.site import Site


def _pissa(sites: Sequence[Site], method: Offset, _: Sequence[str]) -> tuple[Tensor, Tensor]:
    rounds = str(method.init_lora_weights).partition("_niter_")[2]  # type: ignore[attr-defined]
    return pissa(weights(sites), _rank(method, sites[0]), method.scaling, int(rounds) if rounds else None)


def _olora(sites: Sequence[Site], method: Offset, _: Sequence[str]) -> tuple[Tensor, Tensor]:
    return olora(weights(sites), _rank(method, sites[0]), method.scaling)


def _rank(method: Offset, site: Site) -> int:
    return method.params(site)[method.names(site)[0]].shape(site)[-2]


# Starts whose product is not zero.
STARTS: dict[str, Starter] = {
    "pissa": Starter(_pissa),
    "olora": Starter(_olora),
    "corda": Starter(corda_start, from_data=True),
    "lora_ga": Starter(loraga_start, from_data=True, again=False),
}
NAMES = ("pissa_niter_[n]", "gaussian", "orthogonal", "eva", "loftq", "mica", *STARTS)


# The options that a start has, as a field of the configuration.
OPTIONS: dict[str, tuple[str, type[Any]]] = {
    "eva": ("eva_config", EvaConfig),
    "corda": ("corda_config", CordaConfig),
    "lora_ga": ("lora_ga_config", LoraGAConfig),
    "loftq": ("loftq_config", LoftQConfig),
}


def check(config: Any) -> None:
    """Bring the fields that say how LoRA starts into shape.

    Raises:
        ValueError: there is no such start, or its options are wrong.
        TypeError: options are given as something that they cannot be made of.
    """
    given = config.init_lora_weights
    if not isinstance(given, bool):
        name = config.init_lora_weights = str(given).lower()
        if name not in NAMES[1:] and not re.fullmatch(r"pissa_niter_\d+", name):
            raise ValueError(f"Unknown init_lora_weights={given!r}.{nearest(str(given), NAMES)} Known: True, False, {', '.join(NAMES)}.")
        if _kind(config) is not None and config.lora_alpha <= 0:
            raise ValueError(
                f"init_lora_weights={name!r} divides by the scaling; `lora_alpha` must be positive, not {config.lora_alpha!r}."
            )
    for name, (attribute, cls) in OPTIONS.items():
        value, used = getattr(config, attribute), config.init_lora_weights == name
        if isinstance(value, dict) and value:
            value = cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})
        elif value and not isinstance(value, cls):
            raise TypeError(f"`{attribute}` must be a {cls.__name__}, a dict or None, not a {type(value).__name__}.")
        if value and not used:
            warnings.warn(f"`{attribute}` is ignored: it belongs to init_lora_weights={name!r}, which is {config.init_lora_weights!r}.")
        if name == "loftq":
            if used and not value:
                raise ValueError("init_lora_weights='loftq' needs a `loftq_config`, such as LoftQConfig(loftq_bits=4).")
            # HF peft's files have a dictionary here, empty where it is not used.
            config.loftq_config = vars(value).copy() if used else {}
        else:
            # What is to be estimated for LoRA-GA is for the user to say.
            setattr(config, attribute, cls() if used and not value and name != "lora_ga" else value)


def _kind(config: Any) -> Callable[[type[LowRank]], type[LowRank]] | None:
    kinds = {"mica": mica, "loftq": loftq} | dict.fromkeys(STARTS, offset)
    return kinds.get(str(config.init_lora_weights).partition("_niter_")[0])


def never_identity(config: Any) -> str:
    """Why an adapter with this start is not the base; empty where it is."""
    if config.init_lora_weights is False:
        return "init_lora_weights=False starts from random factors, for tests"
    return "LoftQ starts from the quantised weight, as near to the base as the rank allows" if _kind(config) is loftq else ""


def initialized(method: Any) -> Method:
    """The method under the mathematics of its start."""
    kind = _kind(method)
    return method if kind is None else method.become(kind(type(method)))


def starts(method: Any, sites: Mapping[str, Site]) -> Starts | None:
    """What computes the starts of all layers, where they are not zero."""
    if _kind(method) is not offset:
        return None
    return Starts(sites, method.at, method.runtime_config.progress)
