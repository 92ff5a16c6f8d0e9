"""Inputs as a matrix of rows."""

from __future__ import annotations

import torch
from torch import Tensor


def rows_of(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)
