"""What the law cannot know of methods whose layers share a bank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.core.adapter import Adapter
from inlay.core.inlaid import adapters_of
from inlay.core.site import site_of
from inlay.methods.adamss import _means
from inlay.methods.banks import Corners

WEIGHTS = "adapter_model.safetensors"


class Blocks(nn.Module):
    """Two blocks of two layers."""

    def __init__(self, bias: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 12, bias), "down": nn.Linear(12, 8, bias)}) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = x + block["down"](torch.tanh(block["up"](x)))
        return x


def adapted(method: str, seed: int = 3, **options: Any) -> tuple[Any, list[Adapter]]:
    model = inlay.get_peft_model(Blocks(), getattr(inlay, method)(target_modules=["up", "down"], **options))
    generator = torch.Generator().manual_seed(seed)
    for q in model.parameters():
        if q.requires_grad:
            q.data += 0.3 * torch.randn(q.shape, generator=generator)
    return model, adapters_of(model.get_base_model(), "default")


X = torch.linspace(-1, 1, 48).view(2, 3, 8)


# ---- options -----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("method", "options", "says"),
    [
        ("VeraConfig", {"r": 0}, "`r` should be a positive integer"),
        ("VeraConfig", {"vera_dropout": 1.0}, "`vera_dropout` is a share"),
        ("PveraConfig", {"r": -1}, "`r` should be a positive integer"),
        ("VBLoRAConfig", {"topk": 0}, "`topk` should be a positive integer"),
        ("VBLoRAConfig", {"topk": 3, "num_vectors": 2}, "`topk`=3 vectors cannot be chosen"),
        ("RandLoraConfig", {"randlora_dropout": -0.1}, "`randlora_dropout` is a share"),
        ("UniLoraConfig", {"theta_d_length": 0}, "`theta_d_length` should be a positive integer"),
        ("UniLoraConfig", {"init_theta_d_bound": 0.0}, "`init_theta_d_bound` should be positive"),
        ("TinyLoraConfig", {"weight_tying": 1.5}, "`weight_tying` should be a number from 0"),
        ("TinyLoraConfig", {"init_weights": "normal"}, "Known: True, False, uniform"),
        ("LilyConfig", {"num_B": 1}, "`num_B` should be at least 2"),
        ("LilyConfig", {"stride_A": 0}, "`stride_A` should be a positive integer"),
        ("FrodConfig", {"sparse_rate": 2.0}, "`sparse_rate` should be a number from 0 to 1"),
        ("AdamssConfig", {"init_weights": "zero"}, "'orthogonal' or None, not 'zero'"),
        ("AdamssConfig", {"use_asa": True, "init_warmup": 9, "final_warmup": 9}, "`init_warmup`=9 should be below"),
        ("AdamssConfig", {"use_asa": True, "mask_interval": 0}, "`mask_interval` should be a positive integer"),
    ],
)
def test_bad_options_are_named(method: str, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        getattr(inlay, method)(**options)


def test_vectors_must_fit_the_layer() -> None:
    with pytest.raises(ValueError, match="no multiple of vector_length=5"):
        adapted("VBLoRAConfig", vector_length=5)


# ---- single methods ------------------------------------------------------------------------------------------------------------
def test_pvera_draws_around_its_mean_in_training() -> None:
    _model, (p, *_) = adapted("PveraConfig", r=4)
    layer, bank = p.site.module, p.shared
    x = X[..., :8]
    torch.manual_seed(5)
    drawn = layer.train()(x)
    torch.manual_seed(5)
    mean, spread = (p.pvera_lambda_d * (x @ bank.pvera_A[:, :8].T)).chunk(2, -1)
    h = mean + torch.randn_like(mean) * torch.exp(spread / 2)
    base = x @ layer._parameters["weight"].T + layer._parameters["bias"]
    torch.testing.assert_close(drawn, base + p.pvera_lambda_b * (h @ bank.pvera_B[:12].T))
    torch.testing.assert_close(layer.eval()(x), base + p.pvera_lambda_b * (mean @ bank.pvera_B[:12].T))


def test_pvera_with_a_generator_of_its_own() -> None:
    outputs = []
    for _ in range(2):
        model, _ = adapted("PveraConfig", r=4, generator_seed=7, sample_at_inference=True)
        model.eval()
        outputs.append((model(X), model(X)))
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert not torch.allclose(outputs[0][0], outputs[0][1])


def test_a_file_of_mixtures_is_trained_on(tmp_path: Path) -> None:
    model, _ = adapted("VBLoRAConfig", num_vectors=6, vector_length=4, save_only_topk_weights=True)
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / WEIGHTS)
    assert found["base_model.model.layers.0.up.vblora_logits_A_topk_indices"].dtype == torch.uint8
    assert found["base_model.model.layers.0.up.vblora_logits_A_topk_indices"].shape == (4, 2, 2)
    assert found["base_model.model.layers.0.up.vblora_logits_A_topk_weights"].shape == (4, 2, 1)
    again = inlay.PeftModel.from_pretrained(Blocks(), tmp_path, is_trainable=True)
    torch.testing.assert_close(again(X), model(X))
    optimizer = torch.optim.SGD([q for q in again.parameters() if q.requires_grad], lr=0.5)
    again(X).square().sum().backward()
    optimizer.step()
    assert not torch.allclose(again(X), model(X))
    again.save_pretrained(tmp_path / "more")
    later = load_file(tmp_path / "more" / WEIGHTS)
    for key, tensor in found.items():
        if key.endswith("_indices"):
            assert torch.equal(later[key].sort(-1).values, tensor.sort(-1).values)


def test_unilora_projects_isometrically() -> None:
    """The squares of all entries of all factors add up to those of the vector."""
    _model, adapters = adapted("UniLoraConfig", theta_d_length=9)
    squares = sum(f.square().sum() for p in adapters for f in p.method.factors(p))
    torch.testing.assert_close(squares, adapters[0].shared.unilora_theta_d.square().sum())


def test_tinylora_starts_from_singular_directions() -> None:
    _model, (p, *_) = adapted("TinyLoraConfig", r=8, u=3)
    torch.testing.assert_close(p.tinylora_B @ p.tinylora_A, p.site.read()[0].detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("tying", "vectors"), [(0.0, 4), (0.5, 2), (1.0, 1)])
def test_tinylora_ties_neighbours(tying: float, vectors: int) -> None:
    _, (p, *_) = adapted("TinyLoraConfig", weight_tying=tying)
    assert len(p.shared.tinylora_v) == vectors


def test_frod_decomposes_the_weight() -> None:
    _, adapters = adapted("FrodConfig")
    for p in adapters:
        v, _ = p.shared.of(p.path)
        torch.testing.assert_close(p.frod_U * p.frod_l0 @ v.T, p.site.read()[0].detach(), rtol=1e-4, atol=1e-5)
    assert {p.shared.kinds[p.path] for p in adapters} == {"up", "down"}


# ---- Lily ----------------------------------------------------------------------------------------------------------------------
def lily(p: Adapter, x: Tensor) -> Tensor:
    a, b = (p.shared.factors[name] for name in p.shared.names[p.path])
    hidden = x @ a.T
    shares = torch.softmax(hidden @ p.lily_router.T, -1).flatten(0, -2).mean(0)
    mixed = sum(s * part for s, part in zip(shares, b.split(p.method.r), strict=True))
    layer = p.site.module._parameters
    return x @ layer["weight"].T + layer["bias"] + p.method.scaling * (hidden @ mixed)


@pytest.mark.parametrize("kind", ["", "sparse", "very_sparse"])
def test_what_randlora_keeps_to_fold_is_a_corner_of_its_bases(kind: str) -> None:
    sites = {str(i): site for i, shape in enumerate([(40, 48), (60, 7)]) if (site := site_of(nn.Linear(*shape))) is not None}
    config = inlay.RandLoraConfig(r=4, save_projection=False, **({kind: True} if kind else {}))
    whole, corner = config.shared(sites), config.shared_to_fold(sites)
    assert whole.randlora_B.shape == (60, 12, 4)
    assert isinstance(corner, Corners)
    assert corner.shapes == {name: tuple(t.shape) for name, t in whole.named_buffers()}
    for name, kept in corner.named_buffers():
        assert kept.equal(whole.get_buffer(name)[tuple(map(slice, kept.shape))])
    assert corner.randlora_B.shape == (60, 10, 4)


def test_lily_mixes_by_the_mean_of_the_batch() -> None:
    _, adapters = adapted("LilyConfig", r=3, num_B=3, scaling=0.7)
    p = adapters[0]
    torch.testing.assert_close(p.site.module(X), lily(p, X))
    p.strength = 0.0
    torch.testing.assert_close(p.site.module(X), X @ p.site.module._parameters["weight"].T + p.site.module._parameters["bias"])


def test_lily_shares_by_kind_and_stride() -> None:
    _, adapters = adapted("LilyConfig", stride_A=2)
    names = {p.path: p.shared.names[p.path] for p in adapters}
    assert names["layers.0.up"] == names["layers.1.up"] != names["layers.0.down"] == names["layers.1.down"]
    _, adapters = adapted("LilyConfig", stride_A=1)
    (a, b), (other_a, other_b) = (p.shared.names[p.path] for p in adapters if p.path.endswith("up"))
    assert (a != other_a, b == other_b) == (True, True)


def test_lily_in_a_mixed_batch_takes_the_mean_of_its_own_rows() -> None:
    model, _ = adapted("LilyConfig", r=3)
    model.add_adapter("other", inlay.LoraConfig(target_modules=["up"], init_lora_weights=False))
    x = torch.cat((X, X.flip(0) + 1))
    mixed = model(x, adapter_names=["default", "other", "default", "__base__"])
    model.set_adapter("default")
    torch.testing.assert_close(mixed[[0, 2]], model(x[[0, 2]]))


def test_lily_is_not_merged_and_says_why() -> None:
    model, _ = adapted("LilyConfig", r=3)
    with pytest.raises(TypeError, match="router weighs the factors anew"):
        model.merge_adapter()


@pytest.mark.parametrize("host", [nn.Conv2d(4, 6, 3, groups=2), nn.Conv1d(4, 6, 3), nn.Embedding(9, 6), nn.ConvTranspose1d(4, 6, 2)])
def test_lily_on_other_layouts(host: nn.Module) -> None:
    x = torch.randint(0, 9, (2, 3)) if isinstance(host, nn.Embedding) else torch.randn(2, 4, *(5 for _ in host.kernel_size))
    base = nn.Sequential(host)
    before = base(x)
    model = inlay.get_peft_model(base, inlay.LilyConfig(r=2, target_modules=["0"]))
    torch.testing.assert_close(model(x), before)
    (p,) = adapters_of(model.get_base_model(), "default")
    for q in p.parameters():
        q.data += 0.3
    a, b = (p.shared.factors[name] for name in p.shared.names[p.path])
    # All B alike: their mixture is that B, whatever the router says.
    b.data[..., 2:, :] = b.data[..., :2, :]
    change = b[..., :2, :].mT @ a
    w, bias = p.site.read()
    torch.testing.assert_close(model(x), p.site.apply(x, w + change, bias), rtol=1e-4, atol=1e-5)


# ---- AdaMSS --------------------------------------------------------------------------------------------------------------------
def test_adamss_adds_to_groups_of_rows() -> None:
    _, adapters = adapted("AdamssConfig", r=4, num_subspaces=3)
    for p in adapters:
        ((labels, ranks),) = p.method._groups(p.site)
        expected = torch.zeros(p.site.size("out"), p.site.size("in") + 1)
        for i, rank in enumerate(ranks):
            a, b = getattr(p, f"adamss_A_{i}"), getattr(p, f"adamss_B_{i}")
            assert a.shape[0] == b.shape[1] == rank == 1
            expected[labels == i] = b @ a @ p.adamss_newB
        torch.testing.assert_close(p.method.delta(p), expected[:, :-1])
        torch.testing.assert_close(p.method.delta_bias(p), expected[:, -1])


def groups_that_train(adapters: list[Adapter]) -> int:
    return sum(q.requires_grad for p in adapters for n, q in p.named_parameters() if n.startswith("adamss_B"))


def trained(by_hand: bool, first: int = 0) -> tuple[Any, list[Adapter], list[int]]:
    options = {"init_warmup": 2, "final_warmup": 6, "mask_interval": 2, "asa_target_subspaces": 3, "asa_schedule_exponent": 1.0}
    model, adapters = adapted("AdamssConfig", r=4, num_subspaces=3, use_asa=True, **options)
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=0.01)
    counts = []
    for step in range(8):
        optimizer.zero_grad()
        model(X).square().sum().backward()
        optimizer.step()
        if by_hand:
            model.base_model.update_and_allocate(step + first)
        counts.append(groups_that_train(adapters))
    return model, adapters, counts


def test_adamss_leaves_groups_out_by_and_by() -> None:
    """Of 12 groups 3 are left, fewer in a straight line from step 2 to step 6. HF peft leaves one fewer at each choice: of the k best
    it keeps those that are better than the k-th."""
    _, _, counts = trained(by_hand=False)
    assert counts == [12, 12, 12, 12, 7, 7, 3, 3]


def test_adamss_counts_each_step_once() -> None:
    _model, adapters, counts = trained(by_hand=True)
    assert counts == [12, 12, 12, 12, 7, 7, 3, 3]
    _, others, _ = trained(by_hand=False)
    for p, other in zip(adapters, others, strict=True):
        assert all(torch.equal(q, r) for q, r in zip(p.parameters(), other.parameters(), strict=True))


def test_adamss_keeps_the_groups_that_matter() -> None:
    model, adapters = adapted(
        "AdamssConfig", r=4, num_subspaces=3, use_asa=True, init_warmup=0, final_warmup=1, mask_interval=1, asa_target_subspaces=1
    )
    config = model.peft_config["default"]
    for i, p in enumerate(adapters):
        for n, q in p.named_parameters():
            q.grad = torch.full_like(q, 10.0 if i == 2 and n.endswith("_1") else 0.1)
    for step in range(2):
        config._allocate(adapters, step)
        assert not any(_means(p) for p in adapters)
    assert [(i, n) for i, p in enumerate(adapters) for n, q in p.named_parameters() if q.requires_grad] == [
        (2, "adamss_A_1"), (2, "adamss_B_1")
    ]  # fmt: skip
