"""Layouts: how an operator's weight is a matrix ``(*batch, out, in)``, and how to apply the operator with another one.

A `Site` is one weight of one module. It knows nothing of methods and nothing of how the weight is stored. Batch axes are
there where one tensor holds several independent matrices: the groups of a convolution, the experts of a stack.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .stores import DENSE, Store, alike, store_of

Layout = TypeVar("Layout", bound="type[Site]")
LAYOUTS: dict[str, type[Site]] = {}


def layout(*hosts: type[nn.Module] | str) -> Callable[[Layout], Layout]:
    """Register a layout for host classes, given as classes or, for those of libraries that may be absent, by dotted name."""

    def register(cls: Layout) -> Layout:
        for host in hosts:
            LAYOUTS[host if isinstance(host, str) else f"{host.__module__}.{host.__qualname__}"] = cls
        return cls

    return register


def site_of(module: nn.Module) -> Site | None:
    """The site of a module's own weight, or None where the module has no weight that we know as a matrix."""
    # Knowing the stores is knowing the layouts of their hosts.
    store_of(module)
    for cls in type(module).__mro__:
        found = LAYOUTS.get(f"{cls.__module__}.{cls.__qualname__}")
        if found is not None:
            return found(module)
    weight = module._parameters.get("weight")
    if weight is not None and weight.ndim == 1 and type(module).__name__.endswith("Norm"):
        return Norm(module)
    return None


