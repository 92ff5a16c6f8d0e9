"""CorDA: start from the weight's directions that matter, or do not, on given inputs (Yang et al. 2024, arXiv 2406.05223).

With ``C`` the covariance of a layer's inputs and ``U S V'`` the decomposition of ``W C``, the weight is ``U S V' C^-1``. The r
components with the largest values are adapted ("instruction-previewed", for the task of these inputs), or those with the smallest
("knowledge-preserved": the inputs stand for what is to be kept).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.families import acts_on_last_axis
from .calibration import Progress, SameInput, store, stored, targets, watching
from .offset import unknown_start
from .svd import precise, singular_vectors

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
    """The components that a layer is to adapt: ``S_WC (r,)``, ``U_WC (out, r)``, and ``V_WC (in, r)`` behind ``C^-1``."""

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
        ValueError: nothing was run, a layer is not linear or met no input, or one that is not finite.
    """
    options: CordaConfig = lora_config.corda_config or CordaConfig()
    sites = targets(model, lora_config)
    for name, site in sites.items():
        if not acts_on_last_axis(site):
            raise ValueError(
                f"CorDA needs the covariance of what a linear layer multiplies, and {name!r} is none; take it out of the targets."
            )
    ranks = {name: lora_config.at(name).r for name in sites}
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
        known = {}
        for i, (name, site) in enumerate(sites.items(), 1):
            if name not in covariances:
                raise ValueError(f"{name!r} met no input while `run_model` ran; run the whole model, or take the layer out of the targets.")
            u, s, v = components(site.read()[0].detach(), covariances[name], ranks[name], smallest=options.corda_method == "kpm")
            for leaf, t in (("U", u), ("S", s), ("V", v)):
                known[f"{name}.eigens.{leaf}_WC"] = t.float().contiguous()
            if progress is not None:
                progress(i, len(sites))
        store(options.cache_file, known)
    for name, site in sites.items():
        site.module.eigens = CordaEigens(**{leaf: known[f"{name}.eigens.{leaf}"] for leaf in ("S_WC", "U_WC", "V_WC")})


def _covariances(model: nn.Module, sites: dict[str, Site], run_model: Callable[[], object], keep_dtype: bool) -> dict[str, Tensor]:
    """The mean over calls of ``x' x``, with ``x`` scaled by its largest entry."""
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(sites, 0)
    same = SameInput()

    def squared(x: Tensor) -> Tensor:
        x = x.detach().reshape(-1, x.shape[-1])
        x = x if keep_dtype else x.float()
        x = x / x.max().abs()
        found = x.mT @ x
        if not found.isfinite().all():
            raise ValueError("The inputs of `run_model` lead to values that are not finite (or a layer's input is nowhere positive).")
        return found

    def see(name: str, args: tuple[Any, ...]) -> None:
        found = same(args[0], lambda: squared(args[0]))
        sums[name] = found.clone() if name not in sums else sums[name].add_(found)
        counts[name] += 1

    training = model.training
    model.eval()
    try:
        with watching({name: site.module for name, site in sites.items()}, see):
            run_model()
    finally:
        model.train(training)
    return {name: total / counts[name] for name, total in sums.items()}


def components(w: Tensor, covariance: Tensor, r: int, *, smallest: bool) -> tuple[Tensor, Tensor, Tensor]:
    """U ``(out, r)``, S ``(r,)`` of ``W C``, and ``C^-1 V (in, r)``, with ``C`` damped until it can be inverted."""
    covariance = precise(covariance)
    damp, mean = 0.01, covariance.diagonal().mean()
    while True:
        damped = covariance + damp * mean * torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            break
        damp *= 2
    u, s, v = singular_vectors(precise(w) @ damped, min(r, *w.shape), smallest=smallest)
    return u, s, torch.cholesky_solve(v, root)


def corda_start(sites: Sequence[Site], method: Offset, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Factors of the components that `preprocess_corda` left on the layers, which are taken away there.

    Raises:
        ValueError: there are none, and how to come by them.
    """
    for site, path in zip(sites, paths, strict=True):
        if not hasattr(site.module, "eigens"):
            raise ValueError(unknown_start("corda", path))
    found = [vars(site.module).pop("eigens") for site in sites]
    s, u, v = (torch.stack([getattr(e, leaf) for e in found]) for leaf in ("S_WC", "U_WC", "V_WC"))
    root = (s / method.scaling).sqrt()
    return root.unsqueeze(-1) * v.mT, u * root.unsqueeze(-2)
