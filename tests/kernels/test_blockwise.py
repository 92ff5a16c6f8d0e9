"""Blockwise quantisation: levels, bounds, and what it keeps exactly."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.blockwise import dequantize, normal_float_levels, quantize, rounded, uniform_levels

# The table of the paper's authors.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def test_levels() -> None:
    torch.testing.assert_close(normal_float_levels(), torch.tensor(NF4), rtol=0, atol=2e-7)
    assert uniform_levels(3).tolist() == pytest.approx([-1, -2 / 3, -1 / 3, 0, 1 / 3, 2 / 3, 1])


@pytest.mark.parametrize("shape", [(64,), (3, 50), (2, 5, 64), (1, 7)])
@pytest.mark.parametrize("levels", [normal_float_levels(), uniform_levels(4), uniform_levels(8)])
def test_each_number_goes_to_the_nearest_level_of_its_block(shape: tuple[int, ...], levels: torch.Tensor) -> None:
    w = torch.randn(*shape, generator=torch.Generator().manual_seed(1))
    codes, scales = quantize(w, levels)
    assert codes.dtype == torch.uint8
    assert codes.shape == w.shape
    found = dequantize(codes, scales, levels).flatten()
    flat = w.flatten()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = block.abs().max()
        assert scales[start // 64] == scale
        best = (block.unsqueeze(1) - scale * levels).abs().amin(1)
        torch.testing.assert_close((block - found[start : start + 64]).abs(), best, rtol=1e-5, atol=1e-6)


def test_what_was_rounded_stays() -> None:
    w = torch.randn(8, 96, generator=torch.Generator().manual_seed(1))
    for bits in (4, 8):
        once = rounded(w, bits)
        torch.testing.assert_close(rounded(once, bits), once, rtol=1e-6, atol=1e-7)
    assert not rounded(torch.zeros(4, 64), 4).any()
    assert not rounded(torch.zeros(4, 64), 8).any()


def test_error_falls_with_the_bits() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    assert (rounded(w, 8) - w).norm() < 0.1 * (rounded(w, 4) - w).norm() < 0.02 * w.norm()
    assert ((rounded(w, 8) - w).abs() <= w.abs().amax(1, keepdim=True) / 253).all()
    with pytest.raises(ValueError, match="use 4"):
        rounded(w, 3)
