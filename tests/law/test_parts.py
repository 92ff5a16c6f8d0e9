"""The pieces in which a method folds a weight: the fold of some rows, columns or matrices is those of the fold."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from inlay.core.adapter import Adapter
from inlay.core.method import biased, folded
from inlay.core.part import PLACES, Parts, axes_apart
from inlay.core.place import Place

from .layouts import Layout
from .support import PAIRS, adapted, adapter_places, close

KINDS = ("linear", "linear-no-bias", "conv1d-gpt2", "embedding", "experts", "experts-transposed", "conv1d", "conv2d", "conv3d")
FOUND = [pytest.param(*pair, id=f"{pair[0]}/{pair[1].name}") for pair in PAIRS if pair[1].name in KINDS]


def foldable(case: str, layout: Layout) -> Iterator[tuple[Place, Adapter]]:
    for place in adapter_places(adapted(case, layout)):
        (p,) = place.adapters.values()
        assert isinstance(p, Adapter)
        if not p.method.unmergeable:
            yield place, p


@pytest.mark.parametrize(("case", "layout"), FOUND)
@torch.no_grad()
def test_the_fold_of_a_piece_is_that_piece_of_the_fold(case: str, layout: Layout) -> None:
    for place, p in foldable(case, layout):
        assert axes_apart(p)
        for axis in axes_apart(p):
            for strength in (1.0, 0.6):
                p.strength = strength
                check(place, p, axis)


def check(place: Place, p: Adapter, axis: str) -> None:
    w, b = place.site.read()
    expected_w, expected_b = place.fold(["a"])
    parts, at, size = Parts(p, axis), PLACES[axis], w.shape[PLACES[axis]]

    def bias(t: Tensor | None, piece: slice) -> Tensor | None:
        return t if t is None or axis == "in" else t[piece]

    for piece in (slice(0, 1), slice(1, 3), slice(2, size), slice(0, size)):
        some = parts[piece]
        found_w, found_b = folded(some, w.narrow(at, piece.start, piece.stop - piece.start), biased(some, bias(b, piece)))
        close(found_w, expected_w.narrow(at, piece.start, piece.stop - piece.start))
        wanted = bias(expected_b, piece)
        assert (found_b is None) == (wanted is None)
        if found_b is not None and wanted is not None:
            close(found_b, wanted)
