"""CorDA: start from the weight's directions that matter, or do not, on given inputs (Yang et al. 2024, arXiv 2406.05223).

With ``C`` the covariance of a layer's inputs and ``U S V'`` the decomposition of ``W C``, the weight is ``U S V' C^-1``. The r
components with the largest values are adapted ("instruction-previewed", for the task of these inputs), or those with the smallest
("knowledge-preserved": the inputs stand for what is to be kept).

The inputs of a convolution are patches, in each group apart, those of a stack of experts the rows that each of them is given, and those
of an embedding one-hot: ``C`` is a diagonal then, of how often each token is met.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from ..core.site import Embedding, Stack
from .calibration import Progress, SameInput, is_multiplied, multiplied, store, stored, targets, watching
from .offset import unknown_start
from .stacks import each_expert
from .started import no_factors
from .svd import precise, singular_vectors
from .together import Together, weights

if TYPE_CHECKING:
    from ..core.site import Site
    from .offset import Offset


@dataclass
class CordaConfig:
    """Options of CorDA.

    Args:
        cache_file: where to keep the decompositions; read instead of computing them where it exists.
        covariance_file: the same for the covariances, which serve any rank and either mode.
        corda_method: ``"ipm"`` (instruction-previewed) or ``"kpm"`` (knowledge-preserved).
        verbose: for HF's signature; `preprocess_corda` takes a function to report progress to.
        use_float16_for_covariance: collect the covariances in the dtype of the inputs.
        prune_temporary_fields: for HF's signature; nothing is left on the model.

    Raises:
        ValueError: the mode is unknown.
    """

    cache_file: str | None = field(default=None, metadata={"help": "File of the decompositions."})
    covariance_file: str | None = field(default=None, metadata={"help": "File of the covariances."})
    corda_method: str = field(default="ipm", metadata={"help": "ipm or kpm."})
    verbose: bool = field(default=False, metadata={"help": "For HF's signature."})
    use_float16_for_covariance: bool = field(default=False, metadata={"help": "Collect in the dtype of the inputs."})
    prune_temporary_fields: bool = field(default=True, metadata={"help": "For HF's signature."})

    def __post_init__(self) -> None:
        if self.corda_method not in ("ipm", "kpm"):
            raise ValueError(f"`corda_method` is 'ipm' or 'kpm', not {self.corda_method!r}.")


@dataclass
class CordaEigens:
    """The components that a layer is to adapt: ``S_WC (*batch, r)``, ``U_WC (*batch, out, r)``, and ``V_WC (*batch, in, r)`` behind
    ``C^-1``."""

    S_WC: Tensor
    U_WC: Tensor
    V_WC: Tensor


@torch.no_grad()
def preprocess_corda(
    model: nn.Module,
    lora_config: Any,
    run_model: Callable[[], object] | None = None,
    hooked_model: nn.Module | None = None,
    *,
    progress: Progress | None = None,
) -> None:
    """Decompose the weights of the layers that a configuration means, before `get_peft_model`.

    Args:
        model: the base.
        lora_config: with ``init_lora_weights="corda"``.
        run_model: runs the model on the inputs; None where a file of ``corda_config`` has the results.
        hooked_model: the model that ``run_model`` runs, where it is another one with the same names.
        progress: called with the number of layers that are done, and of all.

    Raises:
        ValueError: nothing was run, or a layer met no input, or one that is not finite, or its inputs are not to be seen.
    """
    if why := no_factors(type(lora_config)):
        raise ValueError(f"{why}.")
    options: CordaConfig = lora_config.corda_config or CordaConfig()
    sites = targets(model, lora_config)
    for name, site in sites.items():
        if not (is_multiplied(site) or isinstance(site, (Embedding, Stack))):
            raise ValueError(
                f"CorDA needs the covariance of what a layer's matrix multiplies, and {name!r} is read by its host, a "
                f"{type(site.module).__name__}, so that cannot be seen; take it out of the targets."
            )
    ranks = {name: lora_config.at(name).rank_at(site) for name, site in sites.items()}
    device = next(iter(sites.values())).device
    known = stored(options.cache_file, device)
    if known is None:
        covariances = stored(options.covariance_file, device)
        if covariances is None:
            if run_model is None:
                raise ValueError("`run_model` is needed: neither `covariance_file` nor `cache_file` of `corda_config` is there yet.")
            watched = sites if hooked_model is None else {n: s for n, s in targets(hooked_model, lora_config).items() if n in sites}
            covariances = _covariances(hooked_model or model, watched, run_model, options.use_float16_for_covariance)
            store(options.covariance_file, covariances)
        known = _decomposed(sites, covariances, ranks, options.corda_method == "kpm", progress)
        store(options.cache_file, known)
    for name, site in sites.items():
        found = CordaEigens(**{leaf: known[f"{name}.eigens.{leaf}"] for leaf in ("S_WC", "U_WC", "V_WC")})
        setattr(site.module, attribute(site.name), found)


def attribute(name: str) -> str:
    """Where a host keeps what was found for its weight until the adapter starts."""
    return "eigens" if name == "weight" else f"eigens_{name}"


def _covariances(model: nn.Module, sites: dict[str, Site], run_model: Callable[[], object], keep_dtype: bool) -> dict[str, Tensor]:
    """The mean over calls of ``x' x``, with ``x`` scaled by its largest entry: ``(*batch, in, in)``; of an embedding its diagonal."""
    sums: dict[str, Tensor] = {}
    counts: dict[str, Tensor] = {}
    same = SameInput()

    def squared(x: Tensor) -> Tensor:
        x = x.detach()
        x = x if keep_dtype else x.float()
        x = x / x.max().abs()
        found = x.mT @ x
        if not found.isfinite().all():
            raise ValueError("The inputs of `run_model` lead to values that are not finite (or a layer's input is nowhere positive).")
        return found

    def see(name: str, args: tuple[Any, ...]) -> None:
        site, x = sites[name], args[0]
        if isinstance(site, Embedding):
            add(name, torch.bincount(x.reshape(-1), minlength=site.size("in")).float())
        elif acts_on_last_axis(site):
            add(name, same(x, lambda: squared(multiplied(site, x))))
        else:
            add(name, squared(multiplied(site, x)))

    def add(name: str, found: Tensor, expert: int | None = None) -> None:
        if name not in sums:
            batch = () if expert is None else sites[name].batch
            sums[name], counts[name] = found.new_zeros(*batch, *found.shape), found.new_zeros(*batch, *(1 for _ in found.shape))
        at = slice(None) if expert is None else expert
        sums[name][at] += found
        counts[name][at] += 1

    training = model.training
    model.eval()
    try:
        with ExitStack() as stack:
            stacks = {name: site for name, site in sites.items() if isinstance(site, Stack)}
            for name, site in stacks.items():
                stack.enter_context(each_expert(site, lambda i, x, name=name: add(name, squared(x.reshape(-1, x.shape[-1])), i)))
            stack.enter_context(watching({name: site.module for name, site in sites.items() if name not in stacks}, see))
            run_model()
    finally:
        model.train(training)
    return {name: total / counts[name].clamp_min(1) for name, total in sums.items()}


