"""LoRA: ``W + s B A`` with ``s = alpha / r`` (Hu et al. 2021, arXiv 2106.09685), or ``alpha / sqrt(r)`` (rsLoRA, 2312.03732)."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Init, Param, normal, zeros
from ..core.site import AnyConv, Embedding, Linear, Site, TransposedLinear
from ..initializers.plain import gaussian, orthogonal, uniform
from ..initializers.started import LoraRuntimeConfig as LoraRuntimeConfig
from ..initializers.started import Started


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


# The class that carries the mathematics of a variant, by the options that ask for it.
VARIANTS: dict[tuple[str, ...], str] = {
    (): "",
    ("use_dora",): "dora:Dora",
    ("use_qalora",): "qalora:QALora",
    ("use_dora", "use_qalora"): "qalora:DoraQALora",
    ("use_bdlora",): "bdlora:BdLora",
    ("use_bdlora", "use_dora"): "bdlora:DoraBdLora",
    ("alora_invocation_tokens",): "alora:ALora",
    ("velora_config",): "velora:Velora",
    ("kasa_config",): "kasa:Kasa",
    ("monteclora_config",): "monteclora:Monteclora",
    ("arrow_config",): "arrow:Arrow",
}
SUBCONFIGS = {
    "use_bdlora": "bdlora:BdLoraConfig",
    "velora_config": "velora:VeloraConfig",
    "kasa_config": "kasa:KasaConfig",
    "monteclora_config": "monteclora:MontecloraConfig",
    "arrow_config": "arrow:ArrowConfig",
}
# Variants whose trained tensors are not the plain factors A and B, or not alone.
OWN_FACTORS = ("use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config")


def _found(where: str) -> Any:
    module, name = where.split(":")
    return getattr(importlib.import_module(f"{__package__}.{module}"), name)


def _subconfig(name: str, cls: type[Any], value: Any) -> Any:
    """A variant's options, which are a dictionary in a file."""
    if isinstance(value, dict):
        return cls(**{f.name: value[f.name] for f in fields(cls) if f.init and f.name in value})
    if isinstance(value, cls):
        return value
    raise TypeError(f"`{name}` must be a {cls.__name__}, a dict or None, not a {type(value).__name__}.")


def is_linear(site: Site) -> bool:
    """Whether a site multiplies the last axis of its input."""
    return isinstance(site, (Linear, TransposedLinear)) and not isinstance(site, Embedding)


def _term_of(option: str) -> Callable[..., Tensor | float]:
    def term(model: Any, adapter_names: str | Sequence[str] | None = None) -> Tensor | float:
        """What adapters add to the loss in training, where their model's own loss does not have it.

        A model in training that is given labels adds it by itself. So this is zero then, and code written for HF peft, which
        adds it by hand, counts it once.

        Args:
            adapter_names: the adapters; None stands for the active ones.
        """
        from ..core.calls import not_in_loss

        names = model.active_adapters if adapter_names is None else [adapter_names] if isinstance(adapter_names, str) else adapter_names
        return not_in_loss(model.model, option, names)

    return term


