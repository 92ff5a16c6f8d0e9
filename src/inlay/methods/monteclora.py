"""MonteCLoRA: LoRA whose A is drawn anew in each training step, about the one that is kept (Sengupta et al. 2024, arXiv 2411.04358).

Noise is a mixture of n samples ``z_k L`` with weights w on the simplex, ``L L'`` being a diagonal drawn from a Wishart
distribution and w from a Dirichlet distribution by its Laplace approximation. The mixture of n normal samples is one normal
sample of standard deviation ``|w| L``, so that one is drawn in their place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.method import full
from ..core.param import Param, constant
from ..core.site import Site
from .lora import LoraConfig

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


@dataclass
class MontecloraConfig:
    """How A is drawn.

    Args:
        num_samples: samples in the mixture.
        use_entropy: add ``|w|^2`` to the loss, which keeps the mixture from being one sample.
        dirichlet_prior: concentration of the prior of w.
        sample_scaler: the size of the noise.
        kl_loss_weight: weight of the distance from the prior in the loss.
        buffer_size: for HF's files; what is drawn here is drawn when it is needed.

    Raises:
        ValueError: a number that must be positive is not.
    """

    num_samples: int = field(default=8, metadata={"help": "Samples in the mixture."})
    use_entropy: bool = field(default=False, metadata={"help": "Keep the mixture from being one sample."})
    dirichlet_prior: float = field(default=0.1, metadata={"help": "Concentration of the prior of the mixture's weights."})
    sample_scaler: float = field(default=1e-4, metadata={"help": "The size of the noise."})
    kl_loss_weight: float = field(default=1e-5, metadata={"help": "Weight of the distance from the prior in the loss."})
    buffer_size: int = field(default=150, metadata={"help": "For HF's files."})

    def __post_init__(self) -> None:
        for name in ("num_samples", "dirichlet_prior", "buffer_size"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, not {getattr(self, name)!r}.")


class MontecloraTrainerMixin:
    """In front of a ``Trainer``: adds to the loss what MonteCLoRA has beside the task's.

    In training the model's own loss has it already, and nothing is added. A loss that the trainer computes from the logits
    (label smoothing, ``compute_loss_func``), and that of an evaluation, get it here.
    """

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
        found = super().compute_loss(model, inputs, return_outputs=return_outputs, **kwargs)  # type: ignore[misc]
        loss, outputs = found if return_outputs else (found, None)
        tuners: list[Any] = [m for m in model.modules() if hasattr(type(m), "_get_monteclora_loss")]
        loss = loss + sum(m._get_monteclora_loss() for m in tuners) / max(len(tuners), 1)
        return (loss, outputs) if return_outputs else loss


def uniform(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.uniform_(generator=generator)


def eye(tensor: Tensor, _: torch.Generator) -> None:
    tensor.zero_().diagonal().fill_(1)


class Monteclora(LoraConfig):
    """LoRA with a ``monteclora_config``."""

    def params(self, site: Site) -> dict[str, Param]:
        declared, n = super().params(site), self.monteclora_config.num_samples
        r = declared[self.names(site)[0]].axes[0]

        def of_sampler(name: str, axes: tuple[str | int, ...], init: Any, trainable: bool = True) -> dict[str, Param]:
            key = f"lora_monteclora_sampler.{name}"
            return {name: Param(axes, init, key, trainable=trainable, batched=False)}

        return {
            **declared,
            **of_sampler("std_prior", (r,), uniform),
            **of_sampler("expert_weights_prior", (n,), uniform),
            # What HF peft drew last, which nobody reads again.
            **of_sampler("gaussian_var_prior", (r, r), eye, False),
            **of_sampler("expert_weights", (n,), constant(1 / n), False),
        }

    def _variance(self, p: Adapter) -> Tensor:
        """A draw of the variances ``(r,)``: a Wishart matrix has chi-squared numbers on its diagonal."""
        std = full(p.std_prior).exp()
        r = len(std)
        return (std.square() * torch.randn(r, r, device=std.device, dtype=std.dtype).square().sum(-1)).clamp_min(1e-3)

    def _mixture(self, p: Adapter) -> Tensor:
        """A draw of the weights ``(n,)``."""
        log = full(p.expert_weights_prior)
        n, inverse = len(log), (-log).exp().clamp_max(1e6)
        variance = (inverse * (1 - 2 / n) + inverse.sum() / n**2).clamp_min(1e-6) + 1e-6
        return torch.softmax(log - log.mean() + variance.sqrt() * torch.randn_like(log), -1)

    def _drawn(self, p: Adapter, a: Tensor) -> Tensor:
        """Noise of the shape of A ``(*batch, r, in)``."""
        std = self._mixture(p).norm() * self._variance(p).sqrt()
        return self.monteclora_config.sample_scaler * std.unsqueeze(-1) * torch.randn_like(full(a))

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        a, b = self.factors(p)
        return self.with_factors(p, inner, x, a + self._drawn(p, a).to(a.dtype) if p.training else a, b)

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        a, b = self.factors(p)
        return super().thinned(p, change + self.scaling * p.strength * (full(b) @ self._drawn(p, a)))

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        terms = [p.method._penalty(p) for p in adapters if isinstance(p.method, Monteclora)]
        return torch.stack([t.to(terms[0].device) for t in terms]).mean() if terms else None

    def _penalty(self, p: Adapter) -> Tensor:
        """How far the distribution is from its prior."""
        options = self.monteclora_config
        std, alpha = full(p.std_prior).exp(), full(p.expert_weights_prior).exp()
        n, r, drawn = len(alpha), len(std), self._variance(p)
        prior = torch.full_like(alpha, options.dirichlet_prior)
        dirichlet = (
            alpha.sum().lgamma() - prior.sum().lgamma() + (alpha.lgamma() - prior.lgamma()).sum()
            + ((alpha - prior) * (alpha.digamma() - alpha.sum().digamma())).sum()
        )  # fmt: skip
        wishart = 0.5 * r * (std.square() - 2 * std.log() - 1).sum()
        normal = 0.5 * n * (drawn - drawn.log() - 1).sum()
        term = options.kl_loss_weight * (dirichlet + wishart + normal)
        return term + self._mixture(p).square().sum() if options.use_entropy else term
