"""AdaLoRA: ``W + s B diag(E) A``, whose budget of ranks goes where it matters (Zhang et al. 2023, arXiv 2303.10512).

A, E and B stand for the right singular vectors, the singular values and the left singular vectors of the update. After each step of
training the triplets of all layers are ranked by how much the loss depends on them, and the values of the least important ones are
set to zero, ever more of them until the budget is reached.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.adapter import Adapter
from ..core.additive import Additive, LowRank
from ..core.config import PeftConfig, PeftType
from ..core.method import Method, register
from ..core.param import Init, Param, generator_for, normal, zeros
from ..core.site import Site
from ..initializers import STARTS
from ..initializers.plain import orthonormal
from ..initializers.svd import singular_vectors_of_product
from .lora import LoraConfig

if TYPE_CHECKING:
    from torch.optim import Optimizer

_QKVO, _QV = "q_proj k_proj v_proj out_proj fc1 fc2", "q_proj v_proj"
_DEFAULTS = {
    "t5": "q k v o wi wo", "mt5": "q k v o wi_0 wi_1 wo", "bart": _QKVO, "gpt2": "c_attn", "bloom": "query_key_value", "opt": _QKVO,
    "gptj": _QV, "gpt_neox": "query_key_value", "gpt_neo": _QV, "llama": _QV, "llama4": _QV, "bert": "query value",
    "roberta": "query key value dense", "deberta-v2": "query_proj key_proj value_proj dense", "gpt_bigcode": "c_attn",
    "deberta": "in_proj", "gemma": _QV, "gemma2": _QV, "gemma3_text": _QV, "qwen2": _QV, "qwen3": _QV, "mistral": _QV,
    "nemotron_h": "q_proj k_proj v_proj o_proj",
}  # fmt: skip


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass(frozen=True)
class Ranked(Param):
    """A tensor of which a file has those ranks only that are in the budget.

    Attributes:
        method: of the layer, which knows them.
        axis: the axis that counts ranks.
    """

    method: Any = None
    axis: int = -1

    def to_file(self, site: Site, tensor: Tensor) -> Tensor:
        return tensor if self.method.mask is None else tensor.index_select(self.axis, self._kept(tensor))

    def from_file(self, site: Site, tensor: Tensor) -> Tensor:
        if self.method.mask is None:
            return tensor
        sizes = list(tensor.shape)
        sizes[self.axis] = len(self.method.mask)
        return tensor.new_zeros(sizes).index_copy(self.axis, self._kept(tensor), tensor)

    def _kept(self, like: Tensor) -> Tensor:
        return torch.tensor([i for i, keep in enumerate(self.method.mask) if keep], dtype=torch.long, device=like.device)


@register
@dataclass
class AdaLoraConfig(LoraConfig):
    """AdaLoRA; of LoRA's options it takes those of the targets, ``lora_alpha``, ``lora_dropout``, ``alpha_pattern``, ``use_dora``,
    and starts at which the values E are zero or make up for what LoftQ loses.

    Args:
        target_r: the ranks that an adapted weight keeps in the end, on average.
        init_r: the ranks that each of them starts with.
        tinit: steps at the start in which nothing is taken away.
        tfinal: steps at the end in which the budget stays.
        deltaT: steps between two allocations.
        beta1, beta2: of the moving averages of importance and of its uncertainty.
        orth_reg_weight: of the term of the loss that keeps the rows of A, and the columns of B, orthonormal.
        total_step: of the training; required.
        rank_pattern: which ranks are in the budget, by the names of the tensors E. Training writes it.

    Raises:
        ValueError: there is no ``total_step``, or the schedule leaves no step in between.
    """

    peft_type: str | None = PeftType.ADALORA
    target_r: int = field(default=8, metadata=_help("Ranks of a weight in the end, on average."))
    init_r: int = field(default=12, metadata=_help("Ranks of each weight at the start."))
    tinit: int = field(default=0, metadata=_help("Steps before ranks are taken away."))
    tfinal: int = field(default=0, metadata=_help("Steps after the last allocation."))
    deltaT: int = field(default=1, metadata=_help("Steps between two allocations."))  # noqa: N815  HF's name
    beta1: float = field(default=0.85, metadata=_help("Of the moving average of importance."))
    beta2: float = field(default=0.85, metadata=_help("Of the moving average of its uncertainty."))
    orth_reg_weight: float = field(default=0.5, metadata=_help("Weight of the orthogonality term of the loss."))
    total_step: int | None = field(default=None, metadata=_help("Steps of the training."))
    rank_pattern: dict[str, Any] | None = field(default=None, metadata=_help("The ranks in the budget; training writes it."))

    paper: ClassVar[str] = "2303.10512"
    equation: ClassVar[str] = "W + s B diag(E) A"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"init_r": 4, "target_r": 2, "total_step": 10},
        "dropout": {"init_r": 4, "total_step": 10, "lora_dropout": 0.3},
        "random": {"init_r": 3, "total_step": 10, "lora_alpha": 0, "init_lora_weights": False},
        "dora": {"init_r": 4, "total_step": 10, "use_dora": True},
        "orthogonal": {"init_r": 3, "total_step": 10, "init_lora_weights": "orthogonal"},
        "mica": {"init_r": 3, "total_step": 10, "init_lora_weights": "mica"},
        "loftq": {"init_r": 2, "total_step": 10, "init_lora_weights": "loftq", "loftq_config": {"loftq_iter": 2}},
    }
    patterns: ClassVar[dict[str, str]] = {"alpha_pattern": "lora_alpha"}
    size_option: ClassVar[str] = "init_r"
    behind_scale: ClassVar[tuple[str, ...]] = ("lora_E",)
    on_model: ClassVar[tuple[str, ...]] = ("update_and_allocate",)
    # Of one layer: which of its ranks are in the budget, and which of the first ranks they are, where a file had not all of them.
    mask: ClassVar[list[bool] | None] = None
    ranks: ClassVar[list[int] | None] = None

    def __post_init__(self) -> None:
        if self.loftq_config and self.init_lora_weights != "loftq":
            raise ValueError("There is nothing for `loftq_config` to do without init_lora_weights='loftq'; leave it out.")
        super().__post_init__()
        if self.lora_bias:
            raise ValueError("AdaLoRA has no `lora_bias`; use `bias='lora_only'` to retrain the biases.")
        if self.r != 8:
            warnings.warn("AdaLoRA does not read `r`; set `init_r` and `target_r`.", stacklevel=3)
        if self.use_rslora:
            warnings.warn("AdaLoRA scales by lora_alpha / init_r; `use_rslora` is not read.", stacklevel=3)
        if self.total_step is None or self.total_step <= 0:
            raise ValueError(f"AdaLoRA plans its budget ahead: set `total_step` to the number of training steps, not {self.total_step!r}.")
        if self.orth_reg_weight < 0:
            raise ValueError(f"`orth_reg_weight` cannot be negative, as {self.orth_reg_weight!r} is.")
        for name in ("beta1", "beta2"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(f"`{name}` lies between 0 and 1, and {getattr(self, name)!r} does not.")
        if self.tinit >= self.total_step - self.tfinal:
            raise ValueError(
                f"tinit={self.tinit} and tfinal={self.tfinal} leave no step of total_step={self.total_step} in which ranks could be "
                "taken away; decrease them or increase `total_step`."
            )

    # -- the update --
    @property
    def scaling(self) -> float:
        alpha = self.lora_alpha if self.lora_alpha > 0 else self.init_r
        return alpha / (self.init_r + 1e-5)

    def unfit(self, start: str) -> str:
        if start in STARTS:
            return (
                "a rank is taken away by setting its value to zero, which has to be the base, and with this start it would be the base "
                "without a part of it"
            )
        # "orthogonal" takes orthonormal vectors here, and no halves of the rank.
        return ""

    def check_init(self) -> None:
        # HF peft takes any name of a start and has none of them. Its files can be read; a new adapter is told (`start`).
        if not self.unfit(self.start_name):
            super().check_init()

    def start(self, p: Adapter) -> None:
        if why := self.unfit(self.start_name):
            raise ValueError(f"init_lora_weights={self.init_lora_weights!r} is no start of AdaLoRA: {why}. Use 'eva', 'mica' or True.")
        super().start(p)

    def variant(self) -> Method:
        return Additive.variant(self)

    def at(self, path: str) -> Method:
        method = copy.copy(LowRank.at(self, path))
        mask = self._kept_in_file(path)
        if mask is not None:
            method.ranks = [i for i, keep in enumerate(mask) if keep]  # type: ignore[misc]
        return method

    def refuses(self, site: Site) -> str | None:
        return None

    def names(self, site: Site) -> tuple[str, ...]:
        return "lora_A", "lora_E", "lora_B"

    def joined(self, site: Site, *tensors: Tensor) -> tuple[Tensor, Tensor]:
        a, e, b = tensors
        return a * e, b

    def placed(self, site: Site, a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        """The product's singular triplets. Ranks that it has not have orthonormal vectors all the same."""
        if not b.any():
            other = torch.empty(b.shape)
            orthonormal(other, generator_for(0, "placed"))
            return a, a.new_zeros(*a.shape[:-1], 1), other.to(b)
        u, s, v = singular_vectors_of_product(b, a)
        return v.mT, s.unsqueeze(-1), u

    def params(self, site: Site) -> dict[str, Param]:
        rows = self.init_r if self.ranks is None else len(self.ranks)
        vectors: Init = orthonormal if self.init_lora_weights == "orthogonal" else normal(0.02 if self.init_lora_weights else 1.0)
        return {
            "lora_A": Ranked((rows, "in"), vectors, method=self, axis=-2),
            "lora_E": Ranked((rows, 1), zeros if self.init_lora_weights else normal(), method=self, axis=-2),
            "lora_B": Ranked(("out", rows), vectors, method=self, axis=-1),
        }

    def delta_bias(self, p: Adapter) -> Tensor | None:
        return None

    def default_targets(self) -> dict[str, list[str] | str]:
        gemma4 = super().default_targets()["gemma4"]
        return {"gemma4": gemma4, **{base: names.split() for base, names in _DEFAULTS.items()}}

    def kept(self) -> list[bool]:
        """Of one layer: which of its first ranks are left."""
        assert self.mask is not None
        if self.ranks is None:
            return self.mask
        left = {rank for rank, keep in zip(self.ranks, self.mask, strict=True) if keep}
        return [i in left for i in range(self.init_r)]

    def _kept_in_file(self, path: str) -> list[bool] | None:
        return next((v for k, v in (self.rank_pattern or {}).items() if _layer_of(k) == path), None)

    def refilled(self, adapters: Sequence[Adapter], saved: Callable[[], PeftConfig]) -> Callable[[], None]:
        """A file has the ranks that were in the budget when it was written, not those that are in it now."""
        config = saved()
        if not isinstance(config, AdaLoraConfig):
            raise ValueError(f"The file holds an adapter of {type(config).__name__}, not of {type(self).__name__}.")
        if config.init_r != self.init_r:
            raise ValueError(f"The file has init_r={config.init_r}, this adapter {self.init_r}; load it under another name.")
        before = self.rank_pattern, [p.method.mask for p in adapters]  # type: ignore[attr-defined]

        def put(pattern: dict[str, Any] | None, masks: Sequence[list[bool] | None]) -> None:
            self.rank_pattern = pattern
            for p, mask in zip(adapters, masks, strict=True):
                p.method.mask = mask  # type: ignore[attr-defined]

        masks: list[list[bool] | None] = []
        for p in adapters:
            mask, ranks = config._kept_in_file(p.path), p.method.ranks  # type: ignore[attr-defined]
            masks.append(mask if mask is None or ranks is None else [mask[i] for i in ranks])
        put(config.rank_pattern, masks)
        return lambda: put(*before)

    # -- in training --
    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """The mean of ``|A A' - I|`` and ``|B' B - I|`` over all layers."""
        grams = [g for p in adapters for g in (p.lora_A @ p.lora_A.mT, p.lora_B.mT @ p.lora_B)]
        if not grams or not self.orth_reg_weight:
            return None
        off = [torch.linalg.matrix_norm(g - torch.eye(g.shape[-1], dtype=g.dtype, device=g.device)).flatten() for g in grams]
        return self.orth_reg_weight * torch.cat([o.to(off[0].device) for o in off]).mean()

    def stepped(self, adapters: Sequence[Adapter], optimizer: Optimizer) -> None:
        progress = _progress(self)
        if not progress.explicit:
            progress.step = max(progress.step + 1, _steps_of(optimizer, adapters))
            self._allocate(adapters, progress.step)

    def update_and_allocate(self, adapters: Sequence[Adapter], global_step: int) -> None:
        """Rank the triplets and set the least important ones to zero, as a caller counts the steps.

        It is done after each step of the optimiser without being asked for. Who calls this once does so in each step, from the
        first on; what the first step did by itself is taken back.

        Args:
            adapters: of all layers.
            global_step: the number of the step; the last allocation is at ``total_step - tfinal``.
        """
        progress = _progress(self)
        if not progress.explicit:
            progress.explicit = True
            for p, state in progress.before:
                _put(p, state)
            self.rank_pattern = progress.pattern_before if progress.before else self.rank_pattern
        self._allocate(adapters, global_step)

    def _allocate(self, adapters: Sequence[Adapter], step: int) -> None:
        assert self.total_step is not None
        progress, last = _progress(self), self.total_step - self.tfinal
        progress.before = [] if progress.explicit else [(p, _state(p)) for p in adapters]
        progress.pattern_before = self.rank_pattern
        if step > last:
            for p in adapters:
                if p.method.mask is not None:  # type: ignore[attr-defined]
                    _zero(p, torch.tensor(p.method.mask, device=p.lora_E.device))  # type: ignore[attr-defined]
            return
        if step < last:
            for p in adapters:
                _weigh(p, self.beta1, self.beta2)
        if step == last or (step > self.tinit and step % self.deltaT == 0):
            self._keep(adapters, self.budget(step, adapters))
        if step == last:
            for p in adapters:
                p.__dict__.pop("_importance", None)

    def budget(self, step: int, adapters: Sequence[Adapter]) -> int:
        """How many triplets all layers have together at a step: falling as a cube from all of them to the target."""
        assert self.total_step is not None
        start, end = sum(p.lora_A.shape[-2] for p in adapters), self.target_r * len(adapters)
        left = 1 - (step - self.tinit) / (self.total_step - self.tfinal - self.tinit)
        return int((start - end) * left**3 + end)

    def _keep(self, adapters: Sequence[Adapter], budget: int) -> None:
        scores = [_scores(p) for p in adapters]
        everything = torch.cat([s.to(scores[0].device) for s in scores])
        away = len(everything) - budget
        if away <= 0 or not any("_importance" in p.__dict__ for p in adapters):
            return
        threshold = everything.kthvalue(away).values
        masks = [s > threshold.to(s.device) for s in scores]
        for p, mask in zip(adapters, masks, strict=True):
            p.method.mask = mask.tolist()  # type: ignore[attr-defined]
            _zero(p, mask)
        self.rank_pattern = {f"{p.path}.lora_E": p.method.kept() for p in adapters}  # type: ignore[attr-defined]


