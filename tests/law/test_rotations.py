"""Rotations, shards and blocks as their papers write them, and options that make no sense."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inlay.core.adapter import Adapter
from inlay.core.families import cayley, cayley_series, nearest_divisor, skew
from inlay.methods.boft import BOFTConfig
from inlay.methods.bone import BoneConfig
from inlay.methods.glora import GloraConfig
from inlay.methods.gralora import GraloraConfig
from inlay.methods.miss import MissConfig
from inlay.methods.psoft import PsoftConfig
from inlay.methods.road import RoadConfig

from .layouts import Layout
from .support import BY_NAME, adapted, adapters, close


def adapter(case: str, layout: str | Layout = "linear", **options: Any) -> Adapter:
    on = BY_NAME[layout] if isinstance(layout, str) else layout
    return next(adapters(adapted(case, on, **options)))


def method_of(p: Adapter) -> Any:
    """The method, whichever it is: the tests ask for what only some have."""
    return p.method


def folded(p: Adapter) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        return p.method.fold(p, *p.site.read())


def wide(out: int, inputs: int) -> Layout:
    return Layout("wide", lambda: nn.Linear(inputs, out), lambda: (torch.randn(4, inputs),))


# ---- Cayley ----------------------------------------------------------------------------------------------------------------------
def test_cayley_gives_rotations() -> None:
    q = skew(torch.randn(3, 6, dtype=torch.float64), 4)
    close(q, -q.mT)
    assert torch.equal(skew(torch.tensor([1.0, 2, 3]), 3), torch.tensor([[0.0, 1, 2], [-1, 0, 3], [-2, -3, 0]]))
    r = cayley(q)
    close(r @ r.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    close(torch.linalg.det(r), torch.ones(3, dtype=torch.float64))
    small = 0.01 * q
    close(cayley_series(small, 9), cayley(-small), 1e-8)
    close(cayley_series(small, 2), torch.eye(4, dtype=torch.float64) + 2 * small)
    assert torch.equal(cayley_series(q, 1), torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    assert torch.equal(cayley_series(q, 3), cayley_series(q, 4))


@pytest.mark.parametrize(
    ("width", "asked", "multiple", "found"), [(48, 7, 1, 6), (16, 32, 1, 16), (10, 4, 2, 2), (6, 4, 2, 2), (5, 2, 2, 0)]
)
def test_nearest_divisor(width: int, asked: int, multiple: int, found: int) -> None:
    assert nearest_divisor(width, asked, multiple) == found


# ---- BOFT ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("factors", [1, 2, 3])
def test_boft_is_a_butterfly(factors: int) -> None:
    """Factor i permutes groups of ``2^i`` blocks, even half blocks in front of odd ones, turns blocks, and permutes back."""
    width, size = 32, 4
    p = adapter("BOFT", wide(6, width), boft_block_size=size, boft_n_butterfly_factor=factors)
    matrix = torch.eye(width, dtype=torch.float64)
    for i in range(factors):
        taken = []
        for start in range(0, width, size * 2**i):
            halves = [list(range(at, at + size // 2)) for at in range(start, start + size * 2**i, size // 2)]
            taken += [place for half in halves[::2] + halves[1::2] for place in half]
        permutation = torch.eye(width, dtype=torch.float64)[taken]
        q = (p.boft_R[i] - p.boft_R[i].mT) / 2
        eye = torch.eye(size, dtype=torch.float64)
        blocks = torch.block_diag(*((eye - one) @ torch.linalg.inv(eye + one) for one in q))
        matrix = permutation @ blocks @ permutation.T @ matrix
    close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    w, b = p.site.read()
    new_w, new_b = folded(p)
    close(new_w, (torch.diag(p.boft_s) @ w @ matrix.T).detach())
    assert new_b is b


def test_a_butterfly_reaches_further_with_each_factor() -> None:
    def reached(factors: int) -> int:
        p = adapter("BOFT", wide(6, 16), boft_block_size=2, boft_n_butterfly_factor=factors)
        first = torch.zeros(1, 16, dtype=torch.float64).index_fill(1, torch.tensor([0]), 1)
        return int((method_of(p).turn(p, first).abs() > 1e-9).sum())

    assert [reached(n) for n in (1, 2, 3, 4)] == [2, 4, 8, 16]


# ---- RoAd ------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("variant", ["road_1", "road_2", "road_4"])
def test_road_turns_pairs_of_outputs(variant: str) -> None:
    p = adapter("ROAD", wide(8, 5), variant=variant, group_size=4)
    theta, alpha, matrix = p.road_theta, p.road_alpha, torch.zeros(8, 8, dtype=torch.float64)
    for out in range(8):
        start, place = out // 4 * 4, out % 4
        partner = start + (place + 2) % 4
        at = {"road_1": (start // 2 + place % 2,) * 2, "road_2": (out, out), "road_4": (2 * start + place, 2 * start + 4 + place)}[variant]
        sign = -1 if place < 2 else 1
        matrix[out, out] = alpha[at[0]] * theta[at[0]].cos()
        matrix[out, partner] = sign * alpha[at[1]] * theta[at[1]].sin()
    w, b = p.site.read()
    new_w, new_b = folded(p)
    assert b is not None
    assert new_b is not None
    close(new_w, (matrix @ w).detach())
    close(new_b, (matrix @ b).detach())
    if variant == "road_1":
        norms = matrix.norm(dim=0)
        close(matrix.T @ matrix, torch.diag(norms**2))


def test_road_groups_divide_the_outputs() -> None:
    with pytest.warns(UserWarning, match="group_size=6 is used"):
        p = adapter("ROAD", wide(12, 5), group_size=8)
    assert p.road_theta.shape == (6,)
    with pytest.raises(ValueError, match="its 5 outputs cannot be paired"):
        adapter("ROAD", wide(5, 4))


# ---- PSOFT -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("options", [{}, {"psoft_svd": "lowrank", "psoft_svd_lowrank_niter": 300}, {"ab_svd_init": "pissa_init"}])
def test_psoft_turns_the_principal_subspace(options: dict[str, Any]) -> None:
    p = adapter("PSOFT", r=3, psoft_alpha=5, psoft_mag_a=False, psoft_mag_b=False, **options)
    w, _ = p.site.read()
    u, s, vh = torch.linalg.svd(w)
    # The subspace is what matters: signs and, in it, the basis are free.
    principal = u[:, :3] @ torch.diag(s[:3]) @ vh[:3]
    close(method_of(p).scaling * p.psoft_B.double() @ p.psoft_A.double(), principal.detach(), 1e-5)
    change = folded(p)[0] - w
    assert torch.linalg.matrix_rank(change, atol=1e-5) <= 3
    close(change @ vh[3:].T, torch.zeros(6, 5, dtype=torch.float64), 1e-5)
    r = method_of(p).matrix(p)
    close(r @ r.T, torch.eye(3, dtype=torch.float64))
    if "ab_svd_init" not in options:
        close(p.psoft_A.double() @ p.psoft_A.double().T, torch.eye(3, dtype=torch.float64), 1e-5)


def test_psoft_leaves_the_global_generator_alone() -> None:
    p = adapter("PSOFT", r=2, psoft_svd="lowrank", random_seed=5)
    before, state = p.psoft_A.clone(), torch.random.get_rng_state()
    torch.rand(3)
    p.method.derive(p)
    assert torch.equal(p.psoft_A, before)
    torch.random.set_rng_state(state)
    p.method.derive(p)
    assert torch.equal(torch.random.get_rng_state(), state)


# ---- MiSS, GraLoRA, GLoRA --------------------------------------------------------------------------------------------------------
def test_miss_repeats_its_block() -> None:
    p = adapter("MISS", r=3)
    w, _ = p.site.read()
    e = p.miss_block.T
    close(folded(p)[0], (w + torch.cat([e, e, e], 1)[:, :8]).detach())


@pytest.mark.parametrize("case", ["MISS", "BONE"])
def test_bat_multiplies_blocks_of_the_weight(case: str) -> None:
    p = adapter(case, r=2, init_weights="bat")
    w, _ = p.site.read()
    expected = w.detach().clone()
    blocks = p.miss_block if case == "MISS" else p.bone_block
    for i in range(3):
        for j in range(4):
            tile = w[2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
            expected[2 * i : 2 * i + 2, 2 * j : 2 * j + 2] += (tile @ blocks[i] + blocks[i]).detach()
    close(folded(p)[0], expected)


def test_gralora_has_more_rank_for_as_many_numbers() -> None:
    p = adapter("GRALORA", wide(16, 16), r=4, gralora_k=4)
    assert sum(q.numel() for q in p.parameters()) == 4 * (16 + 16)
    delta = method_of(p).delta(p)
    assert torch.linalg.matrix_rank(delta) == 16
    for rows in delta.split(4):
        for tile in rows.split(4, dim=1):
            assert torch.linalg.matrix_rank(tile) == 1


def test_glora_mixes_weight_and_bias() -> None:
    p = adapter("GLORA", config_D_E="vector")
    w, b = p.site.read()
    assert b is not None
    a, plus, c = ((getattr(p, f"glora_{n}_Xd") @ getattr(p, f"glora_{n}_Xu")) for n in "ABC")
    new_w, new_b = folded(p)
    assert new_b is not None
    close(new_w, (w + w * a + plus).detach())
    close(new_b, (b + b * p.glora_D_X + p.glora_E_X + (w @ c).squeeze(1)).detach())


def test_glora_of_a_layer_without_bias_trains_the_weight_alone() -> None:
    p = adapter("GLORA", "linear-no-bias")
    assert {n for n, _ in p.named_parameters()} == {"glora_A_Xd", "glora_A_Xu", "glora_B_Xd", "glora_B_Xu"}
    with pytest.raises(ValueError, match="it has no bias, and config_A_B='none'"):
        adapter("GLORA", "linear-no-bias", config_A_B="none")


# ---- on many rows, where kernels take over ---------------------------------------------------------------------------------------
MANY = [
    ("OFT", {"oft_block_size": 4}),
    ("OFT", {"oft_block_size": 2, "block_share": True}),
    ("HRA", {"r": 4}),
    ("BOFT", {"boft_block_size": 2, "boft_n_butterfly_factor": 3}),
    ("ROAD", {"group_size": 6}),
    ("PSOFT", {"r": 3, "psoft_alpha": 5}),
    ("MISS", {"r": 3}),
    ("MISS", {"r": 2, "init_weights": "bat"}),
    ("MISS", {"r": 3, "mini_r": 2, "init_weights": "mini"}),
    ("GRALORA", {"r": 4}),
    ("GRALORA", {"r": 2, "hybrid_r": 2}),
    ("GLORA", {"r": 2}),
    ("GLORA", {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}),
]


@pytest.mark.parametrize(("case", "options"), MANY, ids=lambda v: v if isinstance(v, str) else "-".join(map(str, v.values())))
def test_many_rows(case: str, options: dict[str, Any]) -> None:
    model = adapted(case, BY_NAME["linear"], **options)
    (p,) = adapters(model)
    torch.manual_seed(2)
    x = torch.randn(100, 8, dtype=torch.float64, requires_grad=True)
    trained = [x, *p.parameters()]
    both = [model(x), F.linear(x, *p.method.fold(p, *p.site.read()))]
    close(*both)
    for mine, right in zip(*(torch.autograd.grad(y.square().sum(), trained) for y in both), strict=True):
        close(mine, right, 1e-8)


# ---- options -----------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: BOFTConfig(boft_block_size=4, boft_block_num=2), "one of `boft_block_size` and `boft_block_num`"),
        (lambda: BOFTConfig(boft_block_size=0), "one of `boft_block_size` and `boft_block_num`"),
        (lambda: BOFTConfig(boft_n_butterfly_factor=0), "boft_n_butterfly_factor"),
        (lambda: BOFTConfig(boft_dropout=1.0), "boft_dropout"),
        (lambda: RoadConfig(variant="road_3"), "Unknown variant='road_3'.*road_1"),
        (lambda: RoadConfig(group_size=3), "group_size.*even"),
        (lambda: PsoftConfig(r=0), "`r` should be a positive integer"),
        (lambda: PsoftConfig(ab_svd_init="pisa_init"), "Did you mean 'pissa_init'"),
        (lambda: PsoftConfig(psoft_svd="random"), "Unknown psoft_svd='random'"),
        (lambda: PsoftConfig(psoft_dropout=1.0), "psoft_dropout"),
        (lambda: PsoftConfig(num_cayley_neumann_terms=0), "num_cayley_neumann_terms"),
        (lambda: PsoftConfig(use_cayley_neumann=True, cayley_neumann_eps=1.5), "cayley_neumann_eps"),
        (lambda: MissConfig(r=0), "`r` should be a positive integer"),
        (lambda: MissConfig(mini_r=0), "`mini_r` should be a positive integer"),
        (lambda: MissConfig(miss_dropout=-1), "miss_dropout"),
        (lambda: MissConfig(init_weights="bad"), "Unknown init_weights='bad'"),
        (lambda: MissConfig(init_weights="bat", use_dora=True), "'bat' multiplies the weight.*`use_dora`"),
        (lambda: MissConfig(init_weights="bat", miss_dropout=0.1), "`miss_dropout`"),
        (lambda: BoneConfig(bias="miss_only"), "bone_only"),
        (lambda: GraloraConfig(r=6, gralora_k=4), "r=6 is not divisible by gralora_k=4"),
        (lambda: GraloraConfig(hybrid_r=-1), "hybrid_r"),
        (lambda: GraloraConfig(gralora_k=0), "gralora_k"),
        (lambda: GraloraConfig(gralora_dropout=2), "gralora_dropout"),
        (lambda: GloraConfig(r=0), "`r` should be a positive integer"),
        (lambda: GloraConfig(config_A_B="lor"), "Unknown config_A_B='lor'. Did you mean 'lora'"),
        (lambda: GloraConfig(config_D_E="lora"), "Unknown config_D_E='lora'"),
        (lambda: GloraConfig(config_A_B="none", config_C="none", config_D_E="none"), "nothing to train"),
    ],
)
def test_options_out_of_range(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_bias_as_the_help_of_miss_calls_it() -> None:
    assert MissConfig(bias="MiSS_only").bias == "miss_only"


@pytest.mark.parametrize(
    ("case", "options", "reason"),
    [
        ("BOFT", {"boft_block_size": 3}, "boft_block_size=3 does not divide its 8 inputs"),
        ("BOFT", {"boft_block_size": 4, "boft_n_butterfly_factor": 3}, "needs blocks of an even size in a multiple of 4"),
        ("BOFT", {"boft_block_size": 0, "boft_block_num": 8}, "nothing to turn in blocks of one"),
        ("PSOFT", {"r": 7}, "no more than 6 principal directions, and r=7"),
        ("MISS", {"r": 9}, "its 8 inputs do not fill one shard of r=9"),
        ("MISS", {"r": 4, "init_weights": "bat"}, "its 6 outputs cannot be cut into blocks of r=4"),
        ("MISS", {"r": 2, "mini_r": 4, "init_weights": "mini"}, "mini_r=4 does not divide its 6 outputs"),
        ("GRALORA", {"r": 4, "gralora_k": 4}, "its 6 outputs cannot be cut into gralora_k=4 blocks"),
    ],
)
def test_sizes_that_do_not_fit(case: str, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        adapter(case, **options)


def test_road_in_a_model_that_is_trained() -> None:
    """Its option has the name of a hook of all methods; a model asks for that hook at its entry and for its loss."""
    from inlay import get_peft_model

    model = get_peft_model(BY_NAME["linear"].model(torch.float32), RoadConfig(target_modules=["host"], group_size=2)).train()
    model(torch.randn(3, 8)).square().sum().backward()
    assert all(q.grad is not None for q in model.parameters() if q.requires_grad)
