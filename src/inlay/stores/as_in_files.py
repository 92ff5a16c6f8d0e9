"""Hosts that keep their weight in the tensors that a file has of it: what reads and writes such files does the same with them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..formats.packed import Packed, slices
from ..formats.streaming import NAMES, Entry, Files
from .frozen import Quantised, host_of

# How far a weight that is restored here may be from the host's own, as a share of it: that rounds on its way, to bfloat16 even.
SAME = 5e-3
NO_FILES = Files()


@dataclass(frozen=True)
class InMemory(Entry):
    """A tensor of a host, as if it were in a file."""

    tensor: Tensor

    @classmethod
    def of(cls, key: str, tensor: Tensor) -> InMemory:
        return cls(key, Path(), NAMES[tensor.dtype], tuple(tensor.shape), 0, tensor.nbytes, tensor.detach())

    def read(self, files: Files, rows: slice | None = None) -> Tensor:
        return self.tensor if rows is None else self.tensor[rows]


class Kept(NamedTuple):
    """What makes up a host's weight, by name, with the host that can read it."""

    host: Any
    tensors: Mapping[str, Tensor]


class AsInFiles(Quantised):
    """
    Attributes:
        names: of the tensors of the host that make up its weight, where it has them.
    """

    names: ClassVar[tuple[str, ...]] = ()

    def packed(self, parts: Mapping[str, Entry], module: nn.Module) -> Iterator[Packed]:
        """What these tensors may mean; the host's own reading says which it is.

        Raises:
            NotImplementedError: they are in an order that no file has.
        """
        raise NotImplementedError

    def restored(self, host: Any) -> Tensor:
        """The weight by the host's own means."""
        raise NotImplementedError

    # ---- reading --------------------------------------------------------------------------------------------------------
    def held(self, module: nn.Module, name: str) -> Kept:
        known = {**module._parameters, **module._buffers}
        return Kept(module, {n: t for n in self.names if (t := known.get(n)) is not None})

    def put(self, module: nn.Module, name: str, held: Kept) -> None:
        for n, tensor in held.tensors.items():
            table = module._parameters if n in module._parameters else module._buffers
            table[n] = tensor  # type: ignore[assignment]
        # Some kernels keep what they have made of the codes.
        getattr(module, "clear_weight_cache", lambda: None)()

    def read_tensor(self, stored: Kept) -> Tensor:
        with self._within(stored) as host:
            return self.restored(host)

    @contextmanager
    def _within(self, kept: Kept) -> Iterator[Any]:
        now = self.held(kept.host, "weight")
        if all(now.tensors.get(n) is t for n, t in kept.tensors.items()):
            yield kept.host
            return
        self.put(kept.host, "weight", kept)
        try:
            yield kept.host
        finally:
            self.put(kept.host, "weight", now)

    # ---- writing --------------------------------------------------------------------------------------------------------
    def unwritable(self, module: nn.Module, name: str) -> str:
        if self._found(module) is not None:
            return ""
        return (
            f"This {host_of(module).__name__} of {self.backend} keeps its numbers in an order that only its own kernels know, so nothing "
            "can be merged into it; use merge_and_unload(base='dequantized') or base='original'."
        )

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        found, before = self._found(module), self.held(module, name)
        assert found is not None
        packing, w = found.packing(NO_FILES), weight.detach().to(self.device(module, name), torch.float32)
        for rows in slices(w.shape, found.together):
            packing.add(w[rows])
        made = self._made(module, found, packing.parts())
        made = {n: t if n not in module._parameters else nn.Parameter(t, requires_grad=False) for n, t in made.items()}
        self.put(module, name, before._replace(tensors={**before.tensors, **made}))

    @torch.no_grad()
    def _found(self, module: nn.Module) -> Packed | None:
        """How the host keeps its weight; None where no file does so."""
        parts = {n: InMemory.of(n, t) for n, t in self.held(module, "weight").tensors.items() if t.dtype in NAMES}
        own, best, least = self.read(module, "weight").float(), None, SAME * SAME
        try:
            for entry in self.packed(parts, module):
                if entry.shape == tuple(own.shape):
                    apart = self._apart(entry, module, own)
                    best, least = (entry, apart) if apart <= least else (best, least)
        except NotImplementedError:
            pass
        return best

    def _made(self, module: nn.Module, entry: Packed, made: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the host keeps of the tensors that a file would have."""
        return made

    def _apart(self, entry: Packed, module: nn.Module, own: Tensor) -> float:
        """The square of how far a reading is from the host's own, as a share of it."""
        apart = sum(float((entry.dense(entry.numbers(NO_FILES, rows)) - own[rows]).square().sum()) for rows in slices(own.shape))
        return apart / max(float(own.square().sum()), 1e-30)
