"""What is known of a base by the names that its architecture gives to things: its blocks, their width, its embeddings."""

from __future__ import annotations

from inspect import signature
from typing import Any

from torch import nn

from ..core.targets import base_modules

# What models call the list of their blocks, and the width of what goes from one to the next.
BLOCKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks", "blocks", "block", "layer")
WIDTH = ("hidden_size", "n_embd", "d_model")


def blocks_of(base: nn.Module) -> tuple[str, int]:
    """The path of the list of blocks, and their number.

    Raises:
        ValueError: there is none that is known by its name.
    """
    decoder = getattr(base, "get_decoder", lambda: None)()
    paths = {m: p for p, m in base_modules(base)}
    for root in (decoder, base):
        if root is None or root not in paths:
            continue
        lists = [(p, m) for p, m in base_modules(root) if isinstance(m, nn.ModuleList) and len(m)]
        known = [(p, m) for p, m in lists if p.rpartition(".")[2] in BLOCKS]
        if known:
            # The least deep, and of those side by side the one that comes first in the table.
            path, blocks = min(known, key=lambda named: (named[0].count("."), BLOCKS.index(named[0].rpartition(".")[2])))
            return ".".join(filter(None, (paths[root], path))), len(blocks)
    raise ValueError(
        f"No list of blocks ({', '.join(BLOCKS)}) was found in {type(base).__name__}: name the blocks, such as "
        "target_modules=r'.*\\.layers\\.\\d+'."
    )


def holder_of(base: nn.Module, path: str) -> nn.Module:
    """The module whose call is one walk through the blocks: the innermost around them that reads tokens, or the base."""
    while path:
        path = path.rpartition(".")[0]
        module = base.get_submodule(path)
        if hasattr(module, "config") and reads_embeddings(module):
            return module
    return base


def reads_embeddings(module: nn.Module) -> bool:
    return "inputs_embeds" in signature(module.forward).parameters


def width_of(config: Any, module: nn.Module) -> int:
    """The width of what goes from block to block.

    Raises:
        ValueError: the configuration does not tell.
    """
    for text in (config, getattr(config, "text_config", None)):
        for name in WIDTH:
            if isinstance(getattr(text, name, None), int):
                return getattr(text, name)
    try:
        return int(config.num_attention_heads) * int(config.attention_head_dim)
    except AttributeError:
        raise ValueError(f"The configuration of {type(module).__name__} tells no width ({', '.join(WIDTH)}).") from None


def embeddings(model: Any) -> list[nn.Module]:
    """Those of tokens, in and out."""
    found = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in found if isinstance(module, nn.Module)]


def set_embeddings(model: Any, module: nn.Module) -> None:
    """Put another module where a model has its embeddings of tokens."""
    own = model.get_input_embeddings()
    path = next(p for p, m in model.named_modules() if m is own)
    model.set_submodule(path, module)
