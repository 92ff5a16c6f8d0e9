"""Poly: a shared inventory of low-rank skills, mixed for each task (Ponti et al. 2022, arXiv 2202.13914); with several splits of the
features, multi-head routing (Caccia et al. 2022, arXiv 2211.03831).

The routers of other methods share out adapters; here the skills are the adapter, and a row of the batch gets its task's mixture.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.additive import LowRank, add, meet
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, zeros
from ..core.site import Embedding, Site
from .lora import is_linear

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


def _by_columns(tensor: Tensor, generator: torch.Generator) -> None:
    """As the default of ``nn.Linear``, for matrices that are kept transposed."""
    drawn = torch.empty(tensor.mT.shape)
    kaiming_uniform(drawn, generator)
    tensor.copy_(drawn.mT)


def _near_zero(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(-1e-3, 1e-3, generator=generator)


@register
@dataclass
class PolyConfig(LowRank):
    """Poly's options; HF peft's fields.

    Args:
        r: rank of a skill.
        init_weights: start from the base; False starts from random skills, for tests.
        poly_type: ``"poly"``.
        n_tasks: how many mixtures there are. With several, each call of the model takes ``task_ids``, one for each row.
        n_skills: skills of a layer.
        n_splits: parts of the features that are mixed by themselves.

    Raises:
        ValueError: a number is not positive, or the type is unknown.
    """

    peft_type: str | None = PeftType.POLY
    r: int = field(default=8, metadata=_help("Rank of a skill.") | {"positive": True})
    init_weights: bool = field(default=True, metadata=_help("Start from the base."))
    poly_type: str = field(default="poly", metadata=_help("The kind of router; poly.") | {"known": ("poly",)})
    n_tasks: int = field(default=1, metadata=_help("How many mixtures there are.") | {"positive": True})
    n_skills: int = field(default=4, metadata=_help("Skills of a layer.") | {"positive": True})
    n_splits: int = field(default=1, metadata=_help("Parts of the features that are mixed by themselves.") | {"positive": True})

    prefix: ClassVar[str] = "poly_"
    paper: ClassVar[str] = "2202.13914"
    count_formula: ClassVar[str] = "n_skills·r·(in + out) + n_tasks·n_skills·n_splits"
    equation: ClassVar[str] = "W + (sum_k g_tk B_k) (sum_k g_tk A_k) / r"
    takes: ClassVar[tuple[str, ...]] = ("task_ids",)
    ours: ClassVar[frozenset[str]] = Method.ours | {"layers_to_transform", "layers_pattern"}
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 3, "n_skills": 2},
        "splits": {"r": 2, "n_skills": 3, "n_splits": 2},
        "random": {"r": 2, "init_weights": False},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.use_dora:
            raise ValueError("`use_dora` needs one update, and in training Poly draws a mixture for each row.")

    @property
    def unmergeable(self) -> str:  # type: ignore[override]
        return "Poly gives each row its task's mixture of skills, and a weight acts on all rows." if self.n_tasks > 1 else ""

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "init_weights=False starts from random skills, for tests"

    @property
    def scaling(self) -> float:
        return 1 / self.r

    def refuses(self, site: Site) -> str | None:
        for axis in ("in", "out"):
            if site.size(axis) % self.n_splits:
                return f"its {site.size(axis)} {axis}put features cannot be split into `n_splits` = {self.n_splits} parts"
        if self.n_tasks > 1 and not is_linear(site) and not isinstance(site, Embedding):
            return "it applies one weight to all rows, and with several tasks each row has its own"
        return None

    def params(self, site: Site) -> dict[str, Param]:
        splits, skills, inp, out = self.n_splits, self.n_skills, site.size("in"), site.size("out")
        return {
            "poly_lora_A": Param((splits, skills, inp // splits, self.r), _by_columns),
            "poly_lora_B": Param((splits, skills, self.r, out // splits), zeros if self.init_weights else _by_columns),
            "module_logits": Param((self.n_tasks, splits * skills), _near_zero, "poly_router.module_logits", batched=False),
        }

    def given(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        tasks = kwargs.get("task_ids")
        if tasks is None:
            return {}
        tasks = torch.as_tensor(tasks)
        if int(tasks.max()) >= self.n_tasks or int(tasks.min()) < 0:
            raise ValueError(f"`task_ids` go from 0 to {self.n_tasks - 1} (n_tasks={self.n_tasks}), and one is {int(tasks.max())}.")
        return {"tasks": tasks.flatten()}

    def _mixture(self, p: Adapter, tasks: Tensor) -> Tensor:
        """The shares of the skills ``(rows, splits, skills)``; in training drawn, each skill being nearly on or off."""
        logits = full(p.module_logits)[tasks.to(p.module_logits.device)].unflatten(-1, (self.n_splits, self.n_skills))
        if p.training:
            tiny = torch.finfo(logits.dtype).eps
            drawn = torch.rand(logits.shape, device=logits.device, dtype=logits.dtype).clamp(tiny, 1 - tiny)
            logits = logits + drawn.log() - (-drawn).log1p()
        shares = logits.sigmoid()
        return shares / (shares.sum(-1, keepdim=True) + 1e-12)

    def _mixed(self, p: Adapter, shares: Tensor) -> tuple[Tensor, Tensor]:
        """``A' (rows, *batch, in, r)`` and ``B' (rows, *batch, r, out)`` of these mixtures: as the skills are kept, so that none of
        them is copied."""
        shares = shares.to(p.poly_lora_A.dtype)
        a = torch.einsum("nqs,...qsdr->n...qdr", shares, p.poly_lora_A).flatten(-3, -2)
        return a, torch.einsum("nqs,...qsrd->n...rqd", shares, p.poly_lora_B).flatten(-2)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """The first task's; that of the only one."""
        a, b = self._mixed(p, self._mixture(p, torch.zeros(1, dtype=torch.int64, device=p.module_logits.device)))
        return a[0].mT, b[0].mT

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        site, tasks = inner.site, p.call.get("tasks")
        by_rows = is_linear(site) or isinstance(site, Embedding)
        if self.n_tasks == 1 and (tasks is None or not by_rows or not p.training):
            return super().around(p, inner, x)
        if tasks is None:
            raise ValueError(f"Poly has {self.n_tasks} tasks; pass `task_ids` to the model, one for each row of the batch.")
        y = inner(x)
        if len(x) % len(tasks):
            raise ValueError(f"{len(tasks)} `task_ids` were given for a batch of {len(x)}; give one for each row.")
        rows = tasks.repeat_interleave(len(x) // len(tasks)) if len(x) != len(tasks) else tasks
        a, b = self._mixed(p, self._mixture(p, rows))
        if isinstance(site, Embedding):
            # A row of A' for each token: its own row's.
            ids = x.reshape(len(x), -1)
            u = a.gather(1, ids.unsqueeze(-1).expand(-1, -1, a.shape[-1]))
            h = site.scaled((u @ b).view(*x.shape, -1))
        else:
            z, a, b = meet(x.reshape(len(x), -1, x.shape[-1]), a, b)
            u = z @ a
            if u.dtype == y.dtype and y.ndim == 3:
                # The output of a bare linear layer is nobody else's.
                into = torch.Tensor.baddbmm_ if inner.dense is not None and not y._is_view() else torch.baddbmm
                return into(y, u, b, alpha=self.scaling * p.strength)
            h = (u @ b).view(y.shape)
        return add(y, h, self.scaling * p.strength)
