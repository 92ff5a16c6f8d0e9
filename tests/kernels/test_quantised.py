"""Codes, scales and products in 4 and 8 bits: bitsandbytes' numbers to the bit, and nothing dequantised that is kept."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.kernels.quantised import (
    FORMATS,
    dequantize_rows,
    dequantize_scales,
    dynamic_levels,
    levels,
    quantize_blocks,
    quantize_rows,
    quantize_scales,
    rounded,
)
from inlay.kernels.quantised_tensor import QuantizedTensor

CPU = torch.device("cpu")


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (0.02 * torch.randn(*shape, generator=torch.Generator().manual_seed(1))).to(dtype)


# ---- bitsandbytes -------------------------------------------------------------------------------------------------------------------
def test_levels() -> None:
    for to in ("nf4", "fp4"):
        assert torch.equal(levels(to, CPU), bnb.get_4bit_type(to, device="cpu"))
    assert torch.equal(dynamic_levels(CPU), bnb.create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 128, 4096])
@pytest.mark.parametrize("shape", [(512, 256), (33, 50), (7, 9), (1, 3), (700, 300)], ids=str)
@pytest.mark.parametrize("to", ["nf4", "fp4"])
def test_codes_and_scales_of_bitsandbytes(to: str, shape: tuple[int, ...], block: int, dtype: torch.dtype) -> None:
    w = weight(*shape, dtype=dtype)
    codes, scales = quantize_blocks(w, to, block)
    theirs, state = bnb.quantize_4bit(w, quant_type=to, blocksize=block)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales, state.absmax)
    nested, largest, offset = quantize_scales(scales)
    _, state = bnb.quantize_4bit(w, quant_type=to, blocksize=block, compress_statistics=True)
    assert torch.equal(nested, state.absmax)
    assert torch.equal(largest, state.state2.absmax)
    assert torch.equal(offset, state.offset)
    restored = bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    assert torch.equal(dequantize_scales(nested, largest, offset, state.state2.code), restored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
# Where rows are no multiple of the block, bitsandbytes' kernel for the CPU takes scales of other blocks.
@pytest.mark.parametrize("shape", [(512, 256), (3, 64), (700, 320)], ids=str)
@pytest.mark.parametrize("to", ["nf4", "fp4"])
def test_numbers_of_bitsandbytes(to: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    w = weight(*shape, dtype=dtype)
    theirs = bnb.dequantize_4bit(*bnb.quantize_4bit(w, quant_type=to, compress_statistics=True))
    assert torch.equal(QuantizedTensor.of(w, to).dequantize(), theirs)


def test_whole_numbers_of_bitsandbytes() -> None:
    w = weight(40, 96).half()
    codes, scales = quantize_rows(w)
    theirs, largest, _ = bnb.int8_vectorwise_quant(w)
    assert torch.equal(codes, theirs)
    assert torch.equal(scales, largest)
    assert torch.equal(dequantize_rows(codes, scales, torch.float32), bnb.int8_vectorwise_dequant(theirs, largest))


# ---- as defined ---------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(64,), (3, 50), (2, 5, 64), (1, 7)], ids=str)
@pytest.mark.parametrize("to", ["nf4", "fp4", "int4"])
def test_each_number_goes_to_the_nearest_level_of_its_block(to: str, shape: tuple[int, ...]) -> None:
    w = weight(*shape)
    found, by_code = rounded(w, to).flatten(), levels(to, CPU)
    flat = w.flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        best = (block.unsqueeze(1) - block.abs().max() * by_code).abs().amin(1)
        torch.testing.assert_close((block - found[start : start + 64]).abs(), best, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("to", FORMATS)
def test_what_was_rounded_stays_and_zero_is_zero(to: str) -> None:
    once = rounded(weight(8, 96), to)
    torch.testing.assert_close(rounded(once, to), once, rtol=1e-6, atol=1e-7)
    assert not rounded(torch.zeros(4, 64), to).any()
    assert not QuantizedTensor.of(torch.zeros(4, 64), to).dequantize().any()


def test_errors_and_bytes() -> None:
    w = weight(256, 1024)
    errors = {to: ((QuantizedTensor.of(w, to).dequantize() - w).norm() / w.norm()).item() for to in FORMATS}
    assert errors["int8"] < 0.01 < 0.08 < errors["nf4"] < errors["int4"] < errors["fp4"] < 0.15
    assert QuantizedTensor.of(w, "nf4").stored_bytes / w.numel() == pytest.approx(0.5 + 1 / 64 + 4 / (64 * 256) + 4 / w.numel())
    assert QuantizedTensor.of(w, "nf4", double=False).stored_bytes / w.numel() == 0.5625
    assert QuantizedTensor.of(w, "int8").stored_bytes / w.numel() == 1 + 4 / 1024


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="'nf5'.*nf4"):
        QuantizedTensor.of(weight(4, 4), "nf5")
    with pytest.raises(ValueError, match="power of two"):
        QuantizedTensor.of(weight(4, 4), "nf4", block=48)


# ---- a layer ------------------------------------------------------------------------------------------------------------------------
def layers(to: str, dtype: torch.dtype = torch.float32, outs: int = 40, **options: Any) -> tuple[nn.Linear, nn.Linear]:
    """A quantised layer and the dense one that it stands for."""
    quantised, dense = nn.Linear(96, outs, dtype=dtype), nn.Linear(96, outs, dtype=dtype)
    q = QuantizedTensor.of(weight(outs, 96, dtype=dtype), to, **options)
    quantised.weight = nn.Parameter(q, requires_grad=False)
    quantised.bias.requires_grad_(False)
    dense.requires_grad_(False)
    dense.weight.copy_(q.dequantize())
    dense.bias.copy_(quantised.bias)
    return quantised, dense


@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("outs", [40, 7000])
def test_forward_and_backward(to: str, outs: int) -> None:
    quantised, dense = layers(to, torch.float64, outs)
    x = torch.randn(3, 5, 96, dtype=torch.float64, requires_grad=True)
    y, expected = quantised(x), dense(x)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    g = torch.randn_like(y)
    ours, theirs = (torch.autograd.grad((out * g).sum(), x)[0] for out in (y, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    with torch.inference_mode():
        torch.testing.assert_close(quantised(x), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("rows", [4, 2000])
def test_nothing_dequantised_is_kept(rows: int) -> None:
    quantised, _ = layers("nf4")
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        quantised(torch.randn(rows, 96, requires_grad=True))
    for t in kept:
        assert isinstance(t, QuantizedTensor) or t.numel() != 40 * 96, t.shape


@pytest.mark.parametrize("to", FORMATS)
def test_copies_and_conversions(to: str) -> None:
    quantised, _ = layers(to)
    x = torch.randn(2, 96)
    y = quantised(x)
    saved = io.BytesIO()
    torch.save(quantised, saved)
    saved.seek(0)
    for other in (copy.deepcopy(quantised), pickle.loads(pickle.dumps(quantised)), torch.load(saved, weights_only=False)):
        assert type(other) is nn.Linear
        assert isinstance(other.weight, nn.Parameter)
        assert isinstance(other.weight, QuantizedTensor)
        assert other.weight.codes.data_ptr() != quantised.weight.codes.data_ptr()  # type: ignore[union-attr]
        assert torch.equal(other(x), y)
    half = copy.deepcopy(quantised).to(torch.bfloat16)
    assert half.weight.dtype is torch.bfloat16
    assert half(x.bfloat16()).dtype is torch.bfloat16
    torch.testing.assert_close(half(x.bfloat16()).float(), y, rtol=0.03, atol=0.02)
    # Nothing was lost on the way.
    assert torch.equal(half.float().weight.codes, quantised.weight.codes)  # type: ignore[union-attr]
    assert quantised.to("meta").weight.device.type == "meta"


def test_compute_dtype_and_autocast() -> None:
    quantised, dense = layers("nf4", compute_dtype=torch.float64)
    x = torch.randn(2, 96)
    y = quantised(x)
    assert y.dtype is torch.float32
    torch.testing.assert_close(y, dense.double()(x.double()).float(), rtol=1e-6, atol=1e-7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layers("nf4")[0](x).dtype is torch.bfloat16


@pytest.mark.parametrize("to", FORMATS)
def test_compiled(to: str) -> None:
    quantised, dense = layers(to)
    compiled: Any = torch.compile(quantised, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 96, requires_grad=True)
    y = compiled(x)
    torch.testing.assert_close(y, dense(x))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(dense(x).sum(), x)[0])


def test_any_other_operation_sees_the_numbers() -> None:
    q = QuantizedTensor.of(weight(8, 64), "nf4")
    w = q.dequantize()
    a, b = torch.randn(4, 64), torch.randn(8, 4)
    assert torch.equal(q + 1, w + 1)
    assert torch.equal(q.t().contiguous(), w.t())
    torch.testing.assert_close(torch.addmm(q, b, a, alpha=0.5), torch.addmm(w, b, a, alpha=0.5))
    torch.testing.assert_close(q.norm(), w.norm())
    assert torch.equal(F.embedding(torch.tensor([3, 3, 0]), q), w[[3, 3, 0]])
    stack = QuantizedTensor.of(weight(3, 8, 64), "nf4")
    assert torch.equal(stack[1].dequantize(), stack.dequantize()[1])
    assert isinstance(stack[1], QuantizedTensor)
    assert "nf4" in repr(q)
