"""Triton's kernels of codes against what the CPU makes of them; without a GPU by Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.kernels.quantised import dequantize_blocks, dequantize_rows, levels, quantize_blocks, quantize_rows
from inlay.kernels.quantised_triton import dequantize_on_gpu, product_on_gpu

WHERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.bfloat16]


def stored(to: str, rows: int, width: int, block: int = 64) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, int]]:
    """A matrix as its codes stand for it, and those codes, scales, levels and their block."""
    w = torch.randn(rows, width, generator=torch.Generator().manual_seed(7))
    if to == "int8":
        codes, scales = quantize_rows(w)
        return dequantize_rows(codes, scales, torch.float32), (codes.to(WHERE), scales.to(WHERE), scales.to(WHERE), width)
    codes, scales = quantize_blocks(w, to, block)
    found = dequantize_blocks(codes, scales, to, block, w.numel(), torch.float32).view(rows, width)
    return found, (codes.to(WHERE), scales.to(WHERE), levels(to, torch.device(WHERE)), block)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width", "block"), [(33, 70, 64), (1, 7, 64), (24, 128, 32), (5, 205, 128)])
@pytest.mark.parametrize("to", ["nf4", "fp4", "int4", "int8"])
def test_back_to_numbers(to: str, rows: int, width: int, block: int, dtype: torch.dtype) -> None:
    expected, (codes, scales, table, block) = stored(to, rows, width, block)
    found = dequantize_on_gpu(codes, scales, table, block, torch.empty(rows, width, dtype=dtype, device=WHERE)).cpu()
    # The interpreter cuts the digits off that a GPU rounds.
    tolerance = {"rtol": 0.0, "atol": 0.0} if dtype == torch.float32 else {"rtol": 2**-7, "atol": 0.0}
    torch.testing.assert_close(found, expected.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("count", [1, 5, 17])
@pytest.mark.parametrize("to", ["nf4", "fp4", "int4", "int8"])
def test_products_from_codes(to: str, count: int, turned: bool, dtype: torch.dtype) -> None:
    w, (codes, scales, table, block) = stored(to, 35, 70)
    w = w.T if turned else w
    x = torch.randn(count, len(w)).to(dtype)
    found = product_on_gpu(x.to(WHERE), codes, scales, table, block, (35, 70), turned).cpu()
    assert found.dtype == dtype
    expected = x.double() @ w.to(dtype).double()
    # The interpreter cuts off what does not fit into bfloat16: of each weight, and of the sum.
    cut = 1e-6 if dtype == torch.float32 else 2**-6
    assert ((found.double() - expected).abs() <= cut * (x.double().abs() @ w.double().abs())).all()