def _decomposed(
    sites: Mapping[str, Site], covariances: Mapping[str, Tensor], ranks: Mapping[str, int], smallest: bool, progress: Progress | None
) -> dict[str, Tensor]:
    """What `CordaEigens` holds, by the layers' names; layers of one shape are decomposed together."""
    absent = next((name for name in sites if name not in covariances), None)
    if absent is not None:
        raise ValueError(f"{absent!r} met no input while `run_model` ran; run the whole model, or take the layer out of the targets.")
    components_of = _Components(sites, covariances, ranks, smallest, progress)
    found: dict[str, Tensor] = {}
    for name in sites:
        for leaf, t in zip(("U", "S", "V"), components_of.take(name), strict=True):
            # Not a view, which would go to a file with all others of its stack.
            found[f"{name}.eigens.{leaf}_WC"] = t.float().clone(memory_format=torch.contiguous_format)
    return found


class _Components(Together):
    """The components of layers, decomposed together."""

    def __init__(
        self,
        sites: Mapping[str, Site],
        covariances: Mapping[str, Tensor],
        ranks: Mapping[str, int],
        smallest: bool,
        progress: Progress | None,
    ) -> None:
        super().__init__(sites, progress)
        self.covariances, self.ranks, self.smallest = covariances, ranks, smallest

    def kind(self, path: str) -> object:
        return super().kind(path), self.covariances[path].shape, self.ranks[path]

    def numbers(self, path: str) -> int:
        return max(super().numbers(path), self.covariances[path].numel())

    def find(self, paths: Sequence[str]) -> tuple[Tensor, ...]:
        sites = [self.sites[path] for path in paths]
        seen = torch.stack([self.covariances[path].to(sites[0].device) for path in paths])
        return components(weights(sites), seen, self.ranks[paths[0]], smallest=self.smallest)


def components(w: Tensor, covariance: Tensor, r: int, *, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(*batch, out, r)``, S ``(*batch, r)`` of ``W C``, and ``C^-1 V (*batch, in, r)``, with ``C`` damped until it can be inverted.

    Args:
        w: ``(*batch, out, in)``.
        covariance: ``(*batch, in, in)``, or of all a diagonal ``(*batch, in)``.
    """
    w, covariance, r, damp = precise(w), precise(covariance), min(r, *w.shape[-2:]), 0.01
    if covariance.ndim < w.ndim:
        damped = covariance + damp * covariance.mean(-1, keepdim=True)
        u, s, v = singular_vectors(w * damped.unsqueeze(-2), r, smallest=smallest)
        return u, s, v / damped.unsqueeze(-1)
    mean = covariance.diagonal(dim1=-2, dim2=-1).mean(-1)
    # An expert that met no input counts all directions alike.
    added = (damp * mean).where(mean > 0, 1)[..., None, None]
    while True:
        damped = covariance + added * torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            break
        # Of each matrix as much as it takes, whatever is decomposed along with it.
        added = torch.where(failed[..., None, None] != 0, 2 * added, added)
    u, s, v = singular_vectors(w @ damped, r, smallest=smallest)
    return u, s, torch.cholesky_solve(v, root)


def corda_start(sites: Sequence[Site], method: Offset, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Factors of the components that `preprocess_corda` left on the layers, which are taken away there.

    Raises:
        ValueError: there are none, and how to come by them.
    """
    for site, path in zip(sites, paths, strict=True):
        if not hasattr(site.module, attribute(site.name)):
            raise ValueError(unknown_start("corda", path))
    found = [vars(site.module).pop(attribute(site.name)) for site in sites]
    s, u, v = (torch.stack([getattr(e, leaf) for e in found]) for leaf in ("S_WC", "U_WC", "V_WC"))
    root = (s / method.scaling).sqrt()
    return root.unsqueeze(-1) * v.mT, u * root.unsqueeze(-2)
