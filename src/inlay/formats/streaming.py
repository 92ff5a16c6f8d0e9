"""A model's safetensors files read and written a tensor at a time, or a slice of one: the header first, then bytes at their offsets.

Nothing is mapped into memory and nothing is unpickled.
"""

from __future__ import annotations

import ctypes
import json
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .direct import Output

WEIGHTS = "model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
# How many bytes are moved, or computed on, at once.
AT_ONCE = 2**24
# How many bytes may wait for the disk while the next tensor is computed.
WAITING = 2**26
# safetensors' own limit of a header.
LONGEST_HEADER = 100_000_000

DTYPES = {
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "U16": torch.uint16, "I16": torch.int16, "U32": torch.uint32,
    "I32": torch.int32, "U64": torch.uint64, "I64": torch.int64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64, "C64": torch.complex64,
    "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """One tensor of a file.

    Attributes:
        dtype: as the file spells it.
        start: of its bytes, from the beginning of the file.
    """

    key: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """
        Raises:
            ValueError: torch has no such numbers.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.key!r} in {self.file} holds {self.dtype} numbers, which torch does not know.")
        return DTYPES[self.dtype]

    @property
    def sliceable(self) -> bool:
        """Whether some of its rows can be read without the others."""
        return bool(self.shape)

    def meta(self) -> Tensor:
        return torch.empty(self.shape, dtype=self.torch_dtype, device="meta")

    def read(self, files: Files, rows: slice | None = None) -> Tensor:
        """See `Files.read`."""
        shape, start = self.shape, self.start
        if rows is not None:
            shape = (rows.stop - rows.start, *shape[1:])
            start += rows.start * (self.nbytes // max(1, self.shape[0]))
        made = torch.empty(shape, dtype=self.torch_dtype)
        done, view = 0, memoryview(_bytes_of(made)) if made.nbytes else memoryview(b"")
        while done < made.nbytes:
            got = os.preadv(files.descriptor(self.file), [view[done : done + AT_ONCE * 4]], start + done)
            if got <= 0:
                raise OSError(f"{self.file} ends before {self.key!r} does; copy or download it again.")
            done += got
        return made


# ---- reading --------------------------------------------------------------------------------------------------------------
def read_header(file: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file in the order of their bytes, and its metadata.

    Raises:
        ValueError: the file is truncated or no safetensors file; the message names it.
    """
    damaged = f"{file} is no whole safetensors file; copy or download it again."
    size = file.stat().st_size
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        if size < 8 or not 2 <= length <= min(LONGEST_HEADER, size - 8):
            raise ValueError(damaged)
        try:
            header = json.loads(source.read(length))
            metadata = header.pop("__metadata__", {})
            found = []
            for key, info in header.items():
                start, end = info["data_offsets"]
                found.append(Entry(key, file, info["dtype"], tuple(info["shape"]), 8 + length + start, end - start))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(damaged) from error
    for entry in found:
        wanted = prod(entry.shape) * DTYPES[entry.dtype].itemsize if entry.dtype in DTYPES else entry.nbytes
        if entry.start + entry.nbytes > size or entry.nbytes != wanted:
            raise ValueError(damaged)
    return {e.key: e for e in sorted(found, key=lambda e: e.start)}, metadata


def _bytes_of(tensor: Tensor) -> Any:
    """The memory of a contiguous tensor, to read into and to write from."""
    return (ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr())


class Files:
    """Open files, by their paths; closed when the block ends."""

    def __init__(self) -> None:
        self.open: dict[Path, int] = {}

    def __enter__(self) -> Files:
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor in self.open.values():
            os.close(descriptor)
        self.open.clear()

    def descriptor(self, file: Path) -> int:
        if file not in self.open:
            self.open[file] = os.open(file, os.O_RDONLY)
        return self.open[file]

    def read(self, entry: Entry, rows: slice | None = None) -> Tensor:
        """A tensor, or some of its rows (slices of the first axis).

        Raises:
            OSError: the file ends too early.
        """
        return entry.read(self, rows)


@dataclass
class Checkpoint:
    """The weights of a model's folder, of which only the headers are read.

    Attributes:
        tensors: by key, file by file in the order of their bytes.
        files: the names of the files, in order.
        metadata: of each file.
        index: the content of the index, where there is one.
    """

    folder: Path
    tensors: dict[str, Entry] = field(default_factory=dict)
    files: list[str] = field(default_factory=list)
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)
    index: dict[str, Any] | None = None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """
        Raises:
            ValueError: the folder has no safetensors files, or they are damaged or not all there.
        """
        found = cls(folder)
        if (folder / INDEX).is_file():
            from .folder import read_json

            found.index = read_json(folder / INDEX)
            where = found.index.get("weight_map")
            if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
                raise ValueError(f"{folder / INDEX} does not say which tensor is in which file (`weight_map`); copy or download it again.")
            found.files = sorted(set(where.values()))
        elif (folder / WEIGHTS).is_file():
            found.files = [WEIGHTS]
        else:
            raise ValueError(_no_weights(folder))
        for name in found.files:
            if Path(name).name != name or not (folder / name).is_file():
                raise ValueError(f"{folder / INDEX} names {name!r}, which is not in the folder; download that shard again.")
            tensors, found.metadata[name] = read_header(folder / name)
            twice = next((key for key in tensors if key in found.tensors), None)
            if twice is not None:
                raise ValueError(f"{twice!r} is in {found.tensors[twice].file} and in {folder / name}; save the model again.")
            found.tensors |= tensors
        return found

    def of(self, file: str) -> list[Entry]:
        return [e for e in self.tensors.values() if e.file.name == file]


def _no_weights(folder: Path) -> str:
    pickles = [p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in sorted(folder.glob(pattern))]
    if pickles:
        return (
            f"{folder} holds its weights as pickles ({pickles[0]}), which can run code and cannot be read in parts. Save them as "
            "safetensors first: `AutoModelForCausalLM.from_pretrained(folder).save_pretrained(other)`."
        )
    return f"{folder} has no {WEIGHTS} and no {INDEX}; give the folder of a model of transformers, as `save_pretrained` writes it."


# ---- writing --------------------------------------------------------------------------------------------------------------
# Key, dtype, shape and number of bytes of a tensor that is going to be written.
Planned = tuple[str, str, tuple[int, ...], int]


class Shard:
    """A file that is written at random: its header says where each tensor belongs before the first of them is there.

    Args:
        tensors: what goes in, in order: key, dtype and shape.
    """

    def __init__(self, file: Path, tensors: Iterable[Planned], metadata: Mapping[str, str]) -> None:
        self.file = file
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        at = 0
        offsets = {}
        for key, dtype, shape, nbytes in tensors:
            offsets[key] = at
            header[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + nbytes]}
            at += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        self.header = len(text).to_bytes(8, "little") + text
        self.size = len(self.header) + at
        self.at = {key: len(self.header) + offset for key, offset in offsets.items()}
        self._output: Output | None = None

    @property
    def output(self) -> Output:
        if self._output is None:
            self._output = Output(self.file, self.size)
            self._output.write(self.header, 0)
        return self._output

    def put(self, key: str, tensor: Tensor, skipped: int = 0) -> None:
        """Write a tensor, or the part of it that begins after ``skipped`` bytes."""
        tensor = tensor.detach().contiguous()
        if tensor.nbytes:
            self.output.write(memoryview(_bytes_of(tensor)), self.at[key] + skipped)

    def copy(self, key: str, source: int, start: int, nbytes: int) -> None:
        """Write ``nbytes`` from another file, of this tensor and those behind it."""
        self.output.copy(source, start, nbytes, self.at[key])

    def check(self) -> int:
        """A checksum of the header and of blocks from everywhere in the file: what was never written shows."""
        with self.file.open("rb") as written:
            found = zlib.crc32(written.read(len(self.header)))
            blocks = 256
            for i in range(blocks):
                written.seek((self.size - len(self.header)) * i // blocks + len(self.header))
                found = zlib.crc32(written.read(4096), found)
        return found

    def is_whole(self, check: int) -> bool:
        """Whether the file is there, and is what it was when `check` gave this number."""
        if not self.file.is_file() or self.file.stat().st_size != self.size:
            return False
        with self.file.open("rb") as written:
            if written.read(len(self.header)) != self.header:
                return False
        return self.check() == check

    def close(self) -> None:
        """On disk, for good."""
        self.output.close()
        self._output = None

    def leave(self) -> None:
        if self._output is not None:
            self._output.leave()
            self._output = None


class Writing:
    """Writes behind the computation, in a thread of its own and never far behind. What waits for the disk does so in a further one.

    After a job of writing has failed, none that was submitted later is begun.
    """

    def __init__(self) -> None:
        self.writes, self.waits = (ThreadPoolExecutor(1, thread_name_prefix=f"inlay-{what}") for what in ("write", "flush"))
        self.jobs: list[tuple[Future[Any], int]] = []
        self.waiting: list[Future[Any]] = []
        self.failed = False

    def __enter__(self) -> Writing:
        return self

    def __exit__(self, failed: object, *_: object) -> None:
        try:
            if failed is None:
                self.wait()
        finally:
            self.writes.shutdown(cancel_futures=failed is not None)
            # What is written is brought to its end.
            self.waits.shutdown()

    def submit(self, job: Callable[[], object], nbytes: int) -> None:
        """Have something written.

        Args:
            nbytes: of memory that it holds until then.
        """
        self.jobs.append((self.writes.submit(self._write, job), nbytes))
        while self.jobs and (self.jobs[0][0].done() or len(self.jobs) > 64 or sum(n for _, n in self.jobs) > WAITING):
            self.jobs.pop(0)[0].result()
        while self.waiting and self.waiting[0].done():
            self.waiting.pop(0).result()

    def afterwards(self, job: Callable[[], object]) -> None:
        """Have something done with what has been submitted, once it is written, while more of it is."""
        self.submit(lambda: self.waiting.append(self.waits.submit(job)), 0)

    def _write(self, job: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            job()
        except BaseException:
            self.failed = True
            raise

    def wait(self) -> None:
        while self.jobs:
            self.jobs.pop(0)[0].result()
        while self.waiting:
            self.waiting.pop(0).result()


def write_index(folder: Path, where: Mapping[str, str], sizes: Sequence[int], metadata: Mapping[str, Any]) -> None:
    """The index of a folder's files."""
    from .folder import write_json

    write_json(folder / INDEX, {"metadata": {**metadata, "total_size": sum(sizes)}, "weight_map": dict(where)})
