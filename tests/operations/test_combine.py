"""What becomes of several adapters, against formulas; and one adapter alone, which comes back."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import inlay
from inlay.core.attach import activate, detach
from inlay.core.inlaid import adapters_of, session_of
from inlay.operations.arithmetic import COMBINATIONS, Options, combination
from inlay.operations.combine import add_weighted_adapter
from inlay.operations.cutting import cut
from inlay.operations.effects import effects

from ..law.layouts import Layout
from ..law.support import BY_NAME, acting, adapted, add, each

SOME = acting("linear", "conv2d-groups", "embedding", "layer-norm", "experts-transposed", "attention", "tied", once=True)
HOST = {"target_modules": ["host"]}
LINEAR = BY_NAME["linear"]


def acts(model: nn.Module, name: str, example: tuple[Tensor, ...]) -> Tensor:
    session = session_of(model)
    assert session is not None
    activate(session, (name,))
    with torch.no_grad():
        return model(*example)


def matrix(model: nn.Module, name: str) -> Tensor:
    """What an adapter adds at the only weight."""
    return next(iter(effects(model, (name,))[0].weights.values())).matrix()


def close(actual: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def linear(*options: dict[str, Any], layout: Layout = LINEAR) -> nn.Module:
    """A layer with adapters a, b, c, ... of LoRA."""
    model = layout.model(torch.float32)
    for name, given_options in zip("abcdef", options, strict=False):
        add(model, "LORA", layout, name, **given_options)
    return model


# ---- one adapter ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("case", "layout"), [each(pair) for pair in SOME])
def test_every_method_comes_back_alone_and_beside_nothing(case: str, layout: Layout) -> None:
    model, example = adapted(case, layout, torch.float32), layout.example(torch.float32)
    add(model, "LORA", layout, "other")
    expected = acts(model, "a", example)
    for kind, names, weights in (("ties", ["a"], [1.0]), ("cat", ["a", "other"], [1.0, 0.0]), ("svd", ["other", "a"], [0.0, 1.0])):
        add_weighted_adapter(model, names, weights, "new", kind, density=0.5)
        close(acts(model, "new", example), expected)
        detach(model, "new")


@pytest.mark.parametrize("kind", COMBINATIONS)
@pytest.mark.parametrize("options", [{"use_rslora": True}, {"use_dora": True}, {"bias": "lora_only"}, {"lora_bias": True}])
def test_every_way_gives_one_adapter_back(kind: str, options: dict[str, Any]) -> None:
    model, example = linear(options), LINEAR.example(torch.float32)
    model.host.set_scale("a", 1.5)  # type: ignore[union-attr, operator]
    add_weighted_adapter(model, ["a"], [1], "new", kind)
    close(acts(model, "new", example), acts(model, "a", example), 1e-6)
    add_weighted_adapter(model, ["a"], [-2], "less", kind)
    close(matrix(model, "less"), -2 * matrix(model, "a"), 1e-5)


@pytest.mark.parametrize("case", [case for case, _ in acting("linear", once=True)])
def test_every_method_comes_back_by_every_way(case: str) -> None:
    """Whatever the way, and its density, which one adapter alone does not feel."""
    model, example = adapted(case, LINEAR, torch.float32), LINEAR.example(torch.float32)
    expected = acts(model, "a", example)
    for kind in COMBINATIONS:
        add_weighted_adapter(model, ["a"], [1], "new", kind, density=0.3)
        close(acts(model, "new", example), expected, 1e-6)
        detach(model, "new")


@pytest.mark.parametrize("kind", COMBINATIONS)
def test_patterns_tokens_and_modules_of_one_adapter_come_back(kind: str) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"rank_pattern": {"body": 5}, "alpha_pattern": {"tokens": 7}, "use_rslora": True, "bias": "all"}
    options |= {"overrides": {"body": {"use_dora": True}}, "modules_to_save": ["head"], "strength_pattern": {"tokens": 0.5}}
    model: Any = inlay.get_peft_model(Small(), inlay.LoraConfig(r=2, target_modules=["tokens", "body"], **options), "a").eval()
    for q in model.parameters():
        if q.requires_grad:
            q.data += 0.3 * torch.randn_like(q)
    with torch.no_grad():
        expected = model(torch.arange(7))
        model.add_weighted_adapter(["a"], [1.0], "new", kind)
        model.set_adapter("new")
        close(model(torch.arange(7)), expected, 1e-6)


def test_a_density_that_is_not_given_is_one_half() -> None:
    model = linear({"r": 3}, {"r": 2, "seed": 4})
    for kind in [name for name, way in COMBINATIONS.items() if way.prunes]:
        for name, options in (("plain", {}), ("said", {"density": 0.5})):
            add_weighted_adapter(model, ["a", "b"], [1, 0.7], name, kind, seed=3, **options)
        assert torch.equal(matrix(model, "plain"), matrix(model, "said"))
        for name in ("plain", "said"):
            detach(model, name)


def test_an_activated_lora_stays_one() -> None:
    model = linear({"alora_invocation_tokens": [3]}, {"alora_invocation_tokens": [3], "r": 2}, {"alora_invocation_tokens": [4]}, {})
    add_weighted_adapter(model, ["a", "b"], [0.5, 2], "new", "cat")
    session = session_of(model)
    assert session is not None
    config: Any = session.configs["new"]
    assert (config.alora_invocation_tokens, config.r) == ([3], 6)
    for other in ("c", "d"):
        with pytest.raises(ValueError, match="different `alora_invocation_tokens`"):
            add_weighted_adapter(model, ["a", other], [1, 1], "wrong", "cat")
    assert "wrong" not in session.configs


# ---- several --------------------------------------------------------------------------------------------------------------
def test_sums_of_different_methods_are_exact() -> None:
    model = linear({"r": 2, "lora_alpha": 5}, {"r": 3, "use_rslora": True})
    add(model, "HRA", LINEAR, "rotated")
    add(model, "VERA", LINEAR, "vera")
    names, weights = ["a", "b", "rotated", "vera"], [0.5, -1.0, 2.0, 0.25]
    expected = sum(w * matrix(model, n) for w, n in zip(weights, names, strict=True))
    for kind in ("linear", "cat", "svd"):
        add_weighted_adapter(model, names, weights, kind, kind)
        close(matrix(model, kind), torch.as_tensor(expected), 1e-5)
        assert session_of(model).configs[kind].peft_type == "FULL"  # type: ignore[union-attr]
    add_weighted_adapter(model, names, weights, "cut", "svd", svd_rank=2)
    u, s, vt = torch.linalg.svd(torch.as_tensor(expected))
    close(matrix(model, "cut"), u[:, :2] * s[:2] @ vt[:2], 1e-4)
    assert session_of(model).configs["cut"].r == 2  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [[0.7, 0.3], [1.0, 1.0], [0.0, 0.0], [2.0, -0.5]])
@pytest.mark.parametrize("inputs", [[], ["host"]])
def test_gains_are_weighted_by_what_they_change(inputs: list[str], weights: list[float]) -> None:
    """HF peft sums gains: of two adapters at weight 1 it makes a layer of twice the size, and of weights 0 one of zeros."""
    model = LINEAR.model(torch.float32)
    for name in "ab":
        add(model, "IA3", LINEAR, name, feedforward_modules=inputs)
    add_weighted_adapter(model, ["a", "b"], weights, "new", "cat")
    close(matrix(model, "new"), weights[0] * matrix(model, "a") + weights[1] * matrix(model, "b"), 1e-6)
    session = session_of(model)
    assert session is not None
    assert str(session.configs["new"].peft_type) == "IA3"


def test_a_share_in_place_of_a_rank_is_what_stays() -> None:
    model = linear({"r": 4}, {"r": 4, "seed": 3})
    add_weighted_adapter(model, ["a", "b"], [1, 1], "cut", "svd", svd_rank=0.9)
    whole = matrix(model, "a") + matrix(model, "b")
    s = torch.linalg.svdvals(whole)
    needed = int((s.square().cumsum(0) / s.square().sum() < 0.9).sum()) + 1
    p = adapters_of(model, "cut")[0]
    assert p.method.r == needed  # type: ignore[attr-defined]
    assert (matrix(model, "cut").norm() / whole.norm()).square() >= 0.9


@pytest.mark.parametrize("kind", ["slerp", "karcher"])
def test_means_on_the_sphere_keep_the_rank(kind: str) -> None:
    model = linear({"r": 2}, {"r": 2, "lora_alpha": 4})
    add_weighted_adapter(model, ["a", "b"], [0.25, 0.75], "new", kind)
    one, other = matrix(model, "a"), matrix(model, "b")
    rule = COMBINATIONS[kind].rule
    close(matrix(model, "new"), rule(torch.stack([one, other]), torch.tensor([0.25, 0.75]), Options()), 1e-5)
    assert adapters_of(model, "new")[0].method.r == 4  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["knots", "core_ties"])
def test_aligned_spaces_are_lossless(kind: str) -> None:
    """With nothing to trim and one sign everywhere, TIES is the mean; of an adapter with itself that is the adapter."""
    model = linear({"r": 3})
    add_weighted_adapter(model, ["a", "a"], [1, 1], "new", kind, density=1)
    close(matrix(model, "new"), matrix(model, "a"), 1e-5)
    model = linear({"r": 2}, {"r": 3})
    add_weighted_adapter(model, ["a", "b"], [1, 1], "new", kind, density=1)
    assert adapters_of(model, "new")[0].method.r == 5  # type: ignore[attr-defined]


def test_knots_by_its_definition() -> None:
    model = linear({"r": 2}, {"r": 3})
    deltas = [matrix(model, n) for n in "ab"]
    add_weighted_adapter(model, ["a", "b"], [0.5, 0.8], "new", "knots", density=0.5)
    u, s, vt = torch.linalg.svd(torch.cat(deltas, 1).double(), full_matrices=False)
    v = torch.stack(vt[:5].chunk(2, 1))
    expected = u[:, :5] * s[:5] @ COMBINATIONS["ties"].rule(v, torch.tensor([0.5, 0.8]), Options(density=0.5))
    close(matrix(model, "new").double(), expected, 1e-5)


@pytest.mark.parametrize("weights", [[0.5, 0.8], [1.0, -2.0]])
def test_core_space_by_its_definition(weights: list[float]) -> None:
    model = linear({"r": 2}, {"r": 3})
    deltas = [matrix(model, n).double() for n in "ab"]
    add_weighted_adapter(model, ["a", "b"], weights, "new", "core_ties", density=0.5)
    (a, b), (c, d) = ([t.double() for t in p.method.factors(p)] for n in "ab" for p in adapters_of(model, n))  # type: ignore[attr-defined]
    scales = [p.method.scaling for n in "ab" for p in adapters_of(model, n)]  # type: ignore[attr-defined]
    left = torch.linalg.svd(torch.cat([scales[0] * b, scales[1] * d], 1), full_matrices=False)[0]
    right = torch.linalg.svd(torch.cat([a, c]), full_matrices=False)[2]
    cores = torch.stack([left.mT @ delta @ right.mT for delta in deltas])
    merged = COMBINATIONS["ties"].rule(cores, torch.tensor(weights), Options(density=0.5))
    close(matrix(model, "new").double(), left @ merged @ right, 1e-5)


def test_weights_by_layer() -> None:
    layout = BY_NAME["attention"]
    model = layout.model(torch.float32)
    for name in "ab":
        add(model, "LORA", layout, name)
    add_weighted_adapter(model, ["a", "b"], {".*out_proj": [1, 0], ".*": [0.5, 2]}, "new", "cat")
    one, other, new = effects(model, ("a", "b", "new"))
    for key, update in new.weights.items():
        w = (1, 0) if "out_proj" in update.name else (0.5, 2)
        close(update.matrix(), w[0] * one.weights[key].matrix() + w[1] * other.weights[key].matrix(), 1e-5)
    with pytest.raises(ValueError, match=r"No pattern of the weights matches 'host"):
        add_weighted_adapter(model, ["a", "b"], {".*out_proj": [1, 0]}, "bad", "cat")


def test_weights_by_layer_of_one_adapter() -> None:
    layout = BY_NAME["attention"]
    model = layout.model(torch.float32)
    add(model, "LORA", layout, "a", use_dora=True)
    add_weighted_adapter(model, ["a"], {".*out_proj": [1], ".*": [1]}, "same", "cat")
    assert adapters_of(model, "same")[0].method.use_dora  # type: ignore[attr-defined]
    add_weighted_adapter(model, ["a"], {".*out_proj": [2], ".*": [1]}, "new", "cat")
    one, new = effects(model, ("a", "new"))
    for key, update in new.weights.items():
        close(update.matrix(), (2 if "out_proj" in update.name else 1) * one.weights[key].matrix(), 1e-5)
    with pytest.raises(ValueError, match=r"No pattern of the weights matches 'host"):
        add_weighted_adapter(model, ["a"], {".*out_proj": [1]}, "bad", "cat")


def test_ties_between_embedding_and_head_hold_or_are_cut() -> None:
    layout, example = BY_NAME["tied"], BY_NAME["tied"].example(torch.float32)
    model = layout.model(torch.float32)
    add(model, "LORA", layout, "a")
    add(model, "LORA", layout, "b")
    add(model, "LORA", layout, "alone", ensure_weight_tying=False)
    for names, tied in ((["a", "b"], True), (["a", "alone"], False)):
        add_weighted_adapter(model, names, [1.0, 0.0], "new", "cat")
        close(acts(model, "new", example), acts(model, "a", example), 1e-5)
        assert session_of(model).configs["new"].ensure_weight_tying is tied  # type: ignore[union-attr]
        detach(model, "new")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.body, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def get_input_embeddings(self) -> nn.Module:
        return self.tokens

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.body(self.tokens(ids))))


@pytest.mark.parametrize("kind", ["cat", "svd", "soup", "dare_linear_svd"])
def test_tokens_biases_and_modules_are_kept(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model: Any = inlay.get_peft_model(Small(), inlay.LoraConfig(r=2, target_modules=["body"], trainable_token_indices=[1, 4]), "a")
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["tokens", "head"], bias="all"))
    model.add_adapter("c", inlay.LoraConfig(r=2, target_modules=["body"], modules_to_save=["head"]))
    for name in "abc":
        model.set_requires_grad(name)
        model.set_adapter(name)
        for q in model.parameters():
            if q.requires_grad:
                q.data += 0.3 * torch.randn_like(q)
    ids = torch.arange(7)
    plain = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if "adapters" not in k}
    weights = [0.5, 0.25, 0.25]
    share = 1.0 if kind != "soup" else 1 / sum(weights)
    model.add_weighted_adapter(["a", "b", "c"], weights, "all", kind, density=1.0, svd_rank=5 if "svd" in kind else None)
    assert not any(q.requires_grad for n, q in model.named_parameters() if ".all." in n)
    assert model.peft_config["all"].modules_to_save == ["head"]
    found: dict[str, dict[str, Tensor]] = {}
    for name in ("a", "b", "c", "all"):
        model.merge_adapter([name])
        found[name] = {k: v.clone() for k, v in model.get_base_model().state_dict().items() if "adapters" not in k}
        model.unmerge_adapter()
    for key, q in plain.items():
        expected = q + share * sum(w * (found[n][key] - q) for w, n in zip(weights, "abc", strict=True))
        close(found["all"][key], torch.as_tensor(expected), 1e-5)
    # In a model of its own, from its file.
    model.save_pretrained(tmp_path, selected_adapters=["all"])
    base, sums = Small(), Small()
    base.load_state_dict(plain)
    sums.load_state_dict(found["all"])
    alone = inlay.PeftModel.from_pretrained(base, tmp_path / "all")
    with torch.no_grad():
        close(alone(ids), sums(ids), 1e-5)


# ---- the rules ------------------------------------------------------------------------------------------------------------
def stack(*rows: list[float]) -> Tensor:
    return torch.tensor(rows)


def test_rules_by_hand() -> None:
    t, w = stack([4.0, -1.0, 2.0, 0.5], [-1.0, -3.0, 2.0, 0.25]), torch.tensor([1.0, 2.0])
    by = {name: c.rule for name, c in COMBINATIONS.items()}
    close(by["linear"](t, w, Options()), torch.tensor([2.0, -7.0, 6.0, 1.0]))
    close(by["soup"](t, w, Options()), torch.tensor([2.0, -7.0, 6.0, 1.0]) / 3)
    close(by["magnitude_prune"](t, w, Options(density=0.5)), torch.tensor([4.0, -6.0, 6.0, 0.0]))
    close(by["ties"](t, w, Options(density=0.5)), torch.tensor([4.0, -6.0, 3.0, 0.0]))
    close(by["ties"](stack([3.0], [-1.0], [-1.0]), torch.ones(3), Options()), torch.tensor([3.0]))
    close(by["ties"](stack([3.0], [-1.0], [-1.0]), torch.ones(3), Options(majority_sign_method="frequency")), torch.tensor([-1.0]))
    close(by["breadcrumbs"](t, w, Options(density=0.5, gamma=0.25)), torch.tensor([-2.0, -1.0, 6.0, 0.0]))
    right = by["slerp"](stack([2.0, 0.0], [0.0, 2.0]), torch.tensor([1.0, 1.0]), Options())
    close(right, torch.full((2,), math.sqrt(2.0)))
    close(by["karcher"](stack([2.0, 0.0], [0.0, 4.0]), torch.tensor([1.0, 1.0]), Options()), torch.full((2,), 3 / math.sqrt(2)))


def test_sce_by_hand() -> None:
    t = stack([2.0, 1.0, -1.0, 5.0], [0.0, 1.0, 3.0, 5.0])
    # The adapters differ in the first and third number; energies there are 5 and 9.
    one, other = 5 / 14, 9 / 14
    expected = torch.tensor([2.0, 0.0, 3.0, 0.0])
    assert other * 3 > one * 1
    close(COMBINATIONS["sce"].rule(t, torch.ones(2), Options(density=0.5)), expected)


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_what_is_dropped_at_random_is_made_up_for(name: str) -> None:
    t = torch.randn(2, 60, 500, generator=torch.Generator().manual_seed(0)) + 1
    rule, w = COMBINATIONS[name].rule, torch.tensor([1.0, 0.0])
    found = rule(t, w, Options(density=0.3, generator=torch.Generator().manual_seed(5)))
    assert (found != 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    assert found.mean().item() == pytest.approx(t[0].mean().item(), abs=0.05)
    again = rule(t, w, Options(density=0.3, generator=torch.Generator().manual_seed(5)))
    assert torch.equal(found, again)
    if name == "dare_linear":
        close(found[found != 0], (t[0] / 0.3)[found != 0])
    else:
        large = t[0].abs() > t[0].abs().median()
        assert (found[large] != 0).float().mean() > (found[~large] != 0).float().mean() + 0.02


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(sorted(COMBINATIONS)), st.integers(1, 4), st.integers(0, 100))
def test_rules_scale_with_the_adapters(name: str, count: int, seed: int) -> None:
    """Twice the adapters is twice the result, whatever the rule; and nothing stays nothing."""
    t = torch.randn(count, 5, 6, generator=torch.Generator().manual_seed(seed))
    w = torch.rand(count, generator=torch.Generator().manual_seed(seed + 1)) + 0.1
    rule = COMBINATIONS[name].rule

    def options() -> Options:
        return Options(density=0.6, generator=torch.Generator().manual_seed(seed))

    close(rule(2 * t, w, options()), 2 * rule(t, w, options()), 1e-3)
    assert not rule(0 * t, w, options()).any()


def test_the_draws_have_a_seed() -> None:
    model = linear({"r": 4}, {"r": 4})
    for name, seed in (("x", 1), ("y", 1), ("z", 2)):
        add_weighted_adapter(model, ["a", "b"], [1, 1], name, "dare_ties", density=0.5, seed=seed)
    assert torch.equal(matrix(model, "x"), matrix(model, "y"))
    assert not torch.equal(matrix(model, "x"), matrix(model, "z"))


# ---- decompositions -------------------------------------------------------------------------------------------------------
def test_a_wide_dense_update_is_cut_nearly_as_well_as_can_be() -> None:
    model = nn.Sequential(nn.Linear(600, 520, bias=False))
    model = inlay.get_peft_model(model, inlay.FullConfig(target_modules=["0"]), "a").get_base_model()
    decay = torch.diag_embed(0.97 ** torch.arange(520.0))
    adapters_of(model, "a")[0].diff.data = (torch.randn(520, 520) @ decay @ torch.randn(520, 600)) / 500
    update = next(iter(effects(model, ("a",))[0].weights.values()))
    found, error = cut(update, 8)
    s = torch.linalg.svdvals(update.matrix())
    best = (s[8:].norm() / s.norm()).item()
    assert best <= error <= 1.001 * best
    assert error == pytest.approx(((update.matrix() - found.matrix()).norm() / update.matrix().norm()).item(), rel=1e-3)


def test_factors_are_clamped_to_a_quantile() -> None:
    model = linear({"r": 3}, {"r": 3})
    add_weighted_adapter(model, ["a", "b"], [1, 1], "plain", "svd")
    add_weighted_adapter(model, ["a", "b"], [1, 1], "new", "svd", svd_clamp=0.9)
    (a, b), (c, d) = (p.method.factors(p) for n in ("plain", "new") for p in adapters_of(model, n))  # type: ignore[attr-defined]
    bound = torch.quantile(torch.cat([a.flatten(), b.flatten()]), 0.9)
    close(c, a.clamp(-bound, bound), 1e-5)
    close(d, b.clamp(-bound, bound), 1e-5)


# ---- what is refused ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("names", "weights", "options", "message"),
    [
        (["a", "c"], [1, 1], {}, "'c' not found"),
        (["a", "b"], [1], {}, "1 weights for 2 adapters"),
        (["a", "b"], [1, 1], {"combination_type": "tise"}, "Did you mean 'ties'"),
        (["a", "b"], [1, 1], {"combination_type": "ties", "density": -0.1}, "share in"),
        (["a", "b"], [1, 1], {"combination_type": "ties", "density": 0.5, "majority_sign_method": "x"}, "'total' or 'frequency'"),
        (["a", "b"], [1, -1], {"combination_type": "soup"}, "must be positive"),
        (["a", "b"], [1, math.nan], {}, r"weights \[1, nan\] are not finite"),
        (["a", "b"], [1, 1], {"svd_rank": 0}, "positive integer"),
        (["a", "b"], [1, 1], {"svd_rank": -2}, "positive integer"),
        (["a", "b"], [1, 1], {"svd_rank": 8.0}, r"share that is to stay, in \(0, 1\], not 8.0"),
        (["a", "b"], [1, 1], {"svd_clamp": 1.5}, "quantile in"),
        (["a", "b"], [1, 1], {"combination_type": "breadcrumbs", "gamma": 1.5}, "`gamma` is a share"),
        ([], [], {}, "nothing to combine"),
    ],
)
def test_what_is_wrong_is_said(names: list[str], weights: list[float], options: dict[str, Any], message: str) -> None:
    model = linear({"r": 2}, {"r": 2})
    with pytest.raises(ValueError, match=message):
        add_weighted_adapter(model, names, weights, "new", **options)
    session = session_of(model)
    assert session is not None
    assert list(session.configs) == ["a", "b"]


def test_a_taken_name_is_left_as_it_is() -> None:
    model = linear({"r": 2}, {"r": 2})
    before = matrix(model, "b").clone()
    with pytest.warns(UserWarning, match="'b' already"):
        add_weighted_adapter(model, ["a", "a"], [1, 1], "b", "cat")
    assert torch.equal(matrix(model, "b"), before)


def test_names_are_found() -> None:
    assert combination("svd").space == "sum"
    assert inlay.COMBINATIONS is COMBINATIONS
