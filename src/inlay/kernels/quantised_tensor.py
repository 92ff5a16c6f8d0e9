"""A tensor that is stored in 4 or 8 bits and looks like the one that it stands for.

It has the shape, dtype and device of the original, so a layer keeps its class and its forward. Products and look-ups read it in
pieces, any other operation gets a passing copy of all of it, and what autograd saves of it are the codes: nothing keeps a
dequantised copy, and the backward pass makes the pieces again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from math import gcd, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_map_only

from .quantised import (
    NESTED,
    check,
    dequantize_blocks,
    dequantize_rows,
    dequantize_scales,
    dynamic_levels,
    has_triton,
    levels,
    quantize_blocks,
    quantize_rows,
    quantize_scales,
    traced,
)  # fmt: skip

aten = torch.ops.aten
# Numbers in one piece of a product: enough rows that the product runs at its full speed.
PRODUCT = 1 << 19
INNER = ("codes", "absmax", "nested_absmax", "offset", "nested_map")


class QuantizedTensor(Tensor):
    """
    Attributes:
        codes: ``(ceil(n / 2), 1)``, uint8, two codes a byte; or whole numbers, int8, in the stored shape.
        absmax: a scale a block, float32 or, with double quantisation, codes; a scale a row for whole numbers.
        nested_absmax, offset, nested_map: of double quantisation, else None.
        to_format: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"int8"``.
        stored: the shape in the order of memory.
        transposed: the last two axes are seen the other way round.
        compute_dtype: the dtype of products, where it is not the tensor's own.
    """

    codes: Tensor
    absmax: Tensor
    nested_absmax: Tensor | None
    offset: Tensor | None
    nested_map: Tensor | None

    @staticmethod
    def __new__(
        cls: type[QuantizedTensor],
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        nested_map: Tensor | None,
        to_format: str,
        block: int,
        stored: tuple[int, ...],
        transposed: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> QuantizedTensor:
        shape, strides = list(stored), [prod(stored[i + 1 :]) for i in range(len(stored))]
        if transposed:
            shape[-2:], strides[-2:] = shape[:-3:-1], strides[:-3:-1]
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, shape, strides=strides, dtype=dtype, device=codes.device, requires_grad=False
        )

    def __init__(
        self,
        codes: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor | None,
        offset: Tensor | None,
        nested_map: Tensor | None,
        to_format: str,
        block: int,
        stored: tuple[int, ...],
        transposed: bool,
        dtype: torch.dtype,
        compute_dtype: torch.dtype | None,
    ) -> None:
        self.codes, self.absmax, self.nested_absmax, self.offset, self.nested_map = codes, absmax, nested_absmax, offset, nested_map
        self.to_format, self.block, self.stored, self.transposed, self.compute_dtype = (
            to_format,
            block,
            tuple(stored),
            transposed,
            compute_dtype,
        )

    # ---- making it ----------------------------------------------------------------------------------------------------------------
    @classmethod
    def of(
        cls,
        w: Tensor,
        to: str,
        *,
        block: int = 64,
        double: bool = True,
        transposed: bool = False,
        compute_dtype: torch.dtype | None = None,
    ) -> QuantizedTensor:
        """A tensor in another format.

        Args:
            w: any floating dtype.
            double: quantise the blocks' scales, too.
            transposed: store the last two axes the other way round, so that blocks run along the inputs of an ``(in, out)`` weight.
        """
        check(to, block)
        own = (w.mT if transposed else w).contiguous()
        nested: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if to == "int8":
            codes, absmax = quantize_rows(own)
        else:
            codes, absmax = quantize_blocks(own, to, block)
            if double:
                absmax, largest, offset = quantize_scales(absmax)
                nested = largest, offset, dynamic_levels(w.device)
        return cls(codes, absmax, *nested, to, block, tuple(own.shape), transposed, w.dtype, compute_dtype)

    def again(self, w: Tensor) -> QuantizedTensor:
        """Another tensor as this one is stored."""
        new = QuantizedTensor.of(
            w.to(self.device),
            self.to_format,
            block=self.block,
            double=self.nested_absmax is not None,
            transposed=self.transposed,
            compute_dtype=self.compute_dtype,
        )
        return new._as(self.dtype)

    def _with(self, inner: Mapping[str, Tensor | None], **changes: Any) -> QuantizedTensor:
        rest: dict[str, Any] = self._rest() | changes
        tensors: dict[str, Any] = {name: inner[name] for name in INNER}
        return QuantizedTensor(**tensors, **rest)

    def _rest(self) -> dict[str, Any]:
        return {
            "to_format": self.to_format,
            "block": self.block,
            "stored": self.stored,
            "transposed": self.transposed,
            "dtype": self.dtype,
            "compute_dtype": self.compute_dtype,
        }

    @property
    def inner(self) -> dict[str, Tensor | None]:
        """What it is stored as."""
        return {name: getattr(self, name) for name in INNER}

    def _as(self, dtype: torch.dtype) -> QuantizedTensor:
        return self if dtype == self.dtype else self._with(self.inner, dtype=dtype)

    def _mapped(self, fn: Callable[[Tensor], Tensor], **changes: Any) -> QuantizedTensor:
        return self._with({name: None if t is None else fn(t) for name, t in self.inner.items()}, **changes)

    # ---- torch's protocols --------------------------------------------------------------------------------------------------------
    def __tensor_flatten__(self) -> tuple[list[str], dict[str, Any]]:
        return [name for name, t in self.inner.items() if t is not None], self._rest()

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], rest: dict[str, Any], _: Any, __: Any) -> QuantizedTensor:
        tensors: dict[str, Any] = {name: inner.get(name) for name in INNER}
        return QuantizedTensor(**tensors, **rest)

    def __reduce_ex__(self, _: Any) -> Any:
        further = {k: v for k, v in self.__dict__.items() if k not in INNER and k not in self._rest()}
        return _revive, (self.inner, self._rest(), further)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) not in memo:
            further = {k: v for k, v in self.__dict__.items() if k not in INNER and k not in self._rest()}
            memo[id(self)] = _revive({k: None if t is None else t.clone() for k, t in self.inner.items()}, self._rest(), further)
        return memo[id(self)]

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"QuantizedTensor({self.to_format}, {tuple(self.shape)}, {self.dtype}, {self.device})"

    # Operations go to `__torch_dispatch__`, below autograd.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        known = _OPERATIONS.get(func)
        if known is not None:
            found = known(func, *args, **kwargs)
            if found is not NotImplemented:
                return found
        args, kwargs = tree_map_only(QuantizedTensor, lambda t: t.dequantize(), (args, kwargs))
        return func(*args, **kwargs)  # pyright: ignore[reportCallIssue]

    # ---- what it stands for -------------------------------------------------------------------------------------------------------
    @property
    def scales(self) -> Tensor:
        """A scale a block (a row), float32."""
        if self.nested_absmax is None:
            return self.absmax
        return dequantize_scales(self.absmax, self.nested_absmax, self.offset, self.nested_map)  # type: ignore[arg-type]

    @property
    def stored_bytes(self) -> int:
        """The bytes of what it is stored as, without the levels that all tensors share."""
        return sum(t.numel() * t.element_size() for name, t in self.inner.items() if t is not None and name != "nested_map")

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """The tensor in floating point: a new one."""
        dtype = dtype or self.dtype
        if self.to_format == "int8":
            w = dequantize_rows(self.codes.reshape(-1, self.stored[-1]), self.scales, dtype)
        else:
            w = dequantize_blocks(self.codes, self.scales, self.to_format, self.block, prod(self.stored), dtype)
        w = w.view(self.stored)
        return w.mT if self.transposed else w

    def _rows_together(self) -> int:
        """Of so many stored rows a multiple begins and ends with a block."""
        return 1 if self.to_format == "int8" else self.block // gcd(self.block, self.stored[-1])

    def rows(self, start: int, stop: int, scales: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
        """Stored rows ``(stop - start, width)`` in floating point; ``start`` is a multiple of `_rows_together`.

        Args:
            scales: those of the whole tensor.
            out: a buffer of at least this size.
        """
        width = self.stored[-1]
        n = (stop - start) * width
        flat = None if out is None else out[:n]
        if self.to_format == "int8":
            codes = self.codes.reshape(-1, width)[start:stop]
            return dequantize_rows(codes, scales[start:stop], dtype, None if flat is None else flat.view(-1, width))
        codes = self.codes.reshape(-1)[start * width // 2 : -(-stop * width // 2)]
        blocks = scales[start * width // self.block : -(-stop * width // self.block)]
        return dequantize_blocks(codes, blocks, self.to_format, self.block, n, dtype, flat).view(-1, width)

    def pieces(self, dtype: torch.dtype) -> Iterable[tuple[int, int, Tensor]]:
        """The stored matrix piece by piece in one buffer: first row, last row and the rows."""
        count, width = self.stored
        together, scales = self._rows_together(), self.scales
        step = max(PRODUCT // width // together, 1) * together
        if traced(self.codes) or self.device.type != "cpu" or count <= step:
            yield 0, count, self.rows(0, count, scales, dtype)
            return
        buffer = torch.empty(step * width, dtype=dtype, device=self.device)
        for start in range(0, count, step):
            stop = min(start + step, count)
            yield start, stop, self.rows(start, stop, scales, dtype, buffer)

    # ---- files --------------------------------------------------------------------------------------------------------------------
    def to_file(self) -> dict[str, Tensor]:
        """Its tensors by the end of their keys, as bitsandbytes writes them: ``""`` are the codes."""
        if self.to_format == "int8":
            return {"": self.codes, "SCB": self.absmax, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        described: dict[str, Any] = {
            "quant_type": self.to_format,
            "blocksize": self.block,
            "dtype": str(self.dtype).removeprefix("torch."),
            "shape": self.stored,
        }
        found = {"": self.codes, "absmax": self.absmax, "quant_map": levels(self.to_format, self.device).clone()}
        if self.nested_absmax is not None and self.offset is not None and self.nested_map is not None:
            found |= {"nested_absmax": self.nested_absmax, "nested_quant_map": self.nested_map.clone()}
            described |= {"nested_blocksize": NESTED, "nested_dtype": "float32", "nested_offset": self.offset.item()}
        maker = "inlay" if self.to_format == "int4" else "bitsandbytes"
        found[f"quant_state.{maker}__{self.to_format}"] = torch.tensor(list(json.dumps(described).encode()), dtype=torch.uint8)
        return found

    @staticmethod
    def from_file(
        tensors: Mapping[str, Tensor], transposed: bool, dtype: torch.dtype, compute_dtype: torch.dtype | None = None
    ) -> QuantizedTensor:
        """The inverse of `to_file`.

        Args:
            transposed: the layer sees what is in the file the other way round.
            dtype: that of the tensor it stands for.

        Raises:
            ValueError: the file's tensors are of another kind, or do not fit each other.
        """
        codes = tensors[""]
        if "SCB" in tensors:
            return QuantizedTensor(
                codes, tensors["SCB"].float(), None, None, None, "int8", 64, tuple(codes.shape), transposed, dtype, compute_dtype
            )
        key = next((k for k in tensors if k.startswith("quant_state.")), None)
        if key is None:
            raise ValueError(f"These are no tensors in 4 bits: {', '.join(tensors)}.")
        described = json.loads(bytes(tensors[key].cpu().tolist()))
        to, block, shape = described["quant_type"], described["blocksize"], tuple(described["shape"])
        check(to, block)
        n = prod(shape)
        absmax, device = tensors["absmax"], codes.device
        codes = codes.view(torch.uint8).reshape(-1, 1)
        if len(codes) != -(-n // 2) or len(absmax) != -(-n // block):
            raise ValueError(f"{len(codes)} bytes and {len(absmax)} scales in blocks of {block} do not make a tensor of shape {shape}.")
        nested: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        if "nested_absmax" in tensors:
            if described.get("nested_blocksize", NESTED) != NESTED:
                raise ValueError(f"Scales are read in blocks of {NESTED}, not {described['nested_blocksize']}.")
            offset = torch.tensor(described["nested_offset"], dtype=torch.float32, device=device)
            nested = tensors["nested_absmax"], offset, tensors["nested_quant_map"]
        return QuantizedTensor(codes, absmax, *nested, to, block, shape, transposed, dtype, compute_dtype)


def _revive(inner: dict[str, Tensor | None], rest: dict[str, Any], further: dict[str, Any]) -> QuantizedTensor:
    new = QuantizedTensor(**inner, **rest)  # type: ignore[arg-type]
    vars(new).update(further)
    return new


# ---- products -----------------------------------------------------------------------------------------------------------------------
def _product(x: Tensor, q: QuantizedTensor) -> Tensor:
    """``x q`` for ``x (rows, .)``, in pieces of the stored matrix."""
    dtype = q.compute_dtype or x.dtype
    rows = x.to(dtype)
    if q.device.type == "cuda" and has_triton() and dtype.itemsize <= 4 and not traced(q.codes):
        from .quantised_triton import FEW_ROWS, product_on_gpu

        if len(rows) <= FEW_ROWS:
            scales = q.scales
            whole = q.to_format == "int8"
            table, block = (scales, q.stored[1]) if whole else (levels(q.to_format, q.device), q.block)
            return product_on_gpu(rows, q.codes, scales, table, block, q.stored, q.transposed).to(x.dtype)
    pieces = q.pieces(dtype)
    if traced(q.codes):
        (_, _, w), *_ = pieces
        return (rows @ (w.mT if q.transposed else w)).to(x.dtype)
    y = torch.empty(len(rows), q.shape[1], dtype=dtype, device=rows.device)
    for start, stop, w in pieces:
        if q.transposed:
            torch.mm(rows, w.mT, out=y[:, start:stop])
        elif start:
            y.addmm_(rows[:, start:stop], w)
        else:
            torch.mm(rows[:, :stop], w, out=y)
    return y.to(x.dtype)


def _mm(_: Any, x: Any, w: Any) -> Any:
    if isinstance(x, QuantizedTensor):
        return NotImplemented if isinstance(w, QuantizedTensor) else _product(w.t(), _flipped(x)).t()
    return _product(x, w)


def _addmm(func: Any, bias: Any, x: Any, w: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if isinstance(bias, QuantizedTensor):
        # The passing copy is what the product is added to: `W + B A` costs one.
        if isinstance(x, QuantizedTensor) or isinstance(w, QuantizedTensor):
            return NotImplemented
        return bias.dequantize().addmm_(x, w, beta=beta, alpha=alpha)
    if isinstance(x, QuantizedTensor):
        return NotImplemented
    y = _product(x, w)
    return (y if alpha == 1 else y.mul_(alpha)).add_(bias, alpha=beta)


def _linear(_: Any, x: Tensor, w: Any, bias: Tensor | None = None) -> Any:
    if isinstance(x, QuantizedTensor) or not isinstance(w, QuantizedTensor) or w.ndim != 2:
        return NotImplemented
    y = _product(x.reshape(-1, x.shape[-1]), _flipped(w)).view(*x.shape[:-1], w.shape[0])
    return y if bias is None else y + bias


def _embedding(_: Any, w: QuantizedTensor, ids: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Only the rows that are looked up."""
    if w.transposed or w.ndim != 2 or (w.to_format != "int8" and w.stored[1] % w.block):
        return NotImplemented
    flat, width = ids.reshape(-1), w.stored[1]
    if w.to_format == "int8":
        found = dequantize_rows(w.codes[flat], w.scales[flat], w.dtype)
    else:
        codes, scales = w.codes.view(-1, width // 2)[flat], w.scales.view(-1, width // w.block)[flat]
        found = dequantize_blocks(codes, scales.view(-1), w.to_format, w.block, len(flat) * width, w.dtype)
    return found.view(*ids.shape, width)


# ---- seen otherwise -------------------------------------------------------------------------------------------------------------------
def _flipped(q: QuantizedTensor) -> QuantizedTensor:
    return q._with(q.inner, transposed=not q.transposed)


def _transpose(func: Any, q: QuantizedTensor, *axes: Any) -> Any:
    if q.ndim < 2 or (axes and {axis % q.ndim for axis in axes} != {q.ndim - 2, q.ndim - 1}):
        return NotImplemented
    return return_and_correct_aliasing(func, (q, *axes), {}, _flipped(q))


def _select(func: Any, q: QuantizedTensor, axis: int, index: int) -> Any:
    """One matrix of a stack."""
    if q.ndim != 3 or axis % 3 != 0:
        return NotImplemented
    if func is aten.select.int and (traced(q.codes) or torch._C._functorch.peek_interpreter_stack() is not None):  # type: ignore[attr-defined]
        return NotImplemented
    count, rows, width = q.stored
    index, size = index % count, rows * width
    inner: dict[str, Tensor | None] = dict.fromkeys(INNER)
    if q.to_format == "int8":
        inner |= {"codes": q.codes[index], "absmax": q.absmax[index * rows : (index + 1) * rows]}
    elif size % q.block or size % 2:
        return NotImplemented
    else:
        blocks = slice(index * size // q.block, (index + 1) * size // q.block)
        inner |= {"codes": q.codes[index * size // 2 : (index + 1) * size // 2], "absmax": q.scales[blocks]}
    return return_and_correct_aliasing(func, (q, axis, index), {}, q._with(inner, stored=(rows, width)))


def _detach(func: Any, q: QuantizedTensor) -> Any:
    return return_and_correct_aliasing(func, (q,), {}, q._mapped(lambda t: t.detach()))


def _clone(_: Any, q: QuantizedTensor, **__: Any) -> QuantizedTensor:
    return q._mapped(lambda t: t.clone())


def _to_copy(_: Any, q: QuantizedTensor, **options: Any) -> QuantizedTensor:
    """A device for the codes; a dtype is that of what they stand for."""
    dtype = options.get("dtype") or q.dtype
    if not dtype.is_floating_point:
        return NotImplemented
    moving = {k: options[k] for k in ("device", "non_blocking") if options.get(k) is not None}
    return q._mapped(lambda t: t.to(**moving) if moving else t.clone(), dtype=dtype)


def _copy(_: Any, q: Any, source: Tensor, *__: Any) -> Any:
    if not isinstance(q, QuantizedTensor):
        return NotImplemented
    same = isinstance(source, QuantizedTensor) and source.__tensor_flatten__() == q.__tensor_flatten__()
    new = source if same else q.again(source.dequantize() if isinstance(source, QuantizedTensor) else source)
    for name, own in q.inner.items():
        if own is not None:
            own.copy_(getattr(new, name))
    return q


_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.mm.default: _mm,
    aten.addmm.default: _addmm,
    aten.linear.default: _linear,
    aten.embedding.default: _embedding,
    aten.t.default: _transpose,
    aten.transpose.int: _transpose,
    aten.numpy_T.default: _transpose,
    aten.select.int: _select,
    aten.detach.default: _detach,
    aten.alias.default: _detach,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy,
}
