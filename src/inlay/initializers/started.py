"""Methods whose update is a product of two free factors, and the options that say how those start."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.additive import LowRank
from ..core.config import PeftConfig, nearest
from ..core.method import Method
from ..core.site import Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class LoraRuntimeConfig:
    """Options of a session that are never written to a file.

    Args:
        ephemeral_gpu_offload: for HF's signature; nothing here needs it.
        progress: called with the number of layers whose start has been computed, and of all, where starts take time.
    """

    ephemeral_gpu_offload: bool = False
    progress: Callable[[int, int], object] | None = None


@dataclass
class Started(LowRank):
    """A method of low rank whose factors can start from the weight or from data. It names its tensors (`names`) and, where those
    are not the factors themselves, says how the two go into each other (`joined`, `placed`).

    Args:
        loftq_config, eva_config, corda_config, lora_ga_config: the options of the start of that name.
        runtime_config: options of this session.
    """

    loftq_config: Any = field(default_factory=dict, metadata=_help("Options of the start loftq."))
    eva_config: Any = field(default=None, metadata=_help("Options of the start eva."))
    corda_config: Any = field(default=None, metadata=_help("Options of the start corda."))
    lora_ga_config: Any = field(default=None, metadata=_help("Options of the start lora_ga."))
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata=_help("Options of this session.") | {"in_file": False}
    )

    # The option that names the start, and starts that it has beside those of `initializers`.
    init_option: ClassVar[str] = "init_weights"
    own_inits: ClassVar[tuple[str, ...]] = ()

    # The tensors are the factors themselves.
    _plain: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        cls._plain = all(getattr(cls, name) is getattr(Started, name) for name in ("joined", "cut", "tensors", "whole"))

    # ---- the factors --------------------------------------------------------------------------------------------------
    def names(self, site: Site) -> tuple[str, ...]:
        """The tensors that make up the update: that of A first, that of B last."""
        raise NotImplementedError

    def joined(self, site: Site, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        """The factors ``A (*batch, r, in)`` and ``B (*batch, out, r)`` that these tensors stand for."""
        a, b = tensors
        return a, b

    def placed(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The tensors that stand for these factors, or for the nearest that they can."""
        return a, b

    def cut(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """What is left of the factors outside of training. Each rank may be there several times, the first ones of all first."""
        return a, b

    def tensors(self, p: Adapter) -> tuple[Tensor, ...]:
        return tuple(getattr(p, name) for name in self.names(p.site))

    def whole(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """The factors of the update with all ranks."""
        return self.joined(p.site, *self.tensors(p))

    def moving(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        """Factors of a lower rank whose product differs from that of `whole` by a constant, where there are such."""
        return None

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        if self._plain:
            first, last = self.names(p.site)
            # Looked up where parameters are, which is quicker than by attribute: it is done for each token.
            a, b = p._parameters.get(first), p._parameters.get(last)
            if a is not None and b is not None:
                return a, b
        return self.cut(*self.whole(p))

    def trained(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        moving = self.moving(p)
        return None if moving is None else self.cut(*moving)

    def rank_at(self, site: Site) -> int:
        return self.params(site)[self.names(site)[0]].shape(site)[-2]

    # ---- how they start -----------------------------------------------------------------------------------------------
    @property
    def init(self) -> bool | str:
        return getattr(self, self.init_option)

    @property
    def start_name(self) -> str:
        """The start without its number of iterations; empty for True and False."""
        return "" if isinstance(self.init, bool) else self.init.lower().partition("_niter_")[0]

    @property
    def ranks_may_move(self) -> bool:
        """Whether a layer can be given any other rank."""
        return "rank_pattern" in self.patterns

    def unfit(self, start: str) -> str:
        """The mathematical reason why this method cannot have a start; empty where it can."""
        r = getattr(self, self.size_option)
        return f"it splits the rank in two halves, and {self.size_option}={r} is odd" if start == "orthogonal" and r % 2 else ""

    def check_init(self) -> None:
        """Bring the fields that say how the factors start into shape.

        Raises:
            ValueError: there is no such start, the method cannot have it, or its options are wrong.
            TypeError: options are given as something that they cannot be made of.
        """
        from . import KINDS, NAMES, OPTIONS

        given, option = self.init, self.init_option
        if not isinstance(given, bool):
            name = str(given).lower()
            setattr(self, option, name)
            known = (*NAMES, *self.own_inits)
            if name not in known and not re.fullmatch(r"pissa_niter_\d+", name):
                raise ValueError(f"Unknown {option}={given!r}.{nearest(str(given), known)} Known: True, False, {', '.join(known)}.")
            if why := self.unfit(self.start_name):
                raise ValueError(f"{option}={name!r} is no start of {type(self).__name__}: {why}.")
            if self.start_name in KINDS and self.scaling <= 0:
                alpha = self.patterns.get("alpha_pattern", "lora_alpha")
                raise ValueError(f"{option}={name!r} divides by the scaling; `{alpha}` must be positive, not {getattr(self, alpha)!r}.")
        for name, (attribute, cls) in OPTIONS.items():
            value, used = getattr(self, attribute), self.init == name
            if isinstance(value, dict) and value:
                value = cls(**{f.name: value[f.name] for f in fields(cls) if f.name in value})
            elif value and not isinstance(value, cls):
                raise TypeError(f"`{attribute}` must be a {cls.__name__}, a dict or None, not a {type(value).__name__}.")
            if value and not used:
                warnings.warn(f"`{attribute}` is ignored: it belongs to {option}={name!r}, which is {self.init!r}.")
            if name == "loftq":
                if used and not value:
                    raise ValueError(f"{option}='loftq' needs a `loftq_config`, such as LoftQConfig(loftq_bits=4).")
                # HF peft's files have a dictionary here, empty where it is not used.
                self.loftq_config = vars(value).copy() if used else {}
            else:
                # What is to be estimated for LoRA-GA is for the user to say.
                setattr(self, attribute, cls() if used and not value and name != "lora_ga" else value)
        if isinstance(self.runtime_config, dict):
            self.runtime_config = LoraRuntimeConfig(**self.runtime_config)

    @property
    def never_identity(self) -> str:
        if self.init is False:
            return f"{self.init_option}=False starts from random factors, for tests"
        return "LoftQ starts from the quantised weight, as near to the base as the rank allows" if self.start_name == "loftq" else ""

    def acting(self) -> Method:
        """The variant under the mathematics of its start."""
        from . import KINDS

        variant, idea = super().acting(), None if self.unfit(self.start_name) else KINDS.get(self.start_name)
        return variant if idea is None or not isinstance(variant, Started) else variant.become(idea(type(variant)))

    def shared(self, sites: Mapping[str, Site]) -> nn.Module | None:
        from . import KINDS
        from .together import Starts

        if self.start_name not in KINDS or self.unfit(self.start_name):
            return None
        return Starts(sites, self.at, self.runtime_config.progress)


def no_factors(method: type[PeftConfig]) -> str:
    """Why a method cannot start from the weight or from data; empty where it can."""
    if issubclass(method, Started):
        return ""
    what = "its update is no product of two matrices"
    if issubclass(method, LowRank):
        what = (
            "of the two matrices whose product is its update, one or both are drawn once and frozen, shared by layers, bound to a form "
            "of their own, or have to give zero"
        )
    return f"{method.__name__} has no free factors A and B that could start from the weight or from data: {what}"
