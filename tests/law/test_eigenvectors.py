"""A few of many eigenvectors: those of all of them, whichever way they are found."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from inlay.initializers import eigenvectors as module
from inlay.initializers.eigenvectors import MANY, eigenvectors

N, K = 448, 4


def turned(*values: Tensor) -> Tensor:
    """Matrices with these singular values."""
    torch.manual_seed(1)
    u, v = (torch.linalg.qr(torch.randn(len(values), N, N, dtype=torch.float64)).Q for _ in range(2))
    return u * torch.stack(values).unsqueeze(-2) @ v.mT


RANKS = torch.arange(1, N + 1, dtype=torch.float64)
WEIGHTS = {
    "noise": torch.randn(2, N, 2 * N, generator=torch.Generator().manual_seed(2)).double(),
    "falling": turned(1 / RANKS, (1 + RANKS).rsqrt()),
    "flat": turned((1 + RANKS / 8).rsqrt(), (4 * N - RANKS).sqrt()),
    "tiny": turned(1e-25 / RANKS.sqrt()),
    "a strong one": turned(torch.cat((torch.full((1,), 1e4).double(), 2 - RANKS[1:] / N))),
    "ill-conditioned": turned(10 ** (-6 * RANKS / N)),
}


def spaces_differ_by(one: Tensor, other: Tensor) -> float:
    """The sine of the largest angle between what the columns span."""
    return float(torch.linalg.matrix_norm(one - other @ (other.mT @ one), 2).max())


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("name", WEIGHTS)
def test_they_are_those_of_all(name: str, smallest: bool) -> None:
    w = WEIGHTS[name]
    assert w.shape[-2] >= MANY
    found = eigenvectors(w, K, smallest=smallest)
    gram = w @ w.mT
    values, vectors = torch.linalg.eigh(gram)
    part = slice(K) if smallest else slice(N - K, N)
    # The squares of what is a millionth of the largest have four digits.
    tolerance = 1e-4 if name == "ill-conditioned" and smallest else 1e-8
    assert spaces_differ_by(found, vectors[..., part]) < tolerance
    torch.testing.assert_close(found.mT @ found, torch.eye(K).double().expand(len(w), K, K), rtol=0, atol=1e-12)
    size = values[..., -1:]
    torch.testing.assert_close((found * (gram @ found)).sum(-2) / size, values[..., part] / size, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("matrix", [torch.zeros(N, N), torch.eye(N), torch.ones(N, N)])
@pytest.mark.parametrize("smallest", [False, True])
def test_where_many_are_alike(matrix: Tensor, smallest: bool) -> None:
    """Any orthonormal eigenvectors of the value will do."""
    w = matrix.double()
    found = eigenvectors(w, K, smallest=smallest)
    torch.testing.assert_close(found.mT @ found, torch.eye(K).double(), rtol=0, atol=1e-12)
    values = torch.linalg.eigvalsh(w @ w.mT)
    part = values[slice(K) if smallest else slice(N - K, N)]
    torch.testing.assert_close(w @ (w.mT @ found), found * part, rtol=0, atol=1e-12 * max(1.0, float(values[-1])))


def ways(monkeypatch: pytest.MonkeyPatch, w: Tensor, smallest: bool) -> list[str]:
    """What was tried; and whether all eigenvectors were computed in double precision."""
    tried: list[str] = []
    for name in ("_in_krylov_space", "_refined"):
        run = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, name=name, run=run, **k: tried.append(name[1:]) or run(*a, **k))
    eigh = torch.linalg.eigh

    def counted(t: Tensor) -> tuple[Tensor, Tensor]:
        if t.shape[-1] == N and t.dtype == torch.float64:
            tried.append("all")
        return eigh(t)

    monkeypatch.setattr(torch.linalg, "eigh", counted)
    eigenvectors(w, K, smallest=smallest)
    return tried


@pytest.mark.parametrize(
    ("name", "smallest", "expected"),
    [
        ("falling", False, ["in_krylov_space"]),
        ("noise", False, ["in_krylov_space", "refined"]),
        ("noise", True, ["refined"]),
        ("flat", True, ["refined"]),
        ("ill-conditioned", True, ["refined", "in_krylov_space"]),
        ("a strong one", False, ["in_krylov_space", "refined", "all"]),
    ],
)
def test_ways(name: str, smallest: bool, expected: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert ways(monkeypatch, WEIGHTS[name], smallest) == expected


def test_the_same_again() -> None:
    """Nothing is drawn from a generator of the session, and a matrix does not feel those beside it beyond rounding."""
    w = WEIGHTS["falling"]
    first = eigenvectors(w, K)
    torch.manual_seed(5)
    assert torch.equal(eigenvectors(w, K), first)
    for i, one in enumerate(w):
        assert spaces_differ_by(eigenvectors(one, K), first[i]) < 1e-8
