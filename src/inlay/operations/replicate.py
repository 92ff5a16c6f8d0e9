"""Running a base through its blocks in another order and more than once, on the same weights.

Each place in the new order is a module of its own over the tensors of the block that it repeats, so that adapters can differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.inlaid import places

# Where architectures keep their blocks, below what wraps them.
BLOCKS = ("layers", "encoder.layer", "h", "decoder.layers")


def replicate(base: nn.Module, ranges: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Replace the blocks of a model.

    Args:
        base: the model; its tensors stay what they are.
        ranges: pairs ``[start, end)`` of blocks, one after another.

    Returns:
        What puts the blocks back.

    Raises:
        ValueError: the model has adapters or no blocks, or a range lies outside of them. The model is untouched.
    """
    if next(places(base), None) is not None:
        raise ValueError("`layer_replication` changes the blocks of the base, and there are adapters on them; load this one first.")
    owner, name = _blocks(base)
    blocks: nn.ModuleList = getattr(owner, name)
    for start, end in ranges:
        if not 0 <= start < end <= len(blocks):
            raise ValueError(f"`layer_replication` has the range [{start}, {end}], and the model has {len(blocks)} blocks.")
    order = [i for start, end in ranges for i in range(start, end)]
    setattr(owner, name, nn.ModuleList(_again(blocks[i], at) for at, i in enumerate(order)))
    config: Any = getattr(base, "config", None)
    before = {}
    for of_layers in ("num_hidden_layers", "layer_types"):
        value = getattr(config, of_layers, None)
        if value == len(blocks) or (isinstance(value, list) and len(value) == len(blocks)):
            before[of_layers] = value
    for of_layers, value in before.items():
        _set(config, of_layers, len(order) if isinstance(value, int) else [value[i] for i in order])

    def undo() -> None:
        setattr(owner, name, blocks)
        for of_layers, value in before.items():
            _set(config, of_layers, value)

    return undo


def _set(config: Any, name: str, value: Any) -> None:
    # Configurations of transformers check that the two agree whenever one is set.
    config.__dict__[config.attribute_map.get(name, name) if hasattr(config, "attribute_map") else name] = value


def _blocks(base: nn.Module) -> tuple[nn.Module, str]:
    """The module that keeps the list of blocks, and as what."""
    inner: Any = base
    while isinstance(getattr(inner, "model", None), nn.Module):
        inner = inner.model
    prefix = getattr(base, "base_model_prefix", "")
    whole: Any = getattr(base, prefix, None) if prefix else None
    for module in (inner, whole) if isinstance(whole, nn.Module) else (inner,):
        for path in BLOCKS:
            owner, _, name = path.rpartition(".")
            try:
                found = module.get_submodule(owner)
            except AttributeError:
                continue
            if isinstance(getattr(found, name, None), nn.ModuleList):
                return found, name
    raise ValueError(f"`layer_replication` found no list of blocks in {type(base).__name__}; it looks for {', '.join(BLOCKS)}.")


def _again(block: nn.Module, at: int) -> nn.Module:
    """A block over the same tensors, at another place."""
    memo: dict[int, Any] = {id(t): t for t in (*block.parameters(), *block.buffers())}
    copied = copy.deepcopy(block, memo)
    for module in copied.modules():
        if "layer_idx" in vars(module):
            vars(module)["layer_idx"] = at
    return copied