# ---- importance -----------------------------------------------------------------------------------------------------------
class _Progress:
    """How far the training of one configuration is: kept beside its fields, and in no file.

    Attributes:
        step: steps of the optimiser so far.
        explicit: the user counts the steps.
        before: what the last allocation changed.
    """

    def __init__(self) -> None:
        self.step, self.explicit = 0, False
        self.before: list[tuple[Adapter, dict[str, Any]]] = []
        self.pattern_before: dict[str, Any] | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Progress:
        # A copied model has other adapters, and they go on from here.
        made = _Progress()
        made.step, made.explicit = self.step, self.explicit
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        return _Progress, (), {"step": self.step, "explicit": self.explicit}


def _progress(config: AdaLoraConfig) -> _Progress:
    return config.__dict__.setdefault("_progress", _Progress())


def _steps_of(optimizer: Optimizer, adapters: Sequence[Adapter]) -> int:
    """How many steps an optimiser has done on these, if it counts them: a training that was resumed goes on where it was."""
    return max((int(optimizer.state[q].get("step", 0)) for p in adapters for q in p.parameters() if q in optimizer.state), default=0)


def _layer_of(key: str) -> str:
    """The layer of a key of ``rank_pattern``, which ends in ``lora_E`` and may have the adapter's name behind that."""
    return key.rpartition(".lora_E")[0]


