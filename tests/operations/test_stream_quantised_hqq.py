"""Merging on disk into folders of HQQ, against the numbers of its own layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hqq.core import quantize  # pyright: ignore[reportMissingImports]
from torch import Tensor, nn

from .bases import Quantised, both_dequantised, llama, quantised_by, requantised, same_in_pieces


def wide() -> Any:
    return llama(hidden_size=64, intermediate_size=96)


def layer(w: Tensor, dtype: torch.dtype, **options: Any) -> Any:
    linear = nn.Linear(w.shape[1], w.shape[0], bias=False)
    linear.weight = nn.Parameter(w.clone(), requires_grad=False)
    return quantize.HQQLinear(linear, quantize.BaseQuantizeConfig(**options), compute_dtype=dtype, device="cpu")


def by_hqq(dtype: torch.dtype, **options: Any) -> Any:
    def find(_: str, w: Tensor) -> Quantised:
        made = layer(w, dtype, **options)
        parts = {name: t.detach() if isinstance(t, Tensor) else t for name, t in made.state_dict().items()}
        return {name: t.clone() for name, t in parts.items() if t is not None}, made.dequantize().clone()

    return find


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("bits", "group", "dtype", "more"),
    [
        (4, 64, torch.float16, {}),
        (8, 32, torch.bfloat16, {}),
        (3, 64, torch.float32, {}),
        (2, 16, torch.bfloat16, {"view_as_float": True}),
        (1, 8, torch.float16, {}),
        (4, None, torch.float16, {}),
    ],
)
def test_hqq(bits: int, group: int, dtype: torch.dtype, more: dict[str, Any], axis: int, tmp_path: Path,
             monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    options = {"nbits": bits, "group_size": group, "axis": axis, **more}
    base, dense = quantised_by(by_hqq(dtype, **options), {"quant_method": "hqq", "quant_config": {}}, tmp_path, wide, dtype)
    folder = both_dequantised(base, dense, tmp_path)
    found, wanted, merge = requantised(base, dense, folder, tmp_path)
    for key, w in wanted.items():
        owner, expected = key.removesuffix(".weight"), layer(w, dtype, **options)
        assert (found[f"{owner}.W_q"].view(torch.uint8) != expected.W_q.detach().view(torch.uint8)).float().mean() < 0.01
        for name in ("scale", "zero"):
            torch.testing.assert_close(found[f"{owner}.{name}"], expected.meta[name], rtol=2**-7, atol=1e-3)
        error = (expected.dequantize().float() - w).norm() / w.norm()
        assert merge.rounding[key].of_weight == pytest.approx(error.item(), rel=1e-2)
    same_in_pieces(base, folder, tmp_path, monkeypatch)
