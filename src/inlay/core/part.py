"""A part of a layer: what `Method.rows_apart` allows to be folded piece by piece."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from .adapter import Adapter
    from .param import Param


def part(p: Adapter, rows: slice) -> Adapter:
    """An adapter as if its layer had these rows of the matrix and no others; of a stack, these matrices.

    What is declared along the rows is cut. What else depends on where they are, the method finds by `Adapter.first_row` and
    `Adapter.whole`. The memory is that of the adapter.
    """
    if rows.stop - rows.start == p.site.shape[0]:
        return p
    site, found = copy.copy(p.site), copy.copy(p)
    vars(site)["shape"] = torch.Size((rows.stop - rows.start, *p.site.shape[1:]))
    found.site, found._whole = site, p.whole
    vars(found)["_declared"] = p.declared
    if not p.site.batch:
        found.first_row = rows.start
    found._parameters = {
        name: None if q is None else nn.Parameter(_cut(p, p.declared.get(name), q, rows), requires_grad=False)
        for name, q in p._parameters.items()
    }
    found._buffers = {name: None if t is None else _cut(p, p.declared.get(name), t, rows) for name, t in p._buffers.items()}
    return found


def _cut(p: Adapter, param: Param | None, t: Tensor, rows: slice) -> Tensor:
    """The rows of a tensor of an adapter; a bias (which nobody declares) has one number a row."""
    if p.site.batch:
        return t[rows] if param is None or param.batched else t
    axis = 0 if param is None else next((i for i, name in enumerate(param.axes) if name in ("out", "channel")), None)
    return t if axis is None else t.narrow(axis, rows.start, rows.stop - rows.start)
