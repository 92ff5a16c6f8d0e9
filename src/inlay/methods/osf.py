"""OSF: the large singular directions of a weight stay, the small ones are trained (arXiv 2504.07097).

``W = U_high S_high V_high + U S V`` is split by its singular values. U, S and V are trained, and the steps of U and V stay
orthogonal to U_high and V_high, so that what the base knows best is left alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn

from ..core.additive import Additive
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..core.targets import ALL_LINEAR, architecture
from ..initializers.eigenvectors import eigenvectors_roughly, transposed_times
from ..kernels.lowrank import linear_plus_low_rank
from ..kernels.projected import within

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

# A weight of more numbers is decomposed with as little memory as possible where it is only folded.
AT_ONCE = 2**22
_LLAMA = "q_proj k_proj v_proj o_proj gate_proj down_proj up_proj"
_DEFAULTS = {
    _LLAMA: "llama llama4 mistral mixtral gemma gemma2 gemma3_text qwen2 qwen3 phi", "c_attn c_proj": "gpt2 gpt_bigcode",
    "query_key_value dense_4h_to_h": "bloom gpt_neox falcon", "q_proj k_proj v_proj out_proj fc1 fc2": "opt",
    "q_proj k_proj v_proj out_proj fc_in fc_out": "gptj",
}  # fmt: skip


@register
@dataclass
class OSFConfig(Additive):
    """Orthogonal subspace fine-tuning.

    Args:
        effective_rank: how many singular directions stay: a number, a share of the smaller side in (0, 1], or None for half.
        rank_pattern: other values by regular expression, which may match anywhere in a module's name.
        init_weights: start from the base; False starts U, S and V from random values, for tests.
        target_svd_config: for HF's files, which read it nowhere.

    Raises:
        ValueError: a rank is not positive.
    """

    peft_type: str | None = PeftType.OSF
    effective_rank: int | float | None = field(default=None, metadata={"help": "Singular directions that stay: number or share."})
    rank_pattern: dict[str, int | float] | None = field(default=None, metadata={"help": "Other ranks by regular expression."})
    init_weights: bool | None = field(default=True, metadata={"help": "Start from the base."})
    target_svd_config: dict[str, int] | None = field(default=None, metadata={"help": "For HF's files."})

    prefix: ClassVar[str] = "osf_"
    paper: ClassVar[str] = "2504.07097"
    count_formula: ClassVar[str] = "effective_rank·(in + out + 1)"
    equation: ClassVar[str] = "W - U0 S0 V0 + U S V"
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_to_transform", "layers_pattern"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {},
        "share": {"effective_rank": 0.9},
        "random": {"effective_rank": 2, "init_weights": False},
        "dropout": {"input_dropout": 0.3},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for rank in (self.effective_rank, *(self.rank_pattern or {}).values()):
            if rank is not None and rank <= 0:
                raise ValueError(f"`effective_rank` is a number of directions or a share of them, and positive, not {rank!r}.")

    def default_targets(self) -> dict[str, list[str] | str]:
        return {base: names.split() for names, bases in _DEFAULTS.items() for base in bases.split()}

    def prepare(self, base: nn.Module) -> None:
        if self.target_modules is None and not self.target_parameters and architecture(base) not in self.default_targets():
            self.target_modules = ALL_LINEAR

    def patterned(self, path: str) -> Method:
        rank = next((v for k, v in (self.rank_pattern or {}).items() if re.search(k, path)), None)
        return super(OSFConfig, self if rank is None else replace(self, effective_rank=rank)).patterned(path)

    @property
    def heavy(self) -> str:
        return (
            "half of the singular directions of the weight stay, which takes all eigenvectors of a matrix as wide as its shorter side: "
            "three times that, beside the weight and the file's tensors (of a float32 weight of 4096 x 4096, which has 67 MB, 421 MB)"
        )

    def to_fold(self, site: Site) -> Method:
        return self.become(Folded) if site.shape.numel() > AT_ONCE and site.dtype != torch.float64 else self

    @property
    def never_identity(self) -> str:
        return "it starts from random values (init_weights=False)" if self.init_weights is False else ""

    def kept(self, site: Site) -> int:
        """How many singular directions stay at a site."""
        side, rank = min(site.shape[-2:]), self.effective_rank
        if rank is None:
            return side // 2
        return min(side, int(side * rank) if isinstance(rank, float) and rank <= 1 else int(rank))

    def refuses(self, site: Site) -> str | None:
        side, kept = min(site.shape[-2:]), self.kept(site)
        if side == 1:
            return "a matrix of one row or column has one singular direction, which cannot be split"
        if kept < 1:
            return f"effective_rank={self.effective_rank!r} keeps none of its {side} singular directions"
        return f"effective_rank={self.effective_rank!r} keeps all of its {side} singular directions" if kept == side else None

    def params(self, site: Site) -> dict[str, Param]:
        kept, (out, inner) = self.kept(site), site.shape[-2:]
        rank = min(out, inner) - kept
        init = normal() if self.init_weights is False else zeros

        def trained(axes: tuple[str | int, ...], name: str) -> Param:
            return Param(axes, init, f"osf_svd_params.{name}", file_shape=None)

        def derived(*axes: str | int) -> Param:
            return Param(axes, trainable=False, persistent=False)

        return {
            "osf_U_low": trained(("out", rank), "U_low"),
            "osf_S_low": trained((rank,), "S_low"),
            "osf_V_low": trained((rank, "in"), "V_low"),
            "osf_high": derived("out", "in"),
            "osf_U": derived("out", kept if self._narrow(out, inner, kept) else rank),
            "osf_V": derived("in", kept if self._narrow(inner, out, kept) else rank),
        }

    @staticmethod
    def _narrow(side: int, other: int, kept: int) -> bool:
        """Whether steps on one side are kept orthogonal to the directions that stay, or within those that are trained.

        That is the same where the directions fill the side's space, and then the smaller basis is taken.
        """
        return side > other or kept <= side - kept

    def derive(self, p: Adapter) -> None:
        kept, (out, inner) = self.kept(p.site), p.site.shape[-2:]
        u, s, v = _svd(p)
        p.osf_high.copy_((u[..., :kept] * s[..., None, :kept]) @ v[..., :kept, :])
        p.osf_U.copy_(u[..., :kept] if self._narrow(out, inner, kept) else u[..., kept:])
        p.osf_V.copy_((v[..., :kept, :] if self._narrow(inner, out, kept) else v[..., kept:, :]).mT)

    def start(self, p: Adapter) -> None:
        if self.init_weights is not False:
            kept = self.kept(p.site)
            u, s, v = _svd(p)
            p.osf_U_low.data.copy_(u[..., kept:])
            p.osf_S_low.data.copy_(s[..., kept:])
            p.osf_V_low.data.copy_(v[..., kept:, :])
        _latest.clear()

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """``V (*batch, r, in)`` and ``U S (*batch, out, r)``, whose gradients are projected."""
        kept, (out, inner) = self.kept(p.site), p.site.shape[-2:]
        u = within(p.osf_U_low, p.osf_U, self._narrow(out, inner, kept))
        v = within(p.osf_V_low.mT, p.osf_V, self._narrow(inner, out, kept)).mT
        return v, u * p.osf_S_low.unsqueeze(-2)

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def high(self, p: Adapter) -> Tensor:
        """The part of the weight that stays."""
        return p.osf_high

    def delta(self, p: Adapter) -> Tensor:
        v, u = self.factors(p)
        w, _ = p.site.read()
        return u @ v - (full(w) - self.high(p))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        drops = self.dropout and p.training
        if inner.dense is None or p.strength != 1 or drops or inner.dense[0].dtype != p.osf_high.dtype:
            return super().around(p, inner, x)
        # Nothing is subtracted where the part that stays can stand in the weight's place.
        return linear_plus_low_rank(x, p.osf_high, inner.dense[1], *self.factors(p), 1.0, 0.0)


def _unset(tensor: Tensor, _: torch.Generator) -> None:
    """Memory that `derive` is going to fill."""


class Folded(OSFConfig):
    """OSF from a file on a large weight. The part that stays is there in factors, from the eigenvectors of the shorter side's Gram
    matrix, which take a part of the memory of a singular value decomposition; nothing has to keep steps orthogonal to it."""

    def params(self, site: Site) -> dict[str, Param]:
        kept = self.kept(site)
        left, right = (Param(axes, _unset, trainable=False, persistent=False) for axes in (("out", kept), (kept, "in")))
        trained = {name: param for name, param in super().params(site).items() if param.trainable}
        return trained | {"osf_high_left": left, "osf_high_right": right}

    @torch.no_grad()
    def derive(self, p: Adapter) -> None:
        w = p.site.read()[0]
        wide = w.shape[-2] <= w.shape[-1]
        w = w if wide else w.mT
        near = eigenvectors_roughly(w)[1][..., -self.kept(p.site) :]
        far = transposed_times(w, near)
        p.osf_high_left.copy_(near if wide else far)
        p.osf_high_right.copy_((far if wide else near).mT)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        return p.osf_V_low, p.osf_U_low * p.osf_S_low.unsqueeze(-2)

    def high(self, p: Adapter) -> Tensor:
        return p.osf_high_left @ p.osf_high_right


# The SVD of the layer that was looked at last: what is derived from the base and what starts from it ask one after the other.
_latest: list[tuple[ref[Adapter], tuple[Tensor, Tensor, Tensor]]] = []


def _svd(p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
    if not _latest or _latest[0][0]() is not p:
        w, _ = p.site.read()
        with torch.no_grad():
            _latest[:] = [(ref(p), torch.linalg.svd(full(w), full_matrices=False))]  # type: ignore[list-item]
    return _latest[0][1]
