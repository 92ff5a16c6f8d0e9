"""What rounding to few bits leaves of a weight, for methods that start from the rounding's error."""

from __future__ import annotations

import torch
from torch import Tensor

from . import quantised

FORMATS = {4: "nf4", 8: "int8"}


def rounded(w: Tensor, bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """What is left of a tensor that is stored in 4 bits (NF4, blocks of 64) or in 8 (evenly spaced, a scale a row).

    Args:
        w: as its host keeps it.
    """
    if bits not in FORMATS:
        raise ValueError(f"There is no quantisation to {bits} bits here; use 4 (NF4) or 8.")
    return quantised.rounded(w, FORMATS[bits], dtype=dtype)
