"""The weights that a model had before it was quantised: read one at a time, from its files or from the dense model."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

from torch import Tensor, nn

from ..formats.streaming import WEIGHTS, Checkpoint, Files, read_header
from .disk_base import DiskBase, base_on_disk

Read = Callable[[str], Tensor]
REMEDY = "pass the base's folder from before it was quantised (`model_path`, `original`)."
Original = str | os.PathLike[str] | nn.Module | None


def original_weights(base: nn.Module, original: Original = None) -> Read:
    """Reads one weight by its name in the model.

    Args:
        base: the quantised model.
        original: the dense model; or its safetensors file or folder; where None, what the base was loaded from, on this machine.

    Raises:
        ValueError: there are no such files. The function that is returned raises it for a weight that is absent.
    """
    if isinstance(original, nn.Module):
        return lambda name: _parameter(original, name)
    path = Path(_downloaded(getattr(base, "name_or_path", "")) if original is None else original)
    if path.name == WEIGHTS and not path.exists():
        # HF's way to name a model in shards.
        path = path.parent
    if path.is_file():
        folder, tensors = path.parent, read_header(path)[0]
    elif (path / WEIGHTS).is_file() or (path / f"{WEIGHTS}.index.json").is_file():
        folder, tensors = path, Checkpoint.open(path).tensors
    else:
        raise ValueError(f"There is no {WEIGHTS} (nor an index of one) at {str(path)!r}; {REMEDY}")
    prefix = f"{getattr(base, 'base_model_prefix', '')}."

    @cache
    def converted() -> DiskBase | None:
        """The files as transformers reads them: some keep one by one what the model has as a stack."""
        return base_on_disk(folder, Files()) if (folder / "config.json").is_file() else None

    def read(name: str) -> Tensor:
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in tensors), None)
        with Files() as files:
            if key is not None:
                return files.read(tensors[key])
            model = converted()
            if model is None or (known := model.canonical(name)) not in model.group_of:
                raise ValueError(f"{path} has no weight {name!r}; is it the same model?")
            model.files = files
            return model.fetch(known)

    return read


def _parameter(model: nn.Module, name: str) -> Tensor:
    try:
        return model.get_parameter(name).detach()
    except AttributeError as error:
        raise ValueError(f"The original model has no weight {name!r}; is it the same model?") from error


def _downloaded(name: str) -> str:
    if os.path.isdir(name):
        return name
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(name, local_files_only=True)
    except Exception as error:
        raise ValueError(f"The weights of {name!r} are not on this machine ({error}); {REMEDY}") from error
