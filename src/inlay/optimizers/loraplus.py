"""LoRA+: the factor on the output side learns faster than the one on the input side (Hayou et al. 2024, arXiv 2402.12354)."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import Optimizer

from ..core.adapter import Adapter
from ..core.inlaid import places
from ..core.site import Embedding
from ..core.targets import bare_model

_EIGHT_BITS = ("Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit")


def create_loraplus_optimizer(
    model: nn.Module, optimizer_cls: type[Optimizer], *, lr: float, loraplus_lr_ratio: float, **kwargs: Any
) -> Optimizer:
    """An optimiser with a rate of its own for what is on the output side: B of a pair of factors, and vectors.

    Args:
        model: with adapters.
        optimizer_cls: any class of optimiser.
        lr: the rate of everything else.
        loraplus_lr_ratio: how many times that the output side's rate is; 1 or more.
        kwargs: for the optimiser; and ``loraplus_weight_decay`` (0), ``loraplus_lr_embedding`` (1e-6), the rate of adapters on
            embeddings.

    Returns:
        The optimiser with four groups: inputs, embeddings, outputs, and vectors of biases and norms, which do not decay.

    Raises:
        ValueError: nothing of the adapters is on the output side.
    """
    decay, embedding_lr = kwargs.pop("loraplus_weight_decay", 0.0), kwargs.pop("loraplus_lr_embedding", 1e-6)
    known = {id(q): (p, n) for place in places(bare_model(model)) for p in place.adapters.values() for n, q in p.named_parameters()}
    groups: dict[str, list[nn.Parameter]] = {"inputs": [], "embeddings": [], "outputs": [], "plain": []}
    of_adapters = 0
    for name, q in model.named_parameters():
        if not q.requires_grad:
            continue
        p, own = known.get(id(q), (None, name))
        ours = isinstance(p, Adapter)
        if ours and isinstance(p.site, Embedding) and q.ndim > 1:
            group = "embeddings"
        elif q.ndim == 1 or (ours and _is_output_side(p, own)):
            group = "plain" if "bias" in name or (not ours and _is_norm(model, name)) else "outputs"
            of_adapters += ours
        else:
            group = "inputs"
        groups[group].append(q)
    if not of_adapters and not groups["embeddings"]:
        raise ValueError("LoRA+ gives the factor on the output side a rate of its own, and none of these adapters has one.")
    rates = {"inputs": lr, "embeddings": embedding_lr, "outputs": lr * loraplus_lr_ratio, "plain": lr * loraplus_lr_ratio}
    made = [{"params": found, "weight_decay": 0.0 if g == "plain" else decay, "lr": rates[g]} for g, found in groups.items()]
    if optimizer_cls.__name__ in _EIGHT_BITS:
        # An embedding's statistics need their digits.
        from bitsandbytes.optim import GlobalOptimManager  # type: ignore[import-not-found]

        for module in model.modules():
            if isinstance(module, nn.Embedding):
                GlobalOptimManager.get_instance().register_module_override(module, "weight", {"optim_bits": 32})
    return optimizer_cls(made, **kwargs | {"lr": lr})  # type: ignore[arg-type]


def _is_output_side(p: Adapter, name: str) -> bool:
    """Whether a parameter is a factor ``(out, r)``."""
    declared = p.declared.get(name)
    return declared is not None and len(declared.axes) == 2 and declared.axes[0] == "out" and declared.axes[1] != "in"


def _is_norm(model: nn.Module, name: str) -> bool:
    return isinstance(model.get_submodule(name.rpartition(".")[0]), nn.LayerNorm)
