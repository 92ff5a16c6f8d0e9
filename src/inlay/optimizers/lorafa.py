"""LoRA-FA: A is frozen, and B follows the gradient of the whole weight as nearly as it can (Zhang et al. 2023, arXiv 2308.03303)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import Optimizer

from ..core.config import PeftConfig
from .factors import factor_pairs


class LoraFAOptimizer(Optimizer):
    """AdamW, whose gradient of a B that is paired with an A is ``g (A A')^-1 / s^2``.

    Args:
        params: groups with ``names`` and ``scaling_factors`` beside their ``params``; a name with ``lora_B`` is paired with the
            one that has ``lora_A`` in its place.
        lr: the learning rate.
        betas: of the moving averages of the gradient and of its square.
        eps: added to the root of the latter.
        weight_decay: share of the rate by which parameters shrink in each step.
        correct_bias: make up for moving averages that start from zero.
        pairs: A and the scaling by B, in place of names.

    Raises:
        ValueError: a number is out of its range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        *,
        pairs: dict[Parameter, tuple[Parameter, float]] | None = None,
    ) -> None:
        if lr < 0 or eps < 0:
            raise ValueError(f"`lr` and `eps` cannot be negative: {lr!r}, {eps!r}.")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"`betas` lie in [0, 1), and {betas!r} do not.")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "correct_bias": correct_bias}
        super().__init__(params, defaults)
        self.pairs = pairs if pairs is not None else {b: pair for g in self.param_groups for b, pair in _by_name(g).items()}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step.

        Args:
            closure: computes the loss once more.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for q in group["params"]:
                if q.grad is None:
                    continue
                pair = self.pairs.get(q)
                self._adam(q, q.grad if pair is None else projected(q.grad, *pair), group)
        return loss

    def _adam(self, q: Tensor, g: Tensor, group: dict[str, Any]) -> None:
        state, (beta1, beta2), rate = self.state[q], group["betas"], group["lr"]
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(q), "exp_avg_sq": torch.zeros_like(q)}
        state["step"] += 1
        mean, square = state["exp_avg"], state["exp_avg_sq"]
        mean.mul_(beta1).add_(g, alpha=1 - beta1)
        square.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        if group["correct_bias"]:
            rate *= math.sqrt(1 - beta2 ** state["step"]) / (1 - beta1 ** state["step"])
        q.addcdiv_(mean, square.sqrt().add_(group["eps"]), value=-rate)
        if group["weight_decay"] > 0:
            q.add_(q, alpha=-group["lr"] * group["weight_decay"])


def projected(g: Tensor, a: Tensor, scaling: float) -> Tensor:
    """``g (A A')^-1 / s^2`` in full precision: the step of B whose ``s B A`` is nearest to the gradient of the weight."""
    precise = torch.promote_types(a.dtype, torch.float32)
    a = a.to(precise)
    inverse = torch.linalg.pinv(a @ a.mT + 1e-8 * torch.eye(a.shape[-2], dtype=precise, device=a.device), hermitian=True)
    return (g.to(precise) @ inverse / scaling**2).to(g.dtype)


def _by_name(group: dict[str, Any]) -> dict[Parameter, tuple[Parameter, float]]:
    names = group.get("names", ())
    named = dict(zip(names, group["params"], strict=False))
    scales = group.get("scaling_factors") or [group.get("scaling_factor")] * len(named)
    found = {}
    for (name, b), scaling in zip(named.items(), scales, strict=False):
        a = named.get(name.replace("lora_B", "lora_A")) if "lora_B" in name else None
        if a is not None and scaling is not None and b.ndim > 1:
            found[b] = a, scaling
    return found


def create_lorafa_optimizer(
    model: nn.Module, r: int, lora_alpha: int, lr: float, weight_decay: float = 0.0, use_rslora: bool | None = None
) -> Optimizer:
    """Freeze A of all pairs of factors, and make the optimiser for B and whatever else is trained.

    Args:
        model: with adapters.
        r, lora_alpha: for HF's signature; each layer knows its scaling.
        lr: the learning rate.
        weight_decay: share of the rate by which parameters shrink in each step.
        use_rslora: deprecated; must agree with the adapters' configuration.

    Raises:
        ValueError: no method here has two factors that are trained as they are, an A is zero (as that of an embedding at the
            start), or ``use_rslora`` differs from the configuration.
    """
    if use_rslora is not None:
        configs: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
        differ = [n for n in model.active_adapters if bool(getattr(configs[n], "use_rslora", False)) != use_rslora]  # type: ignore[union-attr]
        if differ:
            raise ValueError(f"`use_rslora={use_rslora}` is not what {differ} are configured with; set it in their LoraConfig alone.")
        warnings.warn("`use_rslora` is deprecated here; the configuration says it.", FutureWarning, stacklevel=2)
    pairs = factor_pairs(model, "LoRA-FA")
    for pair in pairs:
        if not pair.a.any():
            raise ValueError(
                f"LoRA-FA freezes A, and that of {pair.adapter.path!r} is zero, so that nothing could be learned there. Leave the "
                "module out, or start it otherwise (`init_lora_weights`)."
            )
        pair.a.requires_grad_(False)
    scales = {id(q): pair.scaling for pair in pairs for q in (pair.a, pair.b)}
    names, params = zip(*model.named_parameters(), strict=True)
    group = {"params": list(params), "names": list(names), "scaling_factors": [scales.get(id(q)) for q in params]}
    by_b = {pair.b: (pair.a, pair.scaling) for pair in pairs}
    return LoraFAOptimizer([group], lr=lr, weight_decay=weight_decay, pairs=by_b)
