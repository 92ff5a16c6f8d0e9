"""AdaMSS: small updates of groups of outputs, each in a subspace of its own (Zheng et al., NeurIPS 2025).

The rows of the weight are put into groups by k-means on its left singular vectors. A group's rows get ``B_i A_i V'``, with V the
weight's right singular vectors; the bias counts as one more column of the weight. Training may go on with the groups alone that
matter most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..core.additive import LowRank, add
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, normal, zeros
from ..core.site import Site
from ..kernels.core import linear_plus_core
from ..kernels.lowrank import linear_plus_low_rank

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


class Groups(NamedTuple):
    """How one matrix is divided.

    Attributes:
        labels: the group of each row, ``(out,)``.
        ranks: of each group's update.
    """

    labels: Tensor
    ranks: list[int]


@register
@dataclass
class AdamssConfig(LowRank):
    """Subspaces of groups of outputs.

    Args:
        r: how many singular vectors of the weight are looked at.
        num_subspaces: how many groups there are.
        subspace_rank: the highest rank of a group's update.
        init_weights: ``"orthogonal"`` starts from the base; None starts the B from small normal numbers.
        use_asa: leave out groups in training by and by (adaptive subspace allocation).
        asa_target_subspaces: how many groups are left at the end, in all layers together.
        init_warmup, final_warmup: the steps between which groups are left out.
        mask_interval: after how many steps it is chosen anew.
        asa_importance_beta, asa_uncertainty_beta: how slowly the running means of importance and of its change forget.
        asa_schedule_exponent: how fast the number of groups falls at first.
        use_dynamic_rank: leave out directions of a group whose share of its variance is small.
        svd_threshold: how small, beside the largest.
        random_seed: of the singular value decomposition, which draws where it starts.

    Raises:
        ValueError: a count is no positive integer, the start is unknown, or the steps leave no time to leave groups out.
    """

    peft_type: str | None = PeftType.ADAMSS
    r: int = field(default=100, metadata={"help": "Number of singular vectors.", "positive": True})
    num_subspaces: int = field(default=5, metadata={"help": "Number of groups of outputs.", "positive": True})
    subspace_rank: int = field(default=1, metadata={"help": "The highest rank of a group's update.", "positive": True})
    init_weights: str | bool | None = field(default="orthogonal", metadata={"help": "orthogonal: start from the base."})
    use_asa: bool = field(default=False, metadata={"help": "Leave out groups in training by and by."})
    asa_target_subspaces: int = field(default=50, metadata={"help": "Groups that are left at the end, of all layers.", "positive": True})
    init_warmup: int = field(default=50, metadata={"help": "The step at which groups begin to be left out."})
    final_warmup: int = field(default=1000, metadata={"help": "The step after which no more are left out."})
    mask_interval: int = field(default=100, metadata={"help": "Steps between two choices.", "positive": True})
    asa_importance_beta: float = field(default=0.85, metadata={"help": "How slowly the mean of importance forgets."})
    asa_uncertainty_beta: float = field(default=0.85, metadata={"help": "How slowly the mean of its change forgets."})
    asa_schedule_exponent: float = field(default=3.0, metadata={"help": "How fast the number of groups falls at first."})
    use_dynamic_rank: bool = field(default=False, metadata={"help": "Leave out a group's small directions."})
    svd_threshold: float = field(default=0.1, metadata={"help": "How small, beside the largest."})
    random_seed: int = field(default=0, metadata={"help": "Seed of the singular value decomposition."})

    prefix: ClassVar[str] = "adamss_"
    paper: ClassVar[str] = "https://openreview.net/forum?id=8ZdWmpYxT0"
    equation: ClassVar[str] = "W_i + B_i A_i V' for each group i of rows, with V from the SVD of W"
    count_formula: ClassVar[str] = "subspace_rank·(out + r·num_subspaces)"
    on_model: ClassVar[tuple[str, ...]] = ("update_and_allocate",)
    size_option: ClassVar[str] = "subspace_rank"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 4, "num_subspaces": 1, "subspace_rank": 2},
        "dynamic": {"r": 5, "num_subspaces": 1, "subspace_rank": 3, "use_dynamic_rank": True},
        "dropout": {"r": 3, "num_subspaces": 2, "input_dropout": 0.3, "init_weights": None},
    }
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.init_weights is False:
            self.init_weights = None
        if self.init_weights not in ("orthogonal", None):
            raise ValueError(f"`init_weights` should be 'orthogonal' or None, not {self.init_weights!r}.")
        if not self.use_asa:
            return
        if self.init_warmup >= self.final_warmup:
            raise ValueError(f"`init_warmup`={self.init_warmup} should be below `final_warmup`={self.final_warmup}.")
        if self.asa_schedule_exponent <= 0:
            raise ValueError(f"`asa_schedule_exponent` should be positive, not {self.asa_schedule_exponent!r}.")

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "the updates start from random numbers (init_weights=None)"

    # -- the groups --
    def _with_bias(self, site: Site) -> bool:
        return site.bias() is not None and not site.batch and site.size("channel") == site.size("out")

    def _matrices(self, site: Site) -> list[Tensor]:
        """The weights ``(out, columns)``, the bias as their last column."""
        w, b = site.read()
        w = full(w.detach())
        if self._with_bias(site):
            assert b is not None
            w = torch.cat((w, b.detach().to(w).reshape(-1, 1)), -1)
        return list(w.reshape(-1, *w.shape[-2:]).unbind())

    def _decomposed(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """``U (out, r)`` and ``V' (r, columns)`` of the first singular vectors, nearly."""
        devices = [w.device] if w.device.type != "cpu" else []
        with torch.random.fork_rng(devices, device_type=w.device.type if devices else "cuda"):
            torch.manual_seed(self.random_seed)
            u, _, v = torch.svd_lowrank(w.float(), q=min(self.r, *w.shape), niter=2)
        return u, v.mT

    def _groups(self, site: Site) -> list[Groups]:
        """For each matrix of the site. They follow from the base, and are in no file."""
        key = self.r, self.num_subspaces, self.subspace_rank, self.use_dynamic_rank, self.svd_threshold, self.random_seed
        memory = getattr(site, "_adamss_groups", None)
        if memory is None:
            memory = site._adamss_groups = {}  # type: ignore[attr-defined]
        if key not in memory:
            memory[key] = [self._grouped(w) for w in self._matrices(site)]
        return memory[key]

    def _grouped(self, w: Tensor) -> Groups:
        count = min(self.num_subspaces, len(w))
        if w.is_meta:
            # As many rows in each, until there are values to tell.
            labels = torch.arange(len(w)) % count
            return Groups(labels, [min(self.subspace_rank, self.r, *w.shape, int(n)) for n in labels.bincount()])
        u, _ = self._decomposed(w)
        labels, ranks = _k_means(u, count, 10), []
        for label in range(int(labels.max()) + 1):
            rows = u[labels == label]
            rank = min(self.subspace_rank, *rows.shape)
            if self.use_dynamic_rank:
                variance = torch.linalg.svdvals(rows).square()
                rank = min(rank, max(int((variance > self.svd_threshold * variance[0]).sum()), 1))
            ranks.append(rank)
        return Groups(labels, ranks)

    # -- the layers --
    def params(self, site: Site) -> dict[str, Param]:
        columns = site.size("in") + self._with_bias(site)
        r = min(self.r, site.size("out"), columns)
        start = zeros if self.init_weights else normal(0.01)
        declared = {
            "adamss_newB": Param((r, columns), zeros, trainable=False),
            "adamss_rows": Param(("out",), zeros, trainable=False, persistent=False, dtype=torch.int64),
        }
        several = prod(site.batch) > 1
        for m, groups in enumerate(self._groups(site)):
            for i, (rank, rows) in enumerate(zip(groups.ranks, groups.labels.bincount().tolist(), strict=True)):
                at = f"{m}_{i}" if several else str(i)
                for side, shape, init in (("A", (rank, r), zeros), ("B", (rows, rank), start)):
                    declared[f"adamss_{side}_{at}"] = Param(shape, init, f"adamss_{side}.{at}", tuple(shape), batched=False)
        return declared

    def _pairs(self, p: Adapter) -> list[list[tuple[Tensor, Tensor]]]:
        """``A_i`` and ``B_i`` of each group of each matrix."""
        a, b = ([t for n, t in p.named_parameters(recurse=False) if n.startswith(f"adamss_{side}_")] for side in "AB")
        pairs = iter(zip(a, b, strict=True))
        return [[next(pairs) for _ in groups.ranks] for groups in self._groups(p.site)]

    def derive(self, p: Adapter) -> None:
        """Where each row of the weight is among the rows of the groups, one group after another."""
        found = [torch.argsort(torch.argsort(groups.labels, stable=True)) for groups in self._groups(p.site)]
        p.adamss_rows.copy_(torch.stack(found).view(p.adamss_rows.shape))

    def start(self, p: Adapter) -> None:
        """Each A holds its group's first directions among those of the whole weight."""
        decomposed = [self._decomposed(w) for w in self._matrices(p.site)]
        p.adamss_newB.copy_(torch.stack([v for _, v in decomposed]).view(p.adamss_newB.shape))
        for (u, _), groups, pairs in zip(decomposed, self._groups(p.site), self._pairs(p), strict=True):
            for label, (a, _) in enumerate(pairs):
                _, _, directions = torch.linalg.svd(u[groups.labels.to(u.device) == label], full_matrices=False)
                a.data.copy_(directions[: len(a)])

    def _thin(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """A ``(*batch, k, r)`` and B ``(*batch, out, k)`` of all groups together."""
        right, left = [], []
        orders = p.adamss_rows.reshape(-1, p.site.size("out"))
        for pairs, order in zip(self._pairs(p), orders, strict=True):
            right.append(torch.cat([a for a, _ in pairs]))
            left.append(torch.block_diag(*(b for _, b in pairs)).index_select(0, order))
        if not p.site.batch:
            return right[0], left[0]
        # Matrices of a stack may differ in their ranks.
        most = max(len(a) for a in right)
        a = torch.stack([torch.nn.functional.pad(t, (0, 0, 0, most - len(t))) for t in right])
        b = torch.stack([torch.nn.functional.pad(t, (0, most - t.shape[1])) for t in left])
        return a.unflatten(0, p.site.batch), b.unflatten(0, p.site.batch)

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        a, b = self._thin(p)
        return a @ p.adamss_newB[..., : p.site.size("in")].to(a.dtype), b

    def delta_bias(self, p: Adapter) -> Tensor | None:
        if not self._with_bias(p.site):
            return None
        a, b = self._thin(p)
        return b @ (a @ p.adamss_newB[:, -1].to(a.dtype))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None:
            return super().around(p, inner, x)
        a, b = self._thin(p)
        rate, basis = self.dropout if p.training else 0.0, p.adamss_newB.to(a.dtype)
        directions = basis[:, : x.shape[-1]]
        if rate or len(basis) >= x.shape[-1]:
            y = linear_plus_low_rank(x, *inner.dense, a @ directions, b, p.strength, rate)
        else:
            y = linear_plus_core(x, None, *inner.dense, directions, a, b, p.strength)
        return add(y, b @ (a @ basis[:, -1]), p.strength) if self._with_bias(p.site) else y

    # -- adaptive subspace allocation --
    def stepped(self, adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
        if self.use_asa:
            state = adapters[0].__dict__.setdefault("asa_state", {"step": 0})
            self._allocate(adapters, state["step"])
            state |= {"step": state["step"] + 1, "done": True}

    def update_and_allocate(self, adapters: Sequence[Adapter], global_step: int) -> None:
        """What `stepped` does, for a loop that counts its steps itself; what was done for this step already is not done again."""
        if not self.use_asa:
            return
        state = adapters[0].__dict__.setdefault("asa_state", {"step": global_step})
        if not state.get("done"):
            self._allocate(adapters, global_step)
        state |= {"step": global_step + 1, "done": False}

    def _allocate(self, adapters: Sequence[Adapter], step: int) -> None:
        if not self.init_warmup <= step <= self.final_warmup:
            return
        groups = [(p, pair) for p in adapters for of_matrix in self._pairs(p) for pair in of_matrix]
        for p, pair in groups:
            for q in pair:
                self._weigh(p, q)
        if step % self.mask_interval:
            return
        left = 1 - (step - self.init_warmup) / (self.final_warmup - self.init_warmup)
        target = int(self.asa_target_subspaces + (len(groups) - self.asa_target_subspaces) * left**self.asa_schedule_exponent)
        scored = []
        for p, pair in groups:
            known = [means for q in pair if (means := _means(p).get(q)) is not None]
            if len(known) == len(pair):
                scored.append((float(sum((mean * change).mean() for mean, change in known)), pair))
        scored.sort(key=lambda item: -item[0])
        for _, pair in scored[target:]:
            for q in pair:
                q.requires_grad_(False)
                q.grad = None
        for p in adapters:
            _means(p).clear()

    def _weigh(self, p: Adapter, q: Tensor) -> None:
        """Running means of ``|q dL/dq|`` and of how much it changes."""
        if q.grad is None:
            return
        mean, change = _means(p).setdefault(q, (torch.zeros_like(q.data), torch.zeros_like(q.data)))
        now = (q.data * q.grad).abs()
        change.lerp_((now - mean).abs(), 1 - self.asa_uncertainty_beta)
        mean.lerp_(now, 1 - self.asa_importance_beta)


def _means(p: Adapter) -> dict[Tensor, tuple[Tensor, Tensor]]:
    return p.__dict__.setdefault("asa_means", {})


def _k_means(points: Tensor, count: int, steps: int) -> Tensor:
    """The group of each point ``(n, d)``, by Lloyd's algorithm from points at random, with the draws and the stopping rule of
    scikit-learn's ``KMeans(count, init="random", n_init=1, max_iter=steps, random_state=123456789)``, of which HF's files take for
    granted that it comes out the same. Groups that end up empty are left out."""
    import numpy as np

    x = points.detach().cpu().float().numpy()
    even = np.ones(len(x), dtype=np.float32)
    first = np.random.RandomState(123456789).choice(len(x), size=count, replace=False, p=even / even.sum())
    tolerance = 1e-4 * np.var(x, axis=0).mean()
    x = x - x.mean(axis=0)
    centers, labels = x[first], np.full(len(x), -1)

    def nearest() -> Any:
        return ((centers**2).sum(1) - 2 * (x @ centers.T)).argmin(1)

    for _ in range(steps):
        before, labels = labels, nearest()
        sizes = np.bincount(labels, minlength=count)
        sums = np.zeros_like(centers)
        np.add.at(sums, labels, x)
        empty = np.flatnonzero(sizes == 0)
        if len(empty):
            # An empty group takes the point that is farthest from its center.
            far = np.argpartition(((x - centers[labels]) ** 2).sum(1), -len(empty))[: -len(empty) - 1 : -1]
            for group, point in zip(empty, far, strict=True):
                sums[labels[point]] -= x[point]
                sizes[labels[point]] -= 1
                sums[group], sizes[group] = x[point], 1
        moved, centers = centers, sums / np.maximum(sizes, 1)[:, None]
        centers = centers.astype(np.float32)
        if (before == labels).all():
            break
        if ((centers - moved) ** 2).sum() <= tolerance:
            labels = nearest()
            break
    else:
        labels = nearest()
    return torch.from_numpy(np.unique(labels, return_inverse=True)[1]).long()
