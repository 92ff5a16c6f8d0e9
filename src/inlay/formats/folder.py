"""An adapter's folder, as HF peft has it: ``adapter_config.json``, ``adapter_model.safetensors``, ``README.md``.

Everything is written under another name first and renamed once it is complete, so a reader or a crash never meets half a file.
Nothing is unpickled unless that is asked for, and then weights only.
"""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CONFIG_NAME = "adapter_config.json"
SAFETENSORS_WEIGHTS_NAME = "adapter_model.safetensors"
WEIGHTS_NAME = "adapter_model.bin"
INDEX_NAME = f"{SAFETENSORS_WEIGHTS_NAME}.index.json"
CARD_NAME = "README.md"


# ---- finding --------------------------------------------------------------------------------------------------------------
def hub_options(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments that say how to fetch from a hub."""
    from huggingface_hub import hf_hub_download

    known = set(inspect.signature(hf_hub_download).parameters) - {"repo_id", "filename", "subfolder"}
    return {k: v for k, v in kwargs.items() if k in known and v is not None}


def locate(source: str | os.PathLike[str], filename: str, *, subfolder: str | None = None, **hub: Any) -> Path:
    """A file of a local folder, or of a repository on a hub.

    Raises:
        ValueError: it is in neither.
    """
    folder = Path(source) / subfolder if subfolder else Path(source)
    if (folder / filename).is_file():
        return folder / filename
    if folder.is_dir():
        adapters = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG_NAME}"))
        hint = f" Its subfolders {', '.join(adapters)} have one: choose with `subfolder=`." if adapters and filename == CONFIG_NAME else ""
        raise ValueError(f"Can't find '{filename}' at '{source}'.{hint}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), filename, subfolder=subfolder, **hub))
    except Exception as error:
        raise ValueError(f"Can't find '{filename}' at '{source}': no such folder here, and from the hub: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ValueError: the file is not a JSON object; the message names the file and the line.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no valid JSON: {error}. Copy the file again from where it came.") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds a {type(found).__name__} where a JSON object belongs.")
    found.pop("runtime_config", None)
    return found


def weight_files(source: str | os.PathLike[str], *, subfolder: str | None = None, allow_pickle: bool = False, **hub: Any) -> list[Path]:
    """The files that hold an adapter's tensors: one, the shards of an index, or (on request) a pickle.

    Raises:
        ValueError: there are none, or a shard of the index is absent or lies outside the folder.
    """
    try:
        return [locate(source, SAFETENSORS_WEIGHTS_NAME, subfolder=subfolder, **hub)]
    except ValueError as error:
        first = error
    try:
        index = locate(source, INDEX_NAME, subfolder=subfolder, **hub)
    except ValueError:
        pass
    else:
        shards = sorted(set(read_json(index).get("weight_map", {}).values()))
        if any(Path(s).name != s for s in shards):
            raise ValueError(f"{index} names shards outside its folder.")
        return [locate(source, s, subfolder=subfolder, **hub) for s in shards]
    try:
        pickled = locate(source, WEIGHTS_NAME, subfolder=subfolder, **hub)
    except ValueError:
        raise first from None
    if not allow_pickle:
        raise ValueError(f"{pickled} is a pickle, which can run code. If you trust it, pass `allow_pickle=True`: it is read weights-only.")
    return [pickled]


def read_tensors(files: list[Path], device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """All tensors of the files.

    Raises:
        ValueError: a file is truncated or no tensor file; the message names it.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                found |= load_file(file, device=str(device))
            else:
                found |= torch.load(file, map_location=device, weights_only=True)
        except (SafetensorError, OSError, RuntimeError, EOFError, ValueError) as error:
            raise ValueError(f"{file} cannot be read ({error}); it may be truncated. Copy or save it again.") from error
    return found


# ---- writing --------------------------------------------------------------------------------------------------------------
class Staged:
    """Files that appear together: each is written beside its place, and `commit` renames them, in order, once all are complete."""

    def __init__(self, folder: Path) -> None:
        if folder.is_file():
            raise ValueError(f"{folder} is a file; give a folder to save into.")
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.files: list[tuple[Path, Path]] = []

    def write(self, name: str, put: Callable[[Path], object]) -> None:
        handle, temporary = tempfile.mkstemp(prefix=f".{name}.", dir=self.folder)
        os.close(handle)
        path = Path(temporary)
        self.files.append((path, self.folder / name))
        put(path)
        with path.open("rb") as written:
            os.fsync(written.fileno())
        as_usual(path)

    def commit(self) -> None:
        for temporary, final in self.files:
            os.replace(temporary, final)
        self.files = []

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        if failed is None:
            self.commit()
        for temporary, _final in self.files:
            temporary.unlink(missing_ok=True)


def as_usual(path: Path) -> None:
    """Give a file, or a folder and all in it, the permissions of any new one: temporary ones are for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for each in (path, *(path.rglob("*") if path.is_dir() else ())):
        each.chmod((0o777 if each.is_dir() else 0o666) & ~mask)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    with Staged(path.parent) as staged:
        staged.write(path.name, lambda p: p.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8"))


def write_adapter(
    folder: str | Path,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    *,
    safe_serialization: bool = True,
    max_shard_size: int | str | None = None,
) -> None:
    """Write an adapter's tensors and configuration into a folder.

    Args:
        tensors: by their keys in the file; copied to the CPU, shared storage written out for each.
        config: the content of ``adapter_config.json``.
        safe_serialization: safetensors; False writes a pickle, for readers that know nothing else.
        max_shard_size: in bytes, or as ``"5GB"``: larger files are split, and an index says where each tensor is.

    Raises:
        ValueError: a tensor is empty, as the shards of a distributed model are that were not gathered.
    """
    # A flat tensor of no numbers is what a sharded model leaves in a parameter's place; factors of rank 0 are matrices.
    empty = [k for k, t in tensors.items() if t.numel() == 0 and t.ndim < 2]
    if empty:
        raise ValueError(f"{len(empty)} tensors to save are empty, such as {empty[0]!r}: gather the shards of the model before saving.")
    plain = {k: t.detach().to("cpu", copy=True).contiguous() for k, t in tensors.items()}
    shards = split(plain, _bytes(max_shard_size)) if safe_serialization and max_shard_size is not None else [plain]
    with Staged(Path(folder)) as staged:
        if not safe_serialization:
            staged.write(WEIGHTS_NAME, lambda p: torch.save(plain, p))
        else:
            _write_shards(staged, shards)
        staged.write(CONFIG_NAME, lambda p: p.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8"))
    # What an earlier save left would be read in place of, or beside, this one.
    current = {SAFETENSORS_WEIGHTS_NAME} if safe_serialization and len(shards) == 1 else set()
    if not current:
        (Path(folder) / SAFETENSORS_WEIGHTS_NAME).unlink(missing_ok=True)
    else:
        (Path(folder) / INDEX_NAME).unlink(missing_ok=True)


def _write_shards(staged: Staged, shards: list[dict[str, Tensor]]) -> None:
    from safetensors.torch import save_file

    if len(shards) == 1:
        staged.write(SAFETENSORS_WEIGHTS_NAME, lambda p: save_file(shards[0], p, metadata={"format": "pt"}))
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"adapter_model-{i:05d}-of-{len(shards):05d}.safetensors"
        staged.write(name, lambda p, shard=shard: save_file(shard, p, metadata={"format": "pt"}))
        where |= dict.fromkeys(shard, name)
    total = sum(t.nbytes for shard in shards for t in shard.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    staged.write(INDEX_NAME, lambda p: p.write_text(json.dumps(index, indent=2, sort_keys=True), encoding="utf-8"))


def split(tensors: Mapping[str, Tensor], limit: int) -> list[dict[str, Tensor]]:
    """The tensors in order, in groups of at most ``limit`` bytes (or one tensor)."""
    groups: list[dict[str, Tensor]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > limit:
            groups.append({})
            size = 0
        groups[-1][key] = tensor
        size += tensor.nbytes
    return groups


def _bytes(size: int | str | None) -> int:
    if isinstance(size, int):
        return size
    text = str(size).upper().strip()
    for unit, factor in (("GIB", 2**30), ("MIB", 2**20), ("KIB", 2**10), ("GB", 10**9), ("MB", 10**6), ("KB", 10**3), ("B", 1)):
        if text.endswith(unit):
            return int(float(text.removesuffix(unit)) * factor)
    raise ValueError(f"max_shard_size={size!r} is no number of bytes; write it as 5000000000 or '5GB'.")
