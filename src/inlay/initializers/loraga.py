"""LoRA-GA: start where the first step of full fine-tuning goes (Wang et al. 2024, arXiv 2407.05000).

The factors are singular vectors of the weight's gradient, other ones in A than in B. So the signs of the vectors, which are
anyone's choice, change the product, and the start has to be kept: it could not be found again.

A weight that is quantised or computed has no gradient of its own. That of a zero matrix that is added to it is the same; for a host
that reads its weight itself, a dense copy takes the weight's place meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.method import full
from ..core.param import generator_for
from .calibration import store, stored, targets
from .offset import unknown_start
from .started import no_factors
from .svd import approximate_singular_vectors, singular_vectors

if TYPE_CHECKING:
    from ..core.site import Site
    from .offset import Offset

DIRECTIONS = ("ArBr", "A2rBr", "ArB2r", "random")
SCALES = ("stable", "weight_svd", "gd_scale", "unit")


@dataclass
class LoraGAConfig:
    """Options of LoRA-GA.

    Args:
        direction: which of the first 2r singular vectors go where: ``"ArB2r"`` (A the first r, B the others), ``"A2rBr"`` (the other
            way round), ``"ArBr"`` (B the first, third, ..., A the second, fourth, ...), or ``"random"`` (r of them, the same in both).
        scale: ``"stable"`` (B by ``out ** 0.25 / sqrt(stable_gamma)``), ``"weight_svd"`` (B's first vector as long as the weight's
            largest singular value), ``"gd_scale"`` (both divided by LoRA's scaling), or ``"unit"``.
        stable_gamma: see ``scale``.

    Raises:
        ValueError: an option is unknown.
    """

    direction: str = field(default="ArB2r", metadata={"help": "ArBr, A2rBr, ArB2r or random."})
    scale: str = field(default="stable", metadata={"help": "stable, weight_svd, gd_scale or unit."})
    stable_gamma: int = field(default=16, metadata={"help": "The gamma of scale='stable'."})

    def __post_init__(self) -> None:
        for name, known in (("direction", DIRECTIONS), ("scale", SCALES)):
            if getattr(self, name) not in known:
                raise ValueError(f"`{name}`={getattr(self, name)!r} is not one of {', '.join(known)}.")


def attribute(name: str) -> str:
    """Where a host keeps the gradient of its weight until the adapter starts."""
    return "_peft_loraga_grad" if name == "weight" else f"_peft_loraga_grad_{name}"


def preprocess_loraga(model: nn.Module, lora_config: Any, train_step: Callable[[], object], cache_file: str | None = None) -> None:
    """Estimate the gradients of the weights that a configuration means, before `get_peft_model`.

    Args:
        model: the base.
        lora_config: with ``init_lora_weights="lora_ga"`` and a ``lora_ga_config``.
        train_step: runs the model forward and backward, on as many batches as the estimate is to have.
        cache_file: where to keep the gradients; read instead of computing them where it exists.

    Raises:
        ValueError: there is no ``lora_ga_config``, or a layer got no gradient.
    """
    if why := no_factors(type(lora_config)):
        raise ValueError(f"{why}.")
    if lora_config.lora_ga_config is None:
        raise ValueError(
            f"LoRA-GA needs {type(lora_config).__name__}({lora_config.init_option}='lora_ga', lora_ga_config=LoraGAConfig(...))."
        )
    sites = targets(model, lora_config)
    known = stored(cache_file, next(iter(sites.values())).device)
    if known is None:
        known = {f"{name}._peft_loraga_grad": g for name, g in _gradients(model, sites, train_step).items()}
        store(cache_file, known)
    for name, site in sites.items():
        setattr(site.module, attribute(site.name), known[f"{name}._peft_loraga_grad"])


def _gradients(model: nn.Module, sites: dict[str, Site], train_step: Callable[[], object]) -> dict[str, Tensor]:
    """The mean gradient of each weight over the backward passes of ``train_step``. The model is as it was before."""
    held = {name: _leaf(site) for name, site in sites.items()}
    before = [(q, q.requires_grad, q.grad) for q in model.parameters()]
    counts = dict.fromkeys(sites, 0)

    def counting(name: str) -> Callable[[Tensor], None]:
        def count(_: Tensor) -> None:
            counts[name] += 1

        return count

    training = model.training
    try:
        for q, _, _ in before:
            q.requires_grad_(False)
            q.grad = None
        handles = [q.requires_grad_(True).register_post_accumulate_grad_hook(counting(name)) for name, q in held.items()]
        model.train()
        with torch.enable_grad(), _in_place([(site, held[name]) for name, site in sites.items() if not _has_gradient(site)]):
            train_step()
        for handle in handles:
            handle.remove()
        silent = next((name for name, n in counts.items() if not n), None)
        if silent is not None:
            raise ValueError(f"{silent!r} got no gradient while `train_step` ran; call `loss.backward()` in it.")
        return {name: q.grad.detach() / counts[name] for name, q in held.items()}  # type: ignore[union-attr]
    finally:
        model.train(training)
        for q, required, grad in before:
            q.requires_grad_(required)
            q.grad = grad


def _has_gradient(site: Site) -> bool:
    """Whether the weight itself takes part in the backward pass, as a parameter."""
    return site.store.dense and site.name in site.module._parameters


def _leaf(site: Site) -> Tensor:
    """What gets the gradient of the weight, in its raw shape."""
    if _has_gradient(site):
        return site.module._parameters[site.name]
    return (
        nn.Parameter(full(site.store.read(site.module, site.name)).clone())
        if site.reads
        else torch.zeros(site.raw_shape, device=site.device)
    )


@contextmanager
def _in_place(leaves: Sequence[tuple[Site, Tensor]]) -> Iterator[None]:
    """Layers that add what a leaf makes of their input, or read it in place of their weight."""

    def adding(site: Site, leaf: Tensor) -> Callable[..., Tensor]:
        def added(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
            x = args[0] if args else next(iter(kwargs.values()))
            x = x.to(leaf.dtype) if x.is_floating_point() else x
            return y + site.bound(args[1:], kwargs).apply(x, site.matrix(leaf)).to(y.dtype)

        return added

    with ExitStack() as stack:
        for site, leaf in leaves:
            if site.reads:
                parameters = site.module._parameters
                stack.callback(parameters.__setitem__, site.name, parameters[site.name])
                parameters[site.name] = leaf
            else:
                stack.callback(site.module.register_forward_hook(adding(site, leaf), with_kwargs=True).remove)
        yield


def loraga_start(sites: Sequence[Site], method: Offset, paths: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Factors from the gradients that `preprocess_loraga` left on the layers, which are taken away there.

    Raises:
        ValueError: there are none, and how to come by them; or there are less than 2r singular vectors.
    """
    site = sites[0]
    for one, path in zip(sites, paths, strict=True):
        if attribute(one.name) not in vars(one.module):
            raise ValueError(unknown_start("lora_ga", path))
    options: LoraGAConfig = method.lora_ga_config or LoraGAConfig()
    gradients = torch.stack([one.matrix(vars(one.module).pop(attribute(one.name))) for one in sites])
    r = method.rank_at(site)
    if 2 * r > min(site.shape[-2:]):
        raise ValueError(
            f"LoRA-GA takes 2 r = {2 * r} directions, and the gradient of {paths[0]!r} has {min(site.shape[-2:])}: choose a smaller r."
        )
    u, s, v = leading(gradients, 2 * r)
    in_a, in_b = _chosen(options.direction, r)
    a, b = v.mT[..., in_a, :], u[..., in_b] * s[..., in_b].unsqueeze(-2)
    if options.scale == "stable":
        b = b * (site.size("out") ** 0.25 / options.stable_gamma**0.5)
    elif options.scale == "weight_svd":
        w = torch.stack([one.read()[0].detach() for one in sites])
        longest = s[..., in_b][..., :1].unsqueeze(-1)
        b = torch.where(longest > 0, b * (torch.linalg.matrix_norm(w.to(b), 2)[..., None, None] / longest), b)
    elif options.scale == "gd_scale":
        a, b = a / method.scaling, b / method.scaling
    return a, b


def leading(gradients: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The ``k`` leading singular values and vectors of a few batches' gradients. These are estimates themselves, so where there are many
    more directions than are looked for, so are their vectors."""
    if 2 * k >= min(gradients.shape[-2:]):
        return singular_vectors(gradients, k)
    return approximate_singular_vectors(gradients, k, iterations=4, oversampling=k)


def _chosen(direction: str, r: int) -> tuple[Tensor, Tensor]:
    """Which singular vectors are A's and which B's."""
    every = torch.arange(2 * r)
    if direction == "ArBr":
        return every[1::2], every[::2]
    if direction == "A2rBr":
        return every[r:], every[:r]
    if direction == "ArB2r":
        return every[:r], every[r:]
    drawn = torch.randperm(2 * r, generator=generator_for(0, "lora_ga"))[:r]
    return drawn, drawn
