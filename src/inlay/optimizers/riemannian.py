"""Riemannian preconditioning: the factors take steps that do not depend on how their product is split (arXiv 2402.02347)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.site import Embedding
from .factors import Pair, factor_pairs


def create_riemannian_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, reg: float = 1e-2, **kwargs: Any
) -> Optimizer:
    """An optimiser before whose steps ``g_A`` becomes ``(B' B + reg)^-1 g_A`` and ``g_B`` becomes ``g_B (A A' + reg)^-1``.

    As in HF peft, the factors of embeddings and of convolutions, and all that is no factor, are trained as they are.

    Args:
        model: with adapters.
        optimizer_cls: any class of optimiser whose step needs no closure.
        lr: the learning rate.
        reg: what is added to the diagonals before they are inverted.
        kwargs: for the optimiser.

    Raises:
        TypeError: ``optimizer_cls`` is no class of optimiser.
        ValueError: it needs a closure, or no method here has two factors that are trained as they are.
    """
    if not (isinstance(optimizer_cls, type) and issubclass(optimizer_cls, Optimizer)):
        raise TypeError(f"`optimizer_cls` is a subclass of torch.optim.Optimizer, and {optimizer_cls!r} is none.")
    closure = inspect.signature(optimizer_cls.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise ValueError(f"{optimizer_cls.__name__} requires a closure and computes gradients in its step, past the preconditioner.")
    pairs = [pair for pair in factor_pairs(model, "Riemannian preconditioning") if _preconditioned(pair)]
    if not pairs:
        raise ValueError("No pair of factors of a linear layer is trained here; those of embeddings and convolutions are left as they are.")
    optimizer = optimizer_cls([q for q in model.parameters() if q.requires_grad], lr=lr, **kwargs)  # type: ignore[call-arg]

    # The optimiser itself is the first of the arguments of its step.
    def precondition(_: Optimizer, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        if any(value is not None for value in (*args[1:], *given.values())):
            raise ValueError("A closure would compute the gradients once more, past the preconditioner; call `step()` without one.")
        for pair in pairs:
            _precondition(pair, reg)

    optimizer.register_step_pre_hook(precondition)
    return optimizer


def _preconditioned(pair: Pair) -> bool:
    site = pair.adapter.site
    return pair.a.requires_grad and pair.b.requires_grad and not isinstance(site, Embedding) and not site.kernel


@torch.no_grad()
def _precondition(pair: Pair, reg: float) -> None:
    precise = torch.promote_types(pair.a.dtype, torch.float32)
    a, b = pair.a.to(precise), pair.b.to(precise)
    if pair.a.grad is not None:
        pair.a.grad.copy_(_damped_inverse(b.mT @ b, reg) @ pair.a.grad.to(precise))
    if pair.b.grad is not None:
        pair.b.grad.copy_(pair.b.grad.to(precise) @ _damped_inverse(a @ a.mT, reg))


def _damped_inverse(gram: Tensor, reg: float) -> Tensor:
    return torch.linalg.pinv(gram + reg * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device), hermitian=True)
