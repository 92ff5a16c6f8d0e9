"""A model of the shapes that LoRA files speak of, for what can be done to adapters without their base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..core.config import PeftConfig
from ..formats.slots import PREFIX
from ..methods.lora import LoraConfig

CONVOLUTIONS = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}


def needs_base(config: PeftConfig, tensors: Mapping[str, Tensor]) -> str:
    """Why an adapter's files alone do not say what it does; empty where they do."""
    if (
        type(config) is not LoraConfig
        or type(config.acting()) is not LoraConfig
        or config.init_lora_weights not in (True, False, "gaussian", "orthogonal")
    ):
        return f"{config.peft_type} with these options depends on the base's weights"
    for option in ("modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication", "ensure_weight_tying"):
        if getattr(config, option):
            return f"it has `{option}`"
    if config.bias != "none":
        return f"it retrains biases (bias={config.bias!r})"
    shapes = _shapes(tensors)
    if any(None in pair for pair in shapes.values()) or 2 * len(shapes) + len(_saved_along(tensors)) < len(tensors):
        return "its file holds more than factors"
    if any(a.ndim > 2 and a.shape[0] != b.shape[1] for a, b in shapes.values()):
        return "it adapts convolutions with groups"
    return ""


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Any, Any]]:
    """A and B by the name of the module; those of an embedding under its name with a star."""
    found: dict[str, tuple[Any, Any]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        for leaf, mark, at in (
            (".lora_A.weight", "", 0), (".lora_B.weight", "", 1), (".lora_embedding_A", "*", 0), (".lora_embedding_B", "*", 1),
        ):  # fmt: skip
            if name.endswith(leaf):
                pair = list(found.get(name.removesuffix(leaf) + mark, (None, None)))
                pair[at] = tensor
                found[name.removesuffix(leaf) + mark] = (pair[0], pair[1])
    return found


def _saved_along(tensors: Mapping[str, Tensor]) -> list[str]:
    """The adapted modules whose own weight is in the file, as that of an embedding is."""
    names = {key.removeprefix(PREFIX) for key in tensors}
    paths = [name.removesuffix("*") for name in _shapes(tensors)]
    return [path for path in paths if names & {f"{path}.weight", f"{path}.base_layer.weight"}]


class Skeleton(nn.Module):
    """Modules without a model around them, of which some are its embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.__dict__["ends"] = {}

    def get_input_embeddings(self) -> nn.Module | None:
        return self.__dict__["ends"].get(nn.Embedding)

    def get_output_embeddings(self) -> nn.Module | None:
        return self.__dict__["ends"].get(nn.Linear)


def skeleton(*files: Mapping[str, Tensor]) -> nn.Module:
    """A model with the modules that these files adapt. Its weights are zeros and take no memory.

    Raises:
        ValueError: the files speak of one module with different shapes, so they are of different bases.
    """
    root = Skeleton()
    known: dict[str, tuple[int, ...]] = {}
    embeddings: set[str] = set()
    for file in files:
        for name, (a, b) in _shapes(file).items():
            path = name.removesuffix("*")
            shape = (*((a.shape[1], b.shape[0]) if name.endswith("*") else (b.shape[0], *a.shape[1:])),)
            if known.setdefault(path, shape) != shape:
                raise ValueError(f"{path!r} is {known[path]} for one adapter and {shape} for another: they are of different bases.")
            if name.endswith("*"):
                embeddings.add(path)
    for path in sorted(known, key=_in_order):
        _set_in(root, path, _host(path in embeddings, known[path]))
    for path in {path: None for file in files for path in _saved_along(file)}:
        root.__dict__["ends"].setdefault(type(module := root.get_submodule(path)), module)
    return root


def _in_order(path: str) -> list[tuple[bool, int, str]]:
    """By the numbers in a name: files have block 10 before block 2."""
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in path.split(".")]


def _host(embedding: bool, shape: tuple[int, ...]) -> nn.Module:
    out, inner = shape[:2]
    made: Any
    if embedding:
        made = nn.Embedding(out, inner, device="meta")
    elif len(shape) > 2:
        made = CONVOLUTIONS[len(shape)](inner, out, shape[2:], bias=False, device="meta")
    else:
        made = nn.Linear(inner, out, bias=False, device="meta")
    made.weight = nn.Parameter(torch.zeros(()).expand(shape), requires_grad=False)
    return made


def _set_in(root: nn.Module, path: str, module: nn.Module) -> None:
    *above, leaf = path.split(".")
    for name in above:
        if name not in root._modules:
            root.add_module(name, nn.Module())
        root = root.get_submodule(name)
    root.add_module(leaf, module)
