"""AQLM: each group of a weight is a sum of vectors from codebooks, times a scale."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.site import Linear, layout
from ..core.stores import store
from .frozen import Quantised


@store("aqlm.inference.QuantizedLinear")
class AQLM(Quantised):
    backend = "AQLM"

    def held(self, module: Any, name: str) -> Any:
        return module

    @torch.no_grad()
    def read_tensor(self, stored: Any) -> Tensor:
        books, scales = stored.codebooks, stored.scales
        # Codes are kept as signed numbers of as few bytes as will do.
        codes = stored.codes.long() % books.shape[1]
        groups = sum(book[codes[..., i]] for i, book in enumerate(books))
        # (out groups, in groups, out in a group, in in a group)
        return (groups * scales).permute(0, 2, 1, 3).reshape(stored.out_features, stored.in_features)


layout("aqlm.inference.QuantizedLinear")(Linear)
