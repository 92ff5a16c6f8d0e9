"""Rounding by the number of bits; the formats themselves have tests of their own."""

from __future__ import annotations

import pytest
import torch

from inlay.kernels.blockwise import rounded


def test_error_falls_with_the_bits() -> None:
    w = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    kept = w.clone()
    assert (rounded(w, 8) - w).norm() < 0.1 * (rounded(w, 4) - w).norm() < 0.02 * w.norm()
    assert ((rounded(w, 8) - w).abs() <= w.abs().amax(1, keepdim=True) / 253).all()
    assert torch.equal(w, kept)
    with pytest.raises(ValueError, match="use 4"):
        rounded(w, 3)
