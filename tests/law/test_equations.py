"""What the papers say, written out plainly, against the forms that are computed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.adapter import Adapter
from inlay.methods.hra import HRAConfig
from inlay.methods.ia3 import IA3Config
from inlay.methods.oft import OFTConfig
from inlay.methods.vera import VeraConfig

from .layouts import Layout
from .support import BY_NAME, adapted, adapters, close


def adapter(case: str, name: str = "linear", **options: Any) -> Adapter:
    return next(adapters(adapted(case, BY_NAME[name], **options)))


def folded(p: Adapter) -> Tensor:
    w, b = p.site.read()
    return p.method.fold(p, w, b)[0].detach()


@pytest.mark.parametrize("r", [1, 4, 5])
@pytest.mark.parametrize("layout", ["linear", "conv2d"])
def test_hra_is_a_chain_of_reflections(layout: str, r: int) -> None:
    p = adapter("HRA", layout, r=r)
    w, _ = p.site.read()
    for u in F.normalize(p.hra_u, dim=0).T:
        w = w - 2 * torch.outer(w @ u, u)
    close(folded(p), w)


@pytest.mark.parametrize("rows", [1, 50])
def test_hra_on_few_and_on_many_rows(rows: int) -> None:
    """Few rows are turned; for many the reflections become an update of low rank."""
    model = adapted("HRA", BY_NAME["linear"], r=4)
    (p,) = adapters(model)
    _, b = p.site.read()
    x = torch.randn(rows, 8, dtype=torch.float64, requires_grad=True)
    both = [model(x), F.linear(x, p.method.fold(p, *p.site.read())[0], b)]
    close(both[0], both[1])
    one, other = (torch.autograd.grad(y.square().sum(), [x, p.hra_u]) for y in both)
    for mine, its in zip(one, other, strict=True):
        close(mine, its)


def test_hra_with_orthogonal_directions() -> None:
    p = adapter("HRA", r=3, apply_GS=True)
    basis: list[Tensor] = []
    for u in p.hra_u.T:
        for v in basis:
            u = u - (u @ v) * v
        basis.append(u / u.norm())
    w, _ = p.site.read()
    for u in basis:
        w = w - 2 * torch.outer(w @ u, u)
    close(folded(p), w)


def test_oft_turns_blocks_of_inputs() -> None:
    p = adapter("OFT", oft_block_size=4, use_cayley_neumann=False)
    q = torch.zeros(2, 4, 4, dtype=torch.float64)
    for block, numbers in enumerate(p.oft_R.tolist()):
        for (i, j), number in zip([(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)], numbers, strict=True):
            q[block, i, j], q[block, j, i] = number, -number
    eye = torch.eye(4, dtype=torch.float64)
    rotation = torch.block_diag(*((eye - q) @ torch.linalg.inv(eye + q)))
    close(rotation @ rotation.T, torch.eye(8, dtype=torch.float64))
    w, _ = p.site.read()
    close(folded(p), w @ rotation.T)


def test_the_series_nears_the_inverse() -> None:
    """Each term more divides what is left out by about the size of Q."""
    exact = adapter("OFT", oft_block_size=4, use_cayley_neumann=False)
    assert isinstance(exact.method, OFTConfig)
    # The series is that of the opposite Q, whose transform is the transpose.
    limit = exact.method.rotations(exact).mT
    distances = []
    for terms in (2, 3, 5, 6, 8):
        p = adapter("OFT", oft_block_size=4, num_cayley_neumann_terms=terms)
        assert isinstance(p.method, OFTConfig)
        distances.append((p.method.rotations(p) - limit).norm().item())
    assert all(later < earlier / 2 for earlier, later in pairwise(distances))


@pytest.mark.parametrize("layout", ["linear", "conv2d"])
def test_the_ball_of_constrained_oft(layout: str) -> None:
    """Outside the ball a rotation is as on its surface, and training goes on from there."""
    model = adapted("OFT", BY_NAME[layout], oft_block_size=4, coft=True, eps=0.05)
    (p,) = adapters(model)
    before = p.oft_R.detach().clone()
    radius = 0.05 / len(before) ** 0.5
    assert (before.norm(dim=-1) * 2**0.5 > radius).all()
    model(*BY_NAME[layout].example())
    assert torch.equal(p.oft_R, before), "looking does not change it"
    model.train()(*BY_NAME[layout].example())
    close(p.oft_R.norm(dim=-1) * 2**0.5, torch.full((len(before),), radius, dtype=torch.float64))
    close(F.normalize(p.oft_R.detach(), dim=-1), F.normalize(before, dim=-1))


@pytest.mark.parametrize(("width", "asked", "used"), [(48, 32, 24), (48, 7, 6), (16, 32, 16), (10, 4, 5), (13, 5, 1)])
def test_blocks_divide_the_width(width: int, asked: int, used: int) -> None:
    layout = Layout("wide", lambda: nn.Linear(width, 3), lambda: (torch.randn(4, width),))
    if used == 1:
        with pytest.raises(ValueError, match="nothing to turn"):
            adapted("OFT", layout, oft_block_size=asked)
        return
    with pytest.warns(UserWarning, match=f"oft_block_size={used} is used"):
        (p,) = adapters(adapted("OFT", layout, oft_block_size=asked))
    assert p.oft_R.shape == (width // used, used * (used - 1) // 2)


def test_vera_has_one_projection_for_all_layers() -> None:
    layout = Layout(
        "two",
        lambda: nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 10)),
        lambda: (torch.randn(4, 8),),
        targets={"target_modules": ["host.0", "host.1"]},
    )
    model = adapted("VERA", layout, r=3)
    one, other = adapters(model)
    assert one.shared is other.shared
    assert one.shared.vera_A.shape == (3, 8)
    assert one.shared.vera_B.shape == (10, 3)
    assert [k for k in model.state_dict() if "vera_A" in k] == ["host.0.adapters.a.bank.vera_A"]
    for p in (one, other):
        w, _ = p.site.read()
        out, inner = w.shape
        b, d = torch.diag(p.vera_lambda_b), torch.diag(p.vera_lambda_d)
        close(folded(p), w + b @ one.shared.vera_B[:out].double() @ d @ one.shared.vera_A[:, :inner].double())


def test_ia3_scales_the_bias_of_outputs_only() -> None:
    outputs, inputs = adapter("IA3"), adapter("IA3", feedforward_modules=".*")
    for p, bias in ((outputs, True), (inputs, False)):
        w, b = p.site.read()
        new_w, new_b = p.method.fold(p, w, b)
        assert b is not None
        assert new_b is not None
        close(new_w, torch.diag(p.ia3_l) @ w if bias else w @ torch.diag(p.ia3_l))
        close(new_b, p.ia3_l * b if bias else b)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: OFTConfig(r=2, oft_block_size=4), "one of `r` and `oft_block_size`"),
        (lambda: OFTConfig(r=0, oft_block_size=0), "one of `r` and `oft_block_size`"),
        (lambda: OFTConfig(module_dropout=1.0), "module_dropout"),
        (lambda: OFTConfig(num_cayley_neumann_terms=1), "nothing to train"),
        (lambda: HRAConfig(r=0), "positive integer"),
        (lambda: VeraConfig(r=-1), "positive integer"),
        (lambda: VeraConfig(vera_dropout=1.5), "share"),
        (lambda: VeraConfig(bias="vera_lambda_only"), "Did you mean 'vera_only'"),
        (lambda: IA3Config(target_modules=["q"], feedforward_modules=["w"]), "not among the target_modules"),
    ],
)
def test_options_out_of_range(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
