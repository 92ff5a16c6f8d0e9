"""FRoD: a weight as ``U diag(l) V'`` with V common to layers of one kind, retrained in l and a few entries beside it (AAAI 2026).

``W' = U (diag(l) + S) V'``: V (``in x in``) comes from a joint decomposition of all weights of a kind, U has columns of length one,
and S is sparse with places drawn at random (doi 10.1609/aaai.v40i31.39813). What is added to the weight is
``U (diag(l - l0) + S) V'``, with l0 from the weight.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, generator_for, normal, zeros
from ..core.site import Site
from ..kernels.rebased import linear_plus_rebased
from ..kernels.spread import remembered, sampled, scattered, times_sparse
from .spread import Spread

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


# So many rows of a weight are solved for at once.
ROWS = 512


class Projections(nn.Module):
    """V, the places of S and its size by kind of layer, and the kind of each layer."""

    def __init__(self, kinds: dict[str, str]) -> None:
        super().__init__()
        self.kinds = kinds
        self.frod_V, self.frod_s_indices, self.frod_s_size = nn.Module(), nn.Module(), nn.Module()

    def of(self, path: str) -> tuple[Tensor, Tensor]:
        """V, and the places ``(2, k)``."""
        kind = self.kinds[path]
        return getattr(self.frod_V, kind), getattr(self.frod_s_indices, kind)


@register
@dataclass
class FrodConfig(Spread):
    """Singular values and a few rotations in a basis that layers share.

    Args:
        projection_prng_key: seed of the places of S.
        save_projection: write V and the places to the file; else they are found again from the base when the file is loaded.
        frod_dropout: share of inputs that the update leaves out in training, in [0, 1).
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_weights: start from the base; False adds normal numbers, for tests.
        sparse_rate: the share of S that is trained.
        regularization_alpha: what keeps the joint decomposition from inverting a singular matrix.
        progressbar, runtime_offload_base_weight: for HF's signature and files.

    Raises:
        ValueError: the rate is no number in [0, 1], or the dropout no share.
    """

    peft_type: str | None = PeftType.FROD
    projection_prng_key: int = field(default=0, metadata={"help": "Seed of the places of the sparse matrix."})
    save_projection: bool = field(default=True, metadata={"help": "Write the shared basis to the file."})
    frod_dropout: float = field(default=0.0, metadata={"help": "Share of inputs that the update leaves out in training.", "share": True})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})
    sparse_rate: float = field(default=0.01, metadata={"help": "The share of the sparse matrix that is trained."})
    regularization_alpha: float = field(default=1e-3, metadata={"help": "Regularisation of the joint decomposition."})
    progressbar: bool = field(default=True, metadata={"help": "For HF's files."})
    runtime_offload_base_weight: bool = field(default=False, metadata={"help": "For HF's files."})

    prefix: ClassVar[str] = "frod_"
    dropout_option: ClassVar[str] = "frod_dropout"
    paper: ClassVar[str] = "2512.23485"
    equation: ClassVar[str] = "U (diag(l) + S) V', where W = U diag(l0) V' and V is shared"
    count_formula: ClassVar[str] = "in + sparse_rate·in^2"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"sparse_rate": 0.2}, "dropout": {"sparse_rate": 0.1, "frod_dropout": 0.3}
    }  # fmt: skip
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.sparse_rate <= 1:
            raise ValueError(f"`sparse_rate` should be a number from 0 to 1, not {self.sparse_rate!r}.")

    def default_targets(self) -> dict[str, list[str] | str]:
        return super().default_targets() | {"phi": ["q_proj", "v_proj"]}

    @property
    def heavy(self) -> str:
        return (
            "U is as large as the weight, and is found with a decomposition in double precision of V, which is as wide and as high as the "
            "input (of a float32 weight of 4096 x 4096, which has 67 MB, 430 MB)"
        )

    # -- the bank --
    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        kinds, weights = _kinds(sites), dict[str, dict[int, list[Tensor]]]()
        for i, (path, site) in enumerate(sites.items()):
            w = site.read()[0].detach().float()
            w = w if w.is_meta else w.cpu()
            # A stack of weights is as many weights of one kind.
            weights.setdefault(kinds[path], {})[_number(path, i)] = list(w.reshape(-1, *w.shape[-2:]))
        bank, generator = Projections(kinds), torch.Generator().manual_seed(self.projection_prng_key)
        for kind, by_layer in sorted(weights.items()):
            v = _joint_basis([m for _, stack in sorted(by_layer.items()) for m in stack], self.regularization_alpha)
            self._keep(bank, kind, v.to(next(s for p, s in sites.items() if kinds[p] == kind).dtype), self._places(len(v), generator))
        return bank

    def shared_to_fold(self, sites: Mapping[str, Site]) -> nn.Module:
        if not self.save_projection:
            return self.shared(sites)
        kinds = _kinds(sites)
        first = {kind: next(s for p, s in sites.items() if kinds[p] == kind) for kind in sorted(set(kinds.values()))}
        bank = Projections(kinds)
        for kind, site in first.items():
            width = site.size("in")
            places = torch.empty(2, self._count(width), dtype=torch.int64)
            self._keep(bank, kind, torch.empty(width, width, dtype=site.dtype), places)
        return bank

    def _keep(self, bank: Projections, kind: str, v: Tensor, places: Tensor) -> None:
        found = {"frod_V": v, "frod_s_indices": places, "frod_s_size": torch.tensor([len(v), len(v)])}
        for name, tensor in found.items():
            getattr(bank, name).register_buffer(kind, tensor, persistent=self.save_projection and tensor.numel() > 0)

    def _count(self, width: int) -> int:
        beside = width * (width - 1)
        return min(max(int(width * width * self.sparse_rate), 1), beside) if self.sparse_rate > 0 else 0

    def _places(self, width: int, generator: torch.Generator) -> Tensor:
        """Places beside the diagonal ``(2, k)``, drawn as HF peft draws them."""
        count = self._count(width)
        if not count:
            return torch.empty(2, 0, dtype=torch.int64)
        drawn = torch.randperm(width * (width - 1), generator=generator)[:count]
        row, column = drawn // (width - 1), drawn % (width - 1)
        return torch.stack((row, column + (column >= row)))

    # -- the layers --
    def params(self, site: Site) -> dict[str, Param]:
        start, rotations = zeros if self.init_weights else normal(0.1), self._count(site.size("in"))
        return {
            "frod_lambda_l": Param(("in",), start),
            **({"frod_lambda_s_values": Param((rotations,), start)} if rotations else {}),
            "frod_U": Param(("out", "in"), zeros, trainable=False, persistent=False),
            "frod_l0": Param(("in",), zeros, trainable=False, persistent=False),
        }

    def derive(self, p: Adapter) -> None:
        """``U diag(l0) = W inv(V')``."""
        w, v = p.site.read()[0].detach(), p.shared.of(p.path)[0].detach()
        scaled = _scaled(v.to(p.site.device), p.path)
        squares = torch.zeros_like(p.frod_l0, dtype=torch.float64)
        for start in range(0, w.shape[-2], ROWS):
            some = scaled(w[..., start : start + ROWS, :].double())
            squares += some.square().sum(-2)
            p.frod_U[..., start : start + ROWS, :] = some
        length = squares.sqrt()
        p.frod_l0.copy_(length)
        p.frod_U.div_(length.clamp_min(1e-12).unsqueeze(-2).to(p.frod_U)).mul_((length > 1e-12).unsqueeze(-2))

    def start(self, p: Adapter) -> None:
        drawn = torch.empty(p.frod_lambda_l.shape)
        p.declared["frod_lambda_l"].init(drawn, generator_for(self.seed, p.path, "frod_lambda_l"))
        p.frod_lambda_l.data.copy_(drawn.to(p.frod_l0) + p.frod_l0)

    def values(self, p: Adapter) -> tuple[Tensor]:
        """What is added to the middle: along its diagonal, and then beside it."""
        change = full(p.frod_lambda_l) - full(p.frod_l0)
        return (torch.cat((change, full(p.frod_lambda_s_values)), -1) if "frod_lambda_s_values" in p.declared else change,)

    def _basis(self, p: Adapter) -> tuple[Tensor, Tensor, Tensor]:
        """U, V, and the flat places of the values."""
        v, places = p.shared.of(p.path)
        u = full(p.frod_U)
        return u, v.to(u), remembered(places, _with_diagonal, len(v))

    def spread(self, p: Adapter, *values: Tensor) -> Tensor:
        u, v, places = self._basis(p)
        return u @ scattered(values[0], places, (len(v), len(v))) @ v.mT

    def delta(self, p: Adapter) -> Tensor:
        return super().delta(p) if p.site.batch else self._spread_sparsely(p, *map(full, self.values(p)))

    def delta_apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def _spread_sparsely(self, p: Adapter, values: Tensor) -> Tensor:
        """The same for a single matrix, with no dense middle."""
        u, v, places = self._basis(p)
        return u @ times_sparse(values, places, v.t())

    def gather(self, p: Adapter, g: Tensor, x: Tensor, *values: Tensor) -> tuple[Tensor]:
        """Entries of ``U' g' x V``, from whichever side is shorter."""
        u, v, places = self._basis(p)
        return (sampled(x.t() @ g @ u, v, places) if len(u) < len(g) else sampled(g @ u, x @ v, places),)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        values = self.values(p)
        if not self._takes_kernel(inner, x, values):
            return super().around(p, inner, x)
        drops = self.dropout and p.training
        spread = partial(self._spread_sparsely, p)
        if inner.dense is not None and not drops and torch.is_grad_enabled() and inner.dense[0].dtype == x.dtype == values[0].dtype:
            out, inp = inner.dense[0].shape
            rows = x.numel() // inp
            if 2 * rows * inp < out * (2 * inp + rows) and rows <= out and _rebuilds(p, inner.dense[0]):
                u, v, places = self._basis(p)
                return linear_plus_rebased(x, *inner.dense, u, v, p.frod_l0, places, p.strength, spread, *values)
        return self.with_spread(p, inner, x, spread, partial(self.gather, p))

    # -- files: without rotations HF peft writes empty tensors --
    def as_read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return {k: t for k, t in tensors.items() if t.numel()}


def _with_diagonal(places: Tensor, width: int) -> Tensor:
    """Flat places of the diagonal, and of the rows and columns ``(2, k)``."""
    return torch.cat((torch.arange(width, device=places.device) * (width + 1), places[0] * width + places[1]))


# Whether a basis gives the weight that it was made of, and of which weight in which state that is known.
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()


@torch.no_grad()
def _rebuilds(p: Adapter, w: Tensor) -> bool:
    """Whether ``U diag(l0) V'`` is the weight, as far as its precision goes: V may be singular, or the weight another by now."""
    found = _known.get(p.frod_U)
    if found is None or found[0]() is not w or found[1] != w._version:
        off = (p.frod_U * p.frod_l0) @ p.shared.of(p.path)[0].to(w).t() - w
        found = _known[p.frod_U] = ref(w), w._version, bool(off.abs().max() <= 100 * torch.finfo(w.dtype).eps * w.abs().max())
    return found[2]


def _scaled(v: Tensor, path: str) -> Callable[[Tensor], Tensor]:
    """What makes ``W inv(V')`` of rows of W, in double precision. The decomposition of V takes the place of its copy."""
    turned = v.to(torch.float64, copy=True).mT
    pivots = torch.empty(0, dtype=torch.int32, device=v.device)
    try:
        torch.linalg.lu_factor(turned, out=(turned, pivots))
    except RuntimeError:
        warnings.warn(f"{path!r}: the shared basis is singular; the update acts in the space that it spans.", stacklevel=3)
        inverse = torch.linalg.pinv(v.double(), rtol=1e-6).mT
        return lambda rows: rows @ inverse
    return lambda rows: torch.linalg.lu_solve(turned, pivots, rows, left=False)


def _kinds(sites: Mapping[str, Site]) -> dict[str, str]:
    """The kind of each layer. Inputs of another width make another kind."""
    widths: dict[str, int] = {}
    kinds: dict[str, str] = {}
    for path, site in sites.items():
        kind, width = _kind(path), site.size("in")
        kinds[path] = kind if widths.setdefault(kind, width) == width else f"{kind}_{width}"
    return kinds


def _kind(path: str) -> str:
    """What HF peft calls the layers that share a basis: the last two parts of their name."""
    parts = path.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-2:] == ["output", "dense"] and parts[-3:-2] == ["attention"]:
        return "attention_output"
    return "_".join(parts[-2:])


def _number(path: str, otherwise: int) -> int:
    """The number of a layer's block, by which its weight is sorted. Of two with the same, the later one counts, as in HF peft."""
    parts = path.split(".")
    if "layers" in parts[:-1] and (after := parts[parts.index("layers") + 1]).isdigit():
        return int(after)
    return next((int(part) for part in parts if part.isdigit()), otherwise)


def _joint_basis(matrices: Sequence[Tensor], alpha: float) -> Tensor:
    """A basis of the rows of all matrices in which their Gram matrices are as near to diagonal as one basis can make them: the
    higher-order generalised singular value decomposition."""
    stacked = torch.cat(list(matrices))
    if len(stacked) < stacked.shape[1]:
        return torch.linalg.svd(stacked, full_matrices=True)[2].mT
    q, r = torch.linalg.qr(stacked)
    eye = torch.eye(len(r), device=r.device)
    mean = torch.zeros_like(r)
    for part in q.split([len(m) for m in matrices]):
        mean += torch.linalg.inv(part.mT @ part + alpha * eye)
    return r.mT @ torch.linalg.eigh(mean / len(matrices))[1]
