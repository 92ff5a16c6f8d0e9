"""What memory a piece of a program would take: every tensor's coming and going, on stand-ins that have sizes and no numbers."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

FEW = 2048  # elements; a smaller tensor is no account of logits, whatever its last axis


aten = torch.ops.aten


def _distinct(t: Tensor, sorted: bool = True, return_inverse: bool = False, return_counts: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    n = t.numel()
    return (
        t.new_empty(n),
        t.new_empty(t.shape if return_inverse else 0, dtype=torch.long),
        t.new_empty(n if return_counts else 0, dtype=torch.long),
    )


def _nonzero(t: Tensor) -> Tensor:
    return t.new_empty(t.numel(), t.ndim, dtype=torch.long)


def _indexed(t: Tensor, indices: Sequence[Tensor | None]) -> Any:
    if all(i is None or i.dtype is not torch.bool for i in indices):
        return NotImplemented
    numbers: list[Tensor | None] = []
    for i in indices:
        numbers += [i] if i is None or i.dtype is not torch.bool else i.ndim * [i.new_empty(i.numel(), dtype=torch.long)]
    return aten.index.Tensor(t, numbers)


def _grouped(a: Tensor, b: Tensor, ends: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Products of rows with one matrix of a stack each, in any dtype."""
    groups = () if (a.ndim == 3 and b.ndim == 2) or a.ndim < b.ndim else (len(a) if ends is None else len(ends),)
    return a.new_empty(*groups, a.shape[-2], b.shape[-1])


def _holds(t: Tensor) -> Any:
    return True if t.dtype is torch.bool else NotImplemented


# What depends on numbers is taken at its largest, and a condition on them to hold.
WITHOUT_NUMBERS: dict[Any, Callable[..., Any]] = {
    aten._unique2.default: _distinct,
    aten.nonzero.default: _nonzero,
    aten.index.Tensor: _indexed,
    aten._grouped_mm.default: _grouped,
    aten.masked_select.default: lambda t, mask: t.new_empty(torch.broadcast_shapes(t.shape, mask.shape).numel()),
    aten._local_scalar_dense.default: _holds,
    # A sparse matrix stands here for its values, which is most of what it has.
    aten.sparse_compressed_tensor.comp_plain_value_size: lambda starts, places, values, *_, **__: values,
    aten.sparse_sampled_addmm.out: lambda *_, out, **__: out,
    aten.mm.default: lambda a, b: NotImplemented if a.ndim == 2 else torch.empty_like(b),
    aten.values.default: Tensor.detach,
}


class Ledger(TorchDispatchMode):
    """Books the storages that operations make, as they are made and freed, each once and as a whole; on stand-ins and in earnest.

    Args:
        vocabulary: a new tensor with this last axis belongs to the logits.
    """

    def __init__(self, vocabulary: int | None = None) -> None:
        super().__init__()
        self.vocabulary = vocabulary
        self.account = "activations"
        # A storage's number and its bytes, negative when it goes.
        self.entries: list[tuple[int, int]] = []
        self.accounts: list[str] = []
        self.numbers: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if any(t is not FakeTensor and is_traceable_wrapper_subclass_type(t) for t in types):
            # It takes itself apart, into operations that come here again.
            return NotImplemented
        answer = WITHOUT_NUMBERS.get(func) if FakeTensor in types else None
        out = NotImplemented if answer is None else answer(*args, **(kwargs or {}))
        if out is NotImplemented:
            out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor) and not is_traceable_wrapper_subclass(t):
                self.book(t, self._account_of(t))
        return out

    def _account_of(self, t: Tensor) -> str:
        return "logits" if t.ndim and t.shape[-1] == self.vocabulary and t.numel() >= FEW else self.account

    def book(self, t: Tensor, account: str) -> None:
        """Enter a tensor's storage, unless it stands here already."""
        for part in parts_of(t):
            storage = part.untyped_storage()
            address = storage._cdata
            if address in self.numbers:
                continue
            number = len(self.accounts)
            self.numbers[address] = number
            self.accounts.append(account)
            self.entries.append((number, storage.nbytes()))
            weakref.finalize(storage, self._strike, address, storage.nbytes()).atexit = False

    def _strike(self, address: int, size: int) -> None:
        self.entries.append((self.numbers.pop(address), -size))

    def rename(self, tensors: Iterable[Tensor], account: str) -> None:
        """Find out afterwards what these were."""
        for t in tensors:
            for part in parts_of(t):
                number = self.numbers.get(part.untyped_storage()._cdata)
                if number is not None:
                    self.accounts[number] = account

    def rename_what_went(self, old: str, new: str) -> None:
        """What was entered under ``old`` and is gone already."""
        alive = set(self.numbers.values())
        self.accounts = [new if account == old and number not in alive else account for number, account in enumerate(self.accounts)]

    def now(self) -> Counter[str]:
        """The bytes of each account."""
        return self._sums(len(self.entries))

    def peak(self) -> tuple[Counter[str], int]:
        """The bytes of each account when all together were most, and how many entries there were then."""
        total = most = at = 0
        for position, (_, size) in enumerate(self.entries, 1):
            total += size
            if total > most:
                most, at = total, position
        return self._sums(at), at

    def _sums(self, until: int) -> Counter[str]:
        sums: Counter[str] = Counter()
        for number, size in self.entries[:until]:
            sums[self.accounts[number]] += size
        return sums


def parts_of(t: Tensor) -> list[Tensor]:
    """The plain tensors that a tensor consists of."""
    if is_traceable_wrapper_subclass(t):
        names, _ = t.__tensor_flatten__()
        return [part for name in names for part in parts_of(getattr(t, name))]
    return [t._indices(), t._values()] if t.is_sparse else [t]


def stand_ins(model: nn.Module, mode: FakeTensorMode, device: str = "cpu") -> None:
    """Put a stand-in on a device in place of each of a module's tensors that is on the meta device, ties kept."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def stand_in(t: Tensor) -> Tensor:
        if is_traceable_wrapper_subclass(t):
            names, rest = t.__tensor_flatten__()
            inner = {name: stand_in(getattr(t, name)) for name in names}
            return type(t).__tensor_unflatten__(inner, rest, t.shape, t.stride())  # type: ignore[attr-defined]
        with mode:
            return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is None or t.device.type != "meta":
                    continue
                if id(t) not in made:
                    new = stand_in(t)
                    made[id(t)] = t, nn.Parameter(new, t.requires_grad) if isinstance(t, nn.Parameter) else new
                table[name] = made[id(t)][1]  # type: ignore[assignment]