@register
@dataclass
class LoraConfig(Started):
    """LoRA and its options; HF peft's fields.

    Args:
        r: rank of the update.
        lora_alpha: the update is scaled by ``lora_alpha / r``.
        lora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        use_rslora: scale by ``lora_alpha / sqrt(r)``.
        init_lora_weights: True (A Kaiming-uniform, B zero), ``"gaussian"`` (A normal with standard deviation ``1 / r``),
            ``"orthogonal"`` (A and B from one orthonormal basis, their product zero), or False (both random, for tests); from the
            weight: ``"pissa"``, ``"pissa_niter_[n]"`` (with n subspace iterations), ``"olora"``, ``"mica"``; from data: ``"eva"``,
            ``"corda"``, ``"lora_ga"``; or ``"loftq"``, for a weight that is quantised. See `inlay.initializers`.
        loftq_config, eva_config, corda_config, lora_ga_config: the options of the start of that name.
        rank_pattern, alpha_pattern: other ranks and alphas by pattern of module names.
        use_dora: weight decomposition (see `Dora`).
        lora_bias: a bias in B.
        alora_invocation_tokens: act only from the last occurrence of these tokens on (see `ALora`).
        use_qalora, qalora_group_size: inputs in groups of this size have one column of A (see `QALora`).
        use_bdlora: a block-diagonal factor (see `BdLora`).
        velora_config: keep compressed inputs for the backward pass (see `Velora`).
        kasa_config: leave out the weight's smallest singular components (see `Kasa`).
        monteclora_config: draw A anew in each training step (see `Monteclora`).
        arrow_config: route each token to the adapters that fit it (see `Arrow`).
        layer_replication: ranges of blocks ``[start, end)``; the base is run through them in this order, each with adapters of its own.
        megatron_config, megatron_core: for HF's signature and files.
        runtime_config: options of this session.

    Raises:
        ValueError: the rank is no positive integer, an option is unknown, or options contradict each other.
        TypeError: options of a variant are given as something that they cannot be made of.
    """

    peft_type: str | None = PeftType.LORA
    r: int = field(default=8, metadata=_help("Rank of the update.") | {"positive": True})
    lora_alpha: float = field(default=8, metadata=_help("The update is scaled by lora_alpha / r."))
    lora_dropout: float = field(default=0.0, metadata=_help("Share of inputs that the update leaves out in training.") | {"share": True})
    fan_in_fan_out: bool = field(default=False, metadata=_help("Ignored: a layer's layout is known from its type."))
    use_rslora: bool = field(default=False, metadata=_help("Scale by lora_alpha / sqrt(r)."))
    init_lora_weights: bool | str = field(default=True, metadata=_help("How the factors start: true, false, pissa, olora, eva, ..."))
    rank_pattern: dict[str, int] | None = field(default_factory=dict, metadata=_help("Other ranks by module pattern."))
    alpha_pattern: dict[str, float] | None = field(default_factory=dict, metadata=_help("Other alphas by module pattern."))
    megatron_config: dict[str, Any] | None = field(default=None, metadata=_help("For HF's files."))
    megatron_core: str | None = field(default="megatron.core", metadata=_help("For HF's files."))
    use_dora: bool = field(default=False, metadata=_help("Weight decomposition: train the rows' magnitudes apart."))
    velora_config: Any = field(default=None, metadata=_help("Keep compressed inputs for the backward pass."))
    alora_invocation_tokens: list[int] | None = field(default=None, metadata=_help("Act from the last occurrence of these tokens on."))
    use_qalora: bool = field(default=False, metadata=_help("One column of A for a group of inputs."))
    qalora_group_size: int = field(default=16, metadata=_help("Inputs in a group of use_qalora."))
    monteclora_config: Any = field(default=None, metadata=_help("Draw A anew in each training step."))
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata=_help("Ranges of blocks through which the base is run."))
    lora_bias: bool = field(default=False, metadata=_help("A bias in B."))
    use_bdlora: Any = field(default=None, metadata=_help("A block-diagonal factor."))
    arrow_config: Any = field(default=None, metadata=_help("Route each token to the adapters that fit it."))
    kasa_config: Any = field(default=None, metadata=_help("Leave out the weight's smallest singular components."))

    prefix: ClassVar[str] = "lora_"
    dropout_option: ClassVar[str] = "lora_dropout"
    paper: ClassVar[str] = "2106.09685"
    equation: ClassVar[str] = "W + s B A"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "lora_alpha": 6},
        "rslora": {"r": 4, "use_rslora": True},
        "dropout": {"r": 4, "lora_dropout": 0.3},
        "lora-bias": {"r": 4, "lora_bias": True},
        "bias-only": {"r": 4, "bias": "lora_only"},
        "bias-all": {"r": 4, "bias": "all"},
        "gaussian": {"r": 2, "init_lora_weights": "gaussian"},
        "orthogonal": {"r": 4, "init_lora_weights": "orthogonal"},
        "dora": {"r": 4, "use_dora": True, "lora_alpha": 6},
        "dora-dropout": {"r": 4, "use_dora": True, "lora_dropout": 0.3},
        "pissa": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa"},
        "pissa-dora": {"r": 4, "lora_alpha": 6, "init_lora_weights": "pissa", "use_dora": True},
        "mica": {"r": 4, "init_lora_weights": "mica"},
        "qalora": {"r": 4, "use_qalora": True, "qalora_group_size": 2, "lora_dropout": 0.0},
        "qalora-dora": {"r": 4, "use_qalora": True, "qalora_group_size": 2, "use_dora": True},
        "bdlora-a": {"r": 4, "use_bdlora": {"target_modules_bd_a": [""], "nblocks": 2}},
        "bdlora-b": {"r": 4, "use_bdlora": {"target_modules_bd_b": [""], "nblocks": 2}},
        "bdlora-dora": {"r": 4, "use_bdlora": {"target_modules_bd_b": [""], "nblocks": 2}, "use_dora": True},
        "velora": {"r": 4, "velora_config": {"num_groups": 3}},
        "velora-dropout": {"r": 4, "velora_config": {"num_groups": 3}, "lora_dropout": 0.3},
        "kasa": {"r": 4, "lora_alpha": 6, "kasa_config": {}},
        "kasa-dropout": {"r": 2, "kasa_config": {}, "lora_dropout": 0.3},
        "loftq": {"r": 2, "lora_alpha": 3, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
        "loftq-dora": {"r": 2, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 1}, "use_dora": True},
    }
    patterns: ClassVar[dict[str, str]] = {"rank_pattern": "r", "alpha_pattern": "lora_alpha"}
    # The tensors that stand behind the scale.
    behind_scale: ClassVar[tuple[str, ...]] = ("lora_B", "lora_embedding_B", "lora_B_bias")
    of_tuner: ClassVar[Mapping[str, Any]] = {
        "_get_kasa_loss": _term_of("kasa_config"),
        "_get_monteclora_loss": _term_of("monteclora_config"),
    }
    ours: ClassVar[frozenset[str]] = frozenset({"overrides", "seed"})
    init_option: ClassVar[str] = "init_lora_weights"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.lora_alpha, float) and self.lora_alpha.is_integer():
            # Some readers of the file take whole numbers only.
            self.lora_alpha = int(self.lora_alpha)
        self.check_init()
        self._check_variant()
        if self.use_dora and self.lora_bias:
            raise ValueError("`lora_bias` cannot be combined with `use_dora`: the bias is outside the decomposition.")

    @property
    def scaling(self) -> float:
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def _check_variant(self) -> None:
        """Bring the options of the variants into shape.

        Raises:
            ValueError: variants that exclude each other are asked for, or one that does not go with the other options.
            TypeError: a variant's options are given as something that they cannot be made of.
        """
        for name, where in SUBCONFIGS.items():
            value = getattr(self, name)
            if value is not None and value is not False:
                setattr(self, name, _subconfig(name, _found(where), value))
        asked = self._asked
        if asked not in VARIANTS:
            shown = " and ".join(f"`{name}`" for name in asked)
            raise ValueError(f"{shown} cannot be combined: each says in its own way how the update acts. Leave all but one at its default.")
        if self.use_qalora and self.qalora_group_size < 1:
            raise ValueError(f"`qalora_group_size` should be a positive integer, not {self.qalora_group_size!r}.")
        own = [name for name in asked if name in OWN_FACTORS]
        if own and self.init_lora_weights not in (True, False, "gaussian"):
            raise ValueError(
                f"init_lora_weights={self.init_lora_weights!r} starts plain factors A and B, and `{own[0]}` has others; "
                "use True or 'gaussian'."
            )
        if self.alora_invocation_tokens and self.task_type not in (None, "CAUSAL_LM"):
            warnings.warn("aLoRA is meant for task_type='CAUSAL_LM': its invocation is looked for in the tokens of a text.", stacklevel=4)

    @property
    def _asked(self) -> tuple[str, ...]:
        """The variants that the options ask for."""
        return tuple(sorted({name for names in VARIANTS for name in names if getattr(self, name)}))

    def variant(self) -> Method:
        where = VARIANTS[self._asked]
        return self.become(_found(where)) if where else self

    @property
    def never_identity(self) -> str:
        chosen = self.variant()
        return super().never_identity if type(chosen).never_identity is type(self).never_identity else chosen.never_identity

    def at(self, path: str) -> Method:
        found = super().at(path)
        return found.seated(path) if isinstance(found, LoraConfig) else found

    def seated(self, path: str) -> Method:
        """The variant as it is for the module of this name."""
        return self

    def prepare(self, base: nn.Module) -> None:
        super().prepare(base)
        if self.peft_type == PeftType.LORA:
            from ..formats.experts import mean_stacks

            mean_stacks(self, base)

    def rebuild(self, base: nn.Module) -> Callable[[], None] | None:
        if not self.layer_replication:
            return None
        from ..operations.replicate import replicate

        return replicate(base, self.layer_replication)

    def refuses(self, site: Site) -> str | None:
        groups = getattr(site.module, "groups", 1) if isinstance(site, AnyConv) else 1
        if self.r % groups:
            return f"its {groups} groups share the rank, and r={self.r} is not divisible by {groups}"
        if self.init_lora_weights == "orthogonal" and self.r // groups % 2:
            return f"its {groups} groups have an odd rank each, which 'orthogonal' cannot split in two halves"
        if self.lora_bias and isinstance(site, Embedding):
            return "an embedding has no bias for `lora_bias`"
        if self.lora_bias and site.reads and site.bias() is None:
            return "it reads no bias to which `lora_bias` could be added"
        return None

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        values = super().padded(p, small)
        if self.scaling == 0:
            raise ValueError("it has lora_alpha=0, so nothing that takes its place can have an effect")
        factor = small.method.scaling * small.strength / self.scaling  # type: ignore[attr-defined]
        return {name: value * factor if name in self.behind_scale else value for name, value in values.items()}

    def names(self, site: Site) -> tuple[str, str]:
        """How HF calls A and B at this site."""
        return ("lora_embedding_A", "lora_embedding_B") if isinstance(site, Embedding) else ("lora_A", "lora_B")

    def params(self, site: Site) -> dict[str, Param]:
        a, b = self.names(site)
        declared = {a: self._in_a(site, "in"), b: self._in_b(site, self._rank(site))}
        if self.lora_bias:
            start = zeros if self.init_lora_weights else normal(site.size("channel") ** -0.5)
            declared["lora_B_bias"] = Param(("channel",), start, "lora_B.bias")
        return declared

    def _rank(self, site: Site) -> int:
        return self.r // (getattr(site.module, "groups", 1) if isinstance(site, AnyConv) else 1)

    def _in_a(self, site: Site, columns: str | int) -> Param:
        """A, with as many columns."""
        name, end = self.names(site)[0], "" if isinstance(site, Embedding) else ".weight"
        return Param((self._rank(site), columns), self._inits(site)[0], name + end)

    def _in_b(self, site: Site, columns: int) -> Param:
        """B, with as many columns."""
        name, end = self.names(site)[1], "" if isinstance(site, Embedding) else ".weight"
        return Param(("out", columns), self._inits(site)[1], name + end)

    def _inits(self, site: Site) -> tuple[Init, Init]:
        init = self.init_lora_weights
        if init == "orthogonal":
            return orthogonal(self.scaling)
        if isinstance(site, Embedding):
            # HF starts an embedding's update with the other factor at zero: what is looked up is then dense.
            return (zeros, normal()) if init else (normal(), normal())
        return gaussian(self.r) if init == "gaussian" else uniform(bool(init))

    def delta_bias(self, p: Adapter) -> Tensor | None:
        if not self.lora_bias:
            return None
        return self.scaling * (p.lora_B_bias.flatten() if isinstance(p.site, AnyConv) else p.lora_B_bias)