class Site:
    """A weight seen as a matrix ``(out, in)``; this base class is the layout of ``nn.Linear``.

    Attributes:
        module: the host.
        name: the weight's name in the host.
        bias_name: the name of the bias that goes with it.
        reads: the host reads its weight itself (a norm, an attention's packed projection, an expert stack), so an adapter
            acts by what the host reads, not by what goes in and comes out.
    """

    reads = False
    # Hosts are of many types; each layout knows the attributes of its own.
    module: Any
    # What the host held as its own weight and bias while others are in their place.
    kept: tuple[Any, Tensor | None] | None = None
    # A weight to be read in place of the host's: what it was before it was quantised.
    original: Tensor | None = None
    _shape: torch.Size | None = None

    def __init__(self, module: nn.Module, name: str = "weight", bias_name: str | None = "bias") -> None:
        self.module, self.name, self.bias_name = module, name, bias_name
        self.store: Store = store_of(module, name)

    @property
    def unfit(self) -> str:
        """Why the host's output is no linear function of its weight; empty where it is."""
        return ""

    # ---- shapes -------------------------------------------------------------------------------------------------------
    @property
    def raw_shape(self) -> torch.Size:
        """The shape in which the host keeps its weight."""
        return self.store.shape(self.module, self.name)

    @property
    def shape(self) -> torch.Size:
        """``(*batch, out, in)``."""
        # Not `cached_property`, whose lock the compiler does not follow before Python 3.12.
        if self._shape is None:
            self._shape = self.matrix(torch.empty(self.raw_shape, device="meta")).shape
        return self._shape

    @property
    def batch(self) -> torch.Size:
        return self.shape[:-2]

    @property
    def kernel(self) -> tuple[int, ...]:
        """The extent of a convolution's kernel; empty elsewhere."""
        return ()

    def size(self, axis: str | int) -> int:
        """The length of a named axis; numbers are themselves.

        ``"out"``, ``"in"``, ``"channel"`` (rows that share a bias count as one), ``"feature"`` (so do columns of one input channel).
        """
        if isinstance(axis, int):
            return axis
        out, inner = self.shape[-2:]
        return {"out": out, "in": inner, "channel": out // self._rows_per_channel, "feature": inner // self._columns_per_feature}[axis]

    _rows_per_channel = 1
    _columns_per_feature = 1

    def matrix(self, raw: Tensor) -> Tensor:
        """The host's tensor as ``(*batch, out, in)``: a view."""
        return raw

    def raw(self, matrix: Tensor) -> Tensor:
        """The inverse of `matrix`."""
        return matrix

    def in_file(self, axes: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        """A parameter with these axes as the file format of HF peft has it."""
        return tensor

    def from_file(self, axes: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        """The inverse of `in_file`."""
        return tensor.reshape(*self.batch, *map(self.size, axes))

    # ---- reading and writing ------------------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return self.store.device(self.module, self.name)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the host computes; float32 where the store has none of its own."""
        return self.store.dtype(self.module, self.name)

    def bias(self) -> Tensor | None:
        """The host's own bias, also while adapters are merged."""
        stored = self._stored_bias if self.kept is None else self.kept[1]
        return None if stored is None else self.store.bias(stored)

    @property
    def _stored_bias(self) -> Tensor | None:
        return self._bias_table.get(self.bias_name) if self.bias_name else None

    @property
    def _bias_table(self) -> dict[str, Any]:
        """Where the host has its bias: most have a parameter, some quantisers a buffer or a bare tensor."""
        m = self.module
        if self.store.dense or self.bias_name in m._parameters:
            return m._parameters
        return m._buffers if self.bias_name in m._buffers else vars(m)

    def read(self) -> tuple[Tensor, Tensor | None]:
        """The host's own weight as a matrix and its bias, also while adapters are merged."""
        if self.original is not None:
            return self.matrix(self.original), self.bias()
        if self.kept is not None:
            return self.matrix(self.store.read_tensor(self.kept[0])), self.bias()
        return self.matrix(self.store.read(self.module, self.name)), self.bias()

    def replace(self, weight: Tensor | None, bias: Tensor | None, fresh: bool = False) -> None:
        """Put another weight and bias in the place of the host's, whose own tensors are kept as they are for `restore`.

        Args:
            weight: ``(*batch, out, in)``, any floating dtype; it is rounded once. None is the host's own, as it is stored.
            bias: ``(channels,)`` or None.
            fresh: nothing else holds the weight's memory, so that the host may have it without a copy.

        Raises:
            TypeError: the host computes its weight, or its store cannot be written to.
        """
        why = self.store.unwritable(self.module, self.name)
        if why:
            raise TypeError(why)
        if self.kept is None:
            self.kept = self.store.held(self.module, self.name), self._stored_bias
        raw = None if weight is None else self.raw(weight)
        if raw is None:
            self.store.put(self.module, self.name, self.kept[0])
        elif fresh and self.store is DENSE and alike(raw, self.kept[0]):
            self.store.put(self.module, self.name, nn.Parameter(raw.detach(), requires_grad=self.kept[0].requires_grad))
        else:
            self.store.write(self.module, self.name, raw)
        if self.bias_name and bias is not self.kept[1]:
            table, old = self._bias_table, self.kept[1]
            new = None if bias is None else bias.detach().to(self.dtype) if old is None else self.store.like(old, bias.to(self.dtype))
            table[self.bias_name] = new if new is None or table is not self.module._parameters else nn.Parameter(new, requires_grad=False)

    def restore(self) -> None:
        """Put the host's own tensors back: the very same ones, to the bit."""
        if self.kept is None:
            return
        self.store.put(self.module, self.name, self.kept[0])
        if self.bias_name and self.bias_name in self._bias_table:
            self._bias_table[self.bias_name] = self.kept[1]
        self.kept = None

    # ---- the operator -------------------------------------------------------------------------------------------------
    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site:
        """This site for one call with further arguments."""
        return self

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """The host's operator on ``x`` with another matrix and bias."""
        if self.store.dense:
            return F.linear(x, weight, bias)
        # Quantised hosts take inputs of any dtype and answer in it.
        return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """The right factor ``a (*batch, r, in)`` of a product, applied to the host's input."""
        return F.linear(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        """The left factor ``b (*batch, out, r)``, applied to what `down` gave."""
        return F.linear(h, b)

    def rows(self, v: Tensor) -> Tensor:
        """A value a channel (or feature) ``(*batch, channel)``, shaped to broadcast against the host's output (or input)."""
        return v

    def spread(self, v: Tensor) -> Tensor:
        """A value a channel, repeated for each row of the matrix: ``(*batch, out)``."""
        return v.repeat_interleave(self._rows_per_channel, -1)

    def spread_in(self, v: Tensor) -> Tensor:
        """A value a feature, repeated for each column of the matrix: ``(*batch, in)``."""
        return v.repeat_interleave(self._columns_per_feature, -1)


@layout(nn.Linear)
class Linear(Site):
    """``nn.Linear``: the weight is the matrix."""


@layout("transformers.pytorch_utils.Conv1D")
class TransposedLinear(Site):
    """GPT-2's ``Conv1D``, which keeps ``(in, out)``."""

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.mT

    def raw(self, matrix: Tensor) -> Tensor:
        return matrix.mT


@layout(nn.Embedding)
class Embedding(TransposedLinear):
    """``nn.Embedding`` as a linear map of one-hot rows: the matrix is ``(dim, tokens)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, bias_name=None)

    @property
    def unfit(self) -> str:
        return "it shortens its rows while it reads them (max_norm)" if self.module.max_norm is not None else ""

    @property
    def _options(self) -> dict[str, Any]:
        m = self.module
        return {"padding_idx": m.padding_idx, "scale_grad_by_freq": m.scale_grad_by_freq}

    def scaled(self, y: Tensor) -> Tensor:
        """Rows of the matrix as the host gives them out: some models (Gemma) multiply what they look up."""
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.scaled(F.embedding(x, weight.mT, **self._options))

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return F.embedding(x, a.mT, **self._options)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self.scaled(F.linear(h, b))


class AnyConv(Site):
    """What convolutions of either direction share: groups as a batch axis, the kernel, broadcasting over channels."""

    @property
    def groups(self) -> int:
        return self.module.groups

    @property
    def kernel(self) -> tuple[int, ...]:
        return tuple(self.module.kernel_size)

    @property
    def _batch(self) -> tuple[int, ...]:
        return (self.groups,) if self.groups > 1 else ()

    def _pointwise(self, x: Tensor, m: Tensor) -> Tensor:
        m = m.flatten(0, -2)
        conv = (F.conv1d, F.conv2d, F.conv3d)[len(self.kernel) - 1]
        return conv(x, m.view(*m.shape, *(1 for _ in self.kernel)), groups=self.groups)

    def rows(self, v: Tensor) -> Tensor:
        return v.reshape(-1, *(1 for _ in self.kernel))


@layout(nn.Conv1d, nn.Conv2d, nn.Conv3d)
class Conv(AnyConv):
    """Convolutions as a matrix on patches: ``(out, in * kernel)``, or ``(groups, out / groups, in / groups * kernel)``.

    torch's own forward applies any other kernel of the same extent, so stride, padding of every mode, dilation and groups
    need no word here.
    """

    @property
    def _columns_per_feature(self) -> int:
        return prod(self.kernel)

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.reshape(*self._batch, -1, prod(raw.shape[1:]))

    def raw(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1, self.module.in_channels // self.groups, *self.kernel)

    def in_file(self, axes: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        if len(axes) != 2:
            return tensor
        kernel = self.kernel if axes[1] == "in" else (1,) * len(self.kernel)
        inner = self.module.in_channels // self.groups if axes[1] == "in" else tensor.shape[-1]
        return tensor.reshape(-1, inner, *kernel)

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.module._conv_forward(x, self.raw(weight), bias)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self.apply(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self._pointwise(h, b)


@layout(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
class ConvTranspose(AnyConv):
    """Transposed convolutions: each input channel goes to ``out * kernel`` places, so the matrix is ``(out * kernel, in)``."""

    output_size: list[int] | None = None

    @property
    def _rows_per_channel(self) -> int:
        return prod(self.kernel)

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.reshape(*self._batch, raw.shape[0] // self.groups, -1).mT

    def raw(self, matrix: Tensor) -> Tensor:
        return matrix.mT.reshape(-1, self.module.out_channels // self.groups, *self.kernel)

    def bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Site:
        output_size = kwargs.get("output_size", args[0] if args else None)
        if output_size is None:
            return self
        # Not `copy.copy`, which the compiler of torch 2.11 does not follow.
        bound = object.__new__(type(self))
        for name in ("module", "name", "bias_name", "store", "kept", "original", "_shape"):
            setattr(bound, name, getattr(self, name))
        bound.output_size = output_size
        return bound

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        m, n = self.module, len(self.kernel)
        padding = m._output_padding(x, self.output_size, m.stride, m.padding, m.kernel_size, n, m.dilation)
        conv = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[n - 1]
        return conv(x, self.raw(weight), bias, m.stride, m.padding, padding, m.groups, m.dilation)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        return self._pointwise(x, a)

    def up(self, h: Tensor, b: Tensor) -> Tensor:
        return self.apply(h, b)


class Read(Site):
    """A weight that its host reads itself. The host's forward with another tensor in that place is the operator."""

    reads = True

    def apply(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        swapped = {self.name: self.raw(weight)}
        if self.bias() is not None and self.bias_name is not None and bias is not None:
            swapped[self.bias_name] = bias
        return torch.func.functional_call(self.module, swapped, x)


@layout(nn.LayerNorm, nn.GroupNorm)
class Norm(Read):
    """The scale of a norm, any LayerNorm or RMSNorm, as a matrix ``(dim, 1)``."""

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.reshape(-1, 1)

    def raw(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(self.raw_shape)


class Whole(Site):
    """A module as a whole, for a method that acts on what goes in and comes out and on no weight."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module, "whole", None)

    @property
    def raw_shape(self) -> torch.Size:
        return torch.Size()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((0, 0))

    @property
    def _any(self) -> Tensor | None:
        return next((q for n, q in self.module.named_parameters() if q.is_floating_point() and "adapters." not in n), None)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if self._any is None else self._any.device

    @property
    def dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self._any is None else self._any.dtype

    def bias(self) -> None:
        return None

    def read(self) -> tuple[Tensor, Tensor | None]:
        raise TypeError(f"A whole {type(self.module).__name__} is no matrix.")


class Stack(Read):
    """A raw ``nn.Parameter``: a matrix, or a stack of experts ``(experts, out, in)``.

    transformers marks hosts that keep ``(experts, in, out)`` with ``is_transposed``. HF peft writes the ranks of a stack side
    by side: A as ``(experts * r, in)``, B as ``(out, r * experts)`` with the experts innermost.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        super().__init__(module, name, f"{name}_bias")

    @property
    def _transposed(self) -> bool:
        return len(self.raw_shape) == 3 and bool(getattr(self.module, "is_transposed", False))

    def matrix(self, raw: Tensor) -> Tensor:
        return raw.mT if self._transposed else raw

    def raw(self, matrix: Tensor) -> Tensor:
        return self.matrix(matrix)

    def in_file(self, axes: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        if len(axes) != 2 or tensor.ndim != 3:
            return tensor
        return tensor.flatten(0, 1) if axes[1] == "in" else tensor.permute(1, 2, 0).flatten(1)

    def from_file(self, axes: tuple[str | int, ...], tensor: Tensor) -> Tensor:
        if len(axes) != 2 or not self.batch or axes[1] == "in":
            return super().from_file(axes, tensor)
        return tensor.reshape(*map(self.size, axes), *self.batch).permute(2, 0, 1).contiguous()
