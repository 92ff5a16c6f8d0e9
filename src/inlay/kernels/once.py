"""What layers with one input compute of it in common: the first of them does, the others find it.

Query, key and value projections get one tensor, and so do gate and up projections. Where a frozen bank stands in front of all of
them, its product with that input is the same for each, both to compute and to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .rows import rows_of

_products: WeakIdKeyDictionary = WeakIdKeyDictionary()


def product_with(x: Tensor, a: Tensor, dtype: torch.dtype) -> Tensor:
    """``A x'``, of shape ``(r, rows)``. It is remembered as long as the activation ``x`` lives, and not to be written to.

    Args:
        x: ``(*, in)``. a: ``(r, in)``, frozen.
    """
    # What no operation gave out (the model's own input) may be filled anew behind autograd's back.
    if x.is_leaf or x.is_inference() or a.is_inference():
        return a.to(dtype) @ rows_of(x, dtype).t()
    state = (x._version, a._version, a.data_ptr(), a.shape, a.stride(), a.dtype, dtype)
    found = _products.get(x)
    if found is None or found[0] != state:
        # With A itself, so that no other matrix can come to stand where it stands in memory.
        found = _products[x] = state, a.detach(), a.detach().to(dtype) @ rows_of(x.detach(), dtype).t()
    return found[2]