def _state(p: Adapter) -> dict[str, Any]:
    return {"values": p.lora_E.detach().clone(), "mask": p.method.mask, "importance": p.__dict__.get("_importance")}  # type: ignore[attr-defined]


def _put(p: Adapter, state: dict[str, Any]) -> None:
    p.lora_E.data.copy_(state["values"])
    p.method.mask = state["mask"]  # type: ignore[attr-defined]
    p.__dict__.pop("_importance", None)
    if state["importance"] is not None:
        p.__dict__["_importance"] = state["importance"]


def _zero(p: Adapter, mask: Tensor) -> None:
    with torch.no_grad():
        p.lora_E.masked_fill_(~mask.unsqueeze(-1), 0.0)


@torch.no_grad()
def _weigh(p: Adapter, beta1: float, beta2: float) -> None:
    """Moving averages of ``|q dL/dq|``, by which the loss changes without the number q, and of how much that varies."""
    known, new = p.__dict__.get("_importance", {}), {}
    for name in ("lora_A", "lora_E", "lora_B"):
        q = getattr(p, name)
        now = torch.zeros_like(q) if q.grad is None else (q * q.grad).abs()
        mean, spread = known.get(name, (torch.zeros_like(q), torch.zeros_like(q)))
        mean = beta1 * mean + (1 - beta1) * now
        new[name] = mean, beta2 * spread + (1 - beta2) * (now - mean).abs()
    p.__dict__["_importance"] = new


@torch.no_grad()
def _scores(p: Adapter) -> Tensor:
    """The importance of each triplet: that of its value and the mean one of its vectors. Several matrices of one host share ranks."""
    known = p.__dict__.get("_importance")
    if known is None:
        return torch.zeros(p.lora_A.shape[-2], device=p.lora_A.device)
    a, e, b = (mean * spread for mean, spread in (known[n] for n in ("lora_A", "lora_E", "lora_B")))
    vectors = torch.stack([a.mean(-1), b.mean(-2)], -1).sum(-1)
    return (e.squeeze(-1) + vectors).flatten(0, -2).mean(0) if a.ndim > 2 else e.squeeze(-1) + vectors
