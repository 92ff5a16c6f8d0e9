"""The rows of a weight that a method folds apart: the fold of some of them is those rows of the fold."""

from __future__ import annotations

import pytest
import torch

from inlay.core.method import METHODS, Method, biased, folded
from inlay.core.part import part

from .layouts import Layout
from .support import PAIRS, adapted, adapter_places, close

KINDS = ("linear", "linear-no-bias", "conv1d-gpt2", "embedding", "experts", "experts-transposed")


def apart(case: str, layout: Layout) -> bool:
    return any(p.method.rows_apart(place.site) for place in adapter_places(adapted(case, layout)) for p in place.adapters.values())  # type: ignore[union-attr]


FOUND = [pair for pair in PAIRS if pair[1].name in KINDS and apart(*pair)]


@pytest.mark.parametrize(("case", "layout"), FOUND, ids=[f"{case}/{layout.name}" for case, layout in FOUND])
@pytest.mark.parametrize("strength", [1.0, 0.6])
@torch.no_grad()
def test_the_fold_of_rows_is_rows_of_the_fold(case: str, layout: Layout, strength: float) -> None:
    for place in adapter_places(adapted(case, layout)):
        (p,) = place.adapters.values()
        if not p.method.rows_apart(place.site):
            continue
        p.strength = strength
        w, b = place.site.read()
        expected_w, expected_b = place.fold(["a"])
        for rows in (slice(0, 1), slice(1, 3), slice(2, len(w)), slice(0, len(w))):
            some = part(p, rows)
            found_w, found_b = folded(some, w[rows], biased(some, None if b is None else b[rows]))
            close(found_w, expected_w[rows])
            assert (found_b is None) == (expected_b is None)
            if found_b is not None and expected_b is not None:
                close(found_b, expected_b[rows])


def test_who_declares_it() -> None:
    """A method that loses its declaration would be merged in one piece, unnoticed."""
    declared = {name for name, cls in METHODS.items() if cls.rows_apart is not Method.rows_apart}
    assert {"LORA", "LOHA", "LOKR", "OFT", "BOFT", "HRA", "IA3", "VERA", "FOURIERFT", "HIRA", "MISS", "SHIRA", "GLORA"} <= declared
