"""VB-LoRA: LoRA whose factors are put together from a bank of vectors that all layers share (Li et al. 2024, arXiv 2405.15179).

Each piece of a factor is a mixture of the k vectors of the bank whose trained logits are highest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import LowRank
from ..core.config import PeftType
from ..core.method import Method, padded, register
from ..core.param import Param, generator_for, normal
from ..core.site import Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter

_QKVO = "q_proj k_proj v_proj out_proj fc1 fc2"
_DEFAULTS = {
    "t5": "q k v o wi wo", "mt5": "q k v o wi_0 wi_1 wo", "bart": _QKVO, "opt": _QKVO,
    "deberta-v2": "query_proj key_proj value_proj dense",
}  # fmt: skip
INDICES, WEIGHTS = "_topk_indices", "_topk_weights"


@register
@dataclass
class VBLoRAConfig(LowRank):
    """Low-rank factors from a bank of vectors.

    Args:
        r: rank of the update.
        num_vectors: how many vectors the bank holds.
        vector_length: their length, which divides the inputs and the outputs of each layer.
        topk: how many vectors are mixed in one piece.
        save_only_topk_weights: write the mixtures and not the logits. The file is far smaller; trained on, each piece keeps its
            vectors and only mixes them anew.
        vblora_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_vector_bank_bound: the bank starts uniform within this bound.
        init_logits_std: standard deviation of the logits at the start.

    Raises:
        ValueError: a count is no positive integer, more vectors are to be mixed than there are, or the dropout is no share.
    """

    peft_type: str | None = PeftType.VBLORA
    r: int = field(default=4, metadata={"help": "Rank of the update.", "positive": True})
    num_vectors: int = field(default=256, metadata={"help": "Number of vectors in the bank.", "positive": True})
    vector_length: int = field(default=256, metadata={"help": "Length of the vectors in the bank.", "positive": True})
    topk: int = field(default=2, metadata={"help": "Number of vectors that are mixed in one piece.", "positive": True})
    save_only_topk_weights: bool = field(default=False, metadata={"help": "Write the mixtures and not the logits."})
    vblora_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_vector_bank_bound: float = field(default=0.02, metadata={"help": "Bound of the bank's first values."})
    init_logits_std: float = field(default=0.1, metadata={"help": "Standard deviation of the first logits."})

    prefix: ClassVar[str] = "vblora_"
    dropout_option: ClassVar[str] = "vblora_dropout"
    paper: ClassVar[str] = "2405.15179"
    equation: ClassVar[str] = "W + B A, with the pieces of B and A mixed from the k best of a shared bank of vectors"
    count_formula: ClassVar[str] = "r·num_vectors·(in + out) / vector_length"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 2, "num_vectors": 7, "vector_length": 2},
        "dropout": {"r": 3, "num_vectors": 5, "vector_length": 1, "topk": 3, "vblora_dropout": 0.3},
    }
    ours: ClassVar[frozenset[str]] = Method.ours - {"bias"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.topk > self.num_vectors:
            raise ValueError(f"`topk`={self.topk} vectors cannot be chosen of `num_vectors`={self.num_vectors}.")

    @property
    def never_identity(self) -> str:
        return "both factors are mixtures of random vectors"

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {base: names.split() for base, names in _DEFAULTS.items()}

    def refuses(self, site: Site) -> str | None:
        for axis, name in (("in", "inputs"), ("out", "outputs")):
            if site.size(axis) % self.vector_length:
                return f"its {site.size(axis)} {name} are no multiple of vector_length={self.vector_length}"
        return None

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        bank, bound = nn.Module(), self.init_vector_bank_bound
        drawn = torch.empty(self.num_vectors, self.vector_length)
        drawn.uniform_(-bound, bound, generator=generator_for(self.seed, "vblora_vector_bank"))
        bank.vblora_vector_bank = nn.Parameter(drawn)
        return bank

    def params(self, site: Site) -> dict[str, Param]:
        pieces = {axis: site.size(axis) // self.vector_length for axis in ("in", "out")}
        start = normal(self.init_logits_std)
        return {
            "vblora_logits_A": Param((self.r, pieces["in"], self.num_vectors), start),
            "vblora_logits_B": Param((pieces["out"], self.r, self.num_vectors), start),
        }

    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """A larger bank has vectors of zeros behind those of the smaller one, which no piece chooses but those of ranks that are
        new."""
        values, vectors = {}, small.vblora_logits_A.shape[-1]
        if self.vector_length != small.method.vector_length:  # type: ignore[attr-defined]
            raise ValueError("pieces of one `vector_length` are none of another")
        if self.r > small.method.r and self.num_vectors == vectors:  # type: ignore[attr-defined]
            raise ValueError("a rank that adds nothing is made of zeros, and no vector of the bank is zero: give it one `num_vectors` more")
        for name, axis in (("vblora_logits_A", -3), ("vblora_logits_B", -2)):
            logits, shape = getattr(small, name), getattr(p, name).shape
            found = padded(logits, shape)
            # A finite number, so low that such a vector is never chosen.
            found[..., vectors:] = torch.finfo(found.dtype).min
            new = found.movedim(axis, 0)[logits.shape[axis] :]
            new.fill_(torch.finfo(found.dtype).min)
            new[..., vectors : vectors + 1] = 0
            values[name] = found
        return values

    def _mixed(self, p: Adapter, logits: Tensor) -> Tensor:
        """``(*, num_vectors)`` to ``(*, vector_length)``."""
        best, chosen = logits.topk(self.topk, dim=-1)
        return (best.softmax(-1).unsqueeze(-1) * F.embedding(chosen, p.shared.vblora_vector_bank)).sum(-2)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = self._mixed(p, p.vblora_logits_A), self._mixed(p, p.vblora_logits_B)
        return a.flatten(-2), b.transpose(-1, -2).flatten(-3, -2)

    # -- files of mixtures --
    def written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.save_only_topk_weights:
            return tensors
        dtype = next(d for d in (torch.uint8, torch.int16, torch.int32, torch.int64) if self.num_vectors <= torch.iinfo(d).max)
        found = {}
        for key, tensor in tensors.items():
            if "vblora_logits_" not in key:
                found[key] = tensor
                continue
            best, chosen = tensor.topk(self.topk, dim=-1)
            # The last weight is what is missing to one.
            found |= {key + INDICES: chosen.to(dtype), key + WEIGHTS: best.softmax(-1)[..., :-1].contiguous()}
        return found

    def as_read(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {k: t for k, t in tensors.items() if not k.endswith((INDICES, WEIGHTS))}
        for key, chosen in tensors.items():
            weights = tensors.get(key.removesuffix(INDICES) + WEIGHTS)
            if not key.endswith(INDICES) or weights is None:
                continue
            weights = torch.cat((weights, 1 - weights.sum(-1, keepdim=True)), -1)
            # A finite number, so low that such a vector is never chosen.
            lowest = torch.finfo(weights.dtype).min
            logits = torch.full((*weights.shape[:-1], self.num_vectors), lowest, dtype=weights.dtype, device=weights.device)
            found[key.removesuffix(INDICES)] = logits.scatter_(-1, chosen.long(), weights.log().clamp_min(lowest / 2))
        return found
