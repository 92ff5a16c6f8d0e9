"""Running a base through its blocks in another order and more than once, on the same weights.

Each place in the new order is a module of its own over the tensors of the block that it repeats, so that adapters can differ.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..core.inlaid import places

# What configurations say of the blocks: how many there are, and of which kind each is.
OF_LAYERS = ("num_hidden_layers", "layer_types")
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
    order = _order(ranges, len(blocks))
    setattr(owner, name, nn.ModuleList(_again(blocks[i], at) for at, i in enumerate(order)))
    config: Any = getattr(base, "config", None)
    before = _count(config, order, len(blocks))

    def undo() -> None:
        setattr(owner, name, blocks)
        for of_layers, value in before.items():
            _set(config, of_layers, value)

    return undo


def blocks_of(base: nn.Module) -> str:
    """The path of the list of blocks."""
    owner, name = _blocks(base)
    path = next(p for p, m in base.named_modules() if m is owner)
    return f"{path}.{name}" if path else name


def replicated(base: nn.Module, ranges: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Have a model's configuration describe the model with its blocks replaced; the model stays.

    Returns:
        The fields that changed, as a file names them.

    Raises:
        ValueError: the model has no blocks, or a range lies outside of them.
    """
    config: Any = base.config.get_text_config()  # type: ignore[operator,union-attr]
    owner, name = _blocks(base)
    blocks = len(getattr(owner, name))
    _count(config, _order(ranges, blocks), blocks)
    named = {_spelled(config, field): field for field in OF_LAYERS}
    return {key: vars(config)[key] for key in named if key in vars(config)}


def _order(ranges: Sequence[Sequence[int]], blocks: int) -> list[int]:
    for start, end in ranges:
        if not 0 <= start < end <= blocks:
            raise ValueError(f"`layer_replication` has the range [{start}, {end}], and the model has {blocks} blocks.")
    return [i for start, end in ranges for i in range(start, end)]


def _count(config: Any, order: Sequence[int], blocks: int) -> dict[str, Any]:
    """Have a configuration speak of these blocks; what it said before."""
    before = {}
    for field in OF_LAYERS:
        value = getattr(config, field, None)
        if value == blocks or (isinstance(value, list) and len(value) == blocks):
            before[field] = value
    for field, value in before.items():
        _set(config, field, len(order) if isinstance(value, int) else [value[i] for i in order])
    return before


def _set(config: Any, name: str, value: Any) -> None:
    # Configurations of transformers check that the two agree whenever one is set.
    config.__dict__[_spelled(config, name)] = value


def _spelled(config: Any, name: str) -> str:
    return config.attribute_map.get(name, name) if hasattr(config, "attribute_map") else name


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
