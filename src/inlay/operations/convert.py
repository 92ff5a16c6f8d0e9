"""An adapter of any method on weights as LoRA: exact where it is of low rank, else the nearest of a rank, with the error a layer."""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig, PeftType
from ..core.plan import Plan
from ..core.targets import bare_model, tied_paths
from ..formats.card import table, write_card
from ..formats.folder import write_adapter
from ..formats.slots import PREFIX, key_in_file, slots_of_parts
from ..methods.lora import LoraConfig
from .adapter_of import config_for, put
from .cutting import check_rank, cut
from .effects import Update, base_and_configs, effects
from .slicing import Sliced


@dataclass(frozen=True)
class Converted:
    """What became of one weight.

    Attributes:
        name: of the weight.
        rank: LoRA's, in each matrix of a stack.
        norm: of what the adapter adds.
        error: the norm of what LoRA lacks of it, over that norm.
    """

    name: str
    rank: int
    norm: float
    error: float


@dataclass
class Conversion:
    """LoRA in place of an adapter: its configuration, its tensors by their keys in a file, and what became of each weight."""

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: list[Converted] = field(default_factory=list)


@torch.no_grad()
def conversion(model: nn.Module, rank: float | None = None, adapter_name: str = "default", progressbar: bool = False) -> Conversion:
    """An adapter as LoRA. The model is left as it is.

    Args:
        model: a `PeftModel`, or a model that adapters were injected into.
        rank: of LoRA, or the share of the squared norm that is to stay at each weight, or None: all of it, where the adapter is of
            low rank.
        adapter_name: which adapter.
        progressbar: show how far it is, on a terminal.

    Raises:
        ValueError: the rank is no such number, is larger than any weight allows, or is needed.
        TypeError: the method is no function of the weight.
    """
    check_rank(rank)
    base, configs = base_and_configs(model, (adapter_name,))
    source: Any = configs[adapter_name]
    # Matrices are made one after another: of all only the factors are in memory.
    effect = effects(base, (adapter_name,), sliced=Sliced.of)[0]
    if not effect.weights:
        # Tokens alone: columns of the weight, as many as the rank.
        effect.ties = effect.ties or bool(set(effect.tokens) & set(tied_paths(base).values()))
        effect.weights = {(path, t.site.name): t.update(path) for path, t in effect.tokens.items()}
        effect.tokens = {}
    if not effect.weights:
        raise TypeError(f"{adapter_name!r} ({source.peft_type}) changes no weight that LoRA could stand for.")
    most = max(min(u.site.shape[-2:]) for u in effect.weights.values())
    if isinstance(rank, int) and rank > most:
        raise ValueError(f"The chosen rank {rank} is larger than the weights' smaller side, {most}; choose a lower rank.")
    layers = []
    for key, update in _shown(effect.weights, progressbar):
        if rank is None and update.rank is None:
            raise ValueError(f"{update.name!r} has no factors, so a rank is needed: an integer, or a share such as 0.99.")
        update = update.held()
        found, error = (update, 0.0) if rank is None else cut(update, rank)
        effect.weights[key] = found
        layers.append(Converted(update.name, found.rank or 0, _norm(update), error))
    config = config_for(base, effect, [source], rank if isinstance(rank, int) else 1 if rank is not None else None)
    assert isinstance(config, LoraConfig)
    parts = Plan(base, config, True, True).parts()
    put(parts, effect, base)
    prefix = "" if bare_model(model) is model else PREFIX
    tensors = {key_in_file(s, prefix): s.to_file(s.tensor.detach()).contiguous() for s in slots_of_parts(parts, adapter_name)}
    return Conversion(config, tensors, layers)


def _norm(update: Update) -> float:
    if update.dense is not None:
        return float(update.dense.norm())
    a, b = update.factors()
    # |B A|^2 from the small products of each factor with itself.
    return float(((b.mT @ b).double() * (a @ a.mT).double()).sum().clamp_min(0).sqrt())


def _shown(weights: dict[Any, Update], progressbar: bool) -> Any:
    if not progressbar:
        return list(weights.items())
    from tqdm import tqdm

    return tqdm(list(weights.items()), desc="Converting to LoRA")


def convert_to_lora(
    model: nn.Module, rank: float, adapter_name: str = "default", progressbar: bool = False, compile_kwargs: dict[str, Any] | None = None
) -> tuple[LoraConfig, dict[str, Tensor]]:
    """The configuration and the tensors of an adapter as LoRA, as HF peft gives them; `conversion` has the errors too.

    Arguments and errors as for `conversion`; ``compile_kwargs`` is for HF's signature.
    """
    _warn_of_lora(model, adapter_name)
    found = conversion(model, rank, adapter_name, progressbar)
    return found.config, found.tensors


def _warn_of_lora(model: nn.Module, name: str) -> None:
    if base_and_configs(model, (name,))[1][name].peft_type == PeftType.LORA:
        text = "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that."
        warnings.warn(text, stacklevel=3)


def save_as_lora(
    path: str | os.PathLike[str],
    model: nn.Module,
    rank: float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: dict[str, Any] | None = None,
) -> None:
    """Convert an adapter and write it as LoRA into a folder. Arguments and errors as for `convert_to_lora`."""
    _warn_of_lora(model, adapter_name)
    found = conversion(model, rank, adapter_name, progressbar)
    tensors = {key if key.startswith("base_model.") else PREFIX + key: t for key, t in found.tensors.items()}
    write_adapter(Path(path), tensors, found.config.to_file())
    write_card(Path(path), model, found.config, origin(found, adapter_name, base_and_configs(model, (adapter_name,))[1][adapter_name]))


def origin(found: Conversion, name: str, source: PeftConfig) -> str:
    """For the card: what was converted, and what that costs."""
    worst = max(found.layers, key=lambda layer: layer.error)
    rows = [(f"`{layer.name}`", str(layer.rank), f"{layer.norm:.3g}", f"{layer.error:.1e}") for layer in found.layers]
    return (
        f"LoRA in place of the {source.peft_type} adapter `{name}`. What it lacks of that adapter's change of a weight, relative to the "
        f"change: {worst.error:.1e} at most.\n\n{table(('layer', 'rank', 'norm', 'error'), rows)}"
    )
