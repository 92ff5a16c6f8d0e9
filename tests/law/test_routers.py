"""Routers over adapters of any method: shares, what they are shares of, and that nothing is left behind."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core.inlaid import adapters_of

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
TARGETS = ["q_proj", "down_proj"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=1)).eval()


def ids() -> Tensor:
    return torch.randint(0, 40, (3, 5), generator=torch.Generator().manual_seed(2))


def stir(model: inlay.PeftModel, by: float = 0.3) -> None:
    generator = torch.Generator().manual_seed(1)
    for q in model.parameters():
        if q.requires_grad:
            q.data += by * torch.randn(q.shape, generator=generator)


EXPERTS: dict[str, Callable[[], Any]] = {
    "lora": lambda: inlay.LoraConfig(r=3, lora_alpha=5, target_modules=TARGETS),
    "dora": lambda: inlay.LoraConfig(r=2, use_dora=True, target_modules=TARGETS),
    "oft": lambda: inlay.OFTConfig(r=0, oft_block_size=4, target_modules=["q_proj"]),
    "lokr": lambda: inlay.LoKrConfig(r=2, target_modules=["down_proj"]),
    "ia3": lambda: inlay.IA3Config(target_modules=TARGETS, feedforward_modules=["down_proj"]),
}


def on_disk(folder: Path, *names: str) -> dict[str, str]:
    for name in names:
        model = inlay.get_peft_model(base(), EXPERTS[name]())
        stir(model)
        model.save_pretrained(folder / name)
    return {name: str(folder / name) for name in names}


def xlora(adapters: dict[str, str], **options: Any) -> inlay.PeftModel:
    model = inlay.get_peft_model(base(), inlay.XLoraConfig(adapters=adapters, task_type="CAUSAL_LM", **options)).eval()
    stir(model, 1.0)
    return model


def logits(model: Any, **given: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(), **given).logits


def close(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


# ---- X-LoRA ---------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("names", [("lora",), ("lora", "dora"), ("lora", "oft", "lokr", "ia3")], ids="-".join)
def test_adapters_of_any_method_in_their_shares(names: tuple[str, ...], tmp_path: Path) -> None:
    """At each layer, ``W x + sum_k g_k (E_k(x) - W x)``."""
    model = xlora(on_disk(tmp_path, *names))
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    routers = {p.path: p for p in adapters_of(model.get_base_model(), "default")}
    hooks = []
    for path in routers:
        module = model.get_base_model().get_submodule(path)
        hooks.append(module.register_forward_hook(lambda _, args, out, path=path: seen.update({path: (args[0], out)})))
    logits(model)
    for hook in hooks:
        hook.remove()
    scalings = model.get_latest_scalings()
    assert scalings is not None
    assert scalings.shape == (3, 5, len(routers), len(names))
    close(scalings.sum(-1), torch.ones(3, 5, len(routers)))
    for i, (path, (x, y)) in enumerate(seen.items()):
        module = model.get_base_model().get_submodule(path)
        with torch.no_grad(), model.disable_adapter():
            plain = expected = module(x)
        for k, name in enumerate(names):
            with torch.no_grad(), model.use_adapters(name):
                expected = expected + scalings[:, :, i, k : k + 1] * (module(x) - plain)
        close(y, expected)


def test_shares_of_one_are_the_adapter_itself(tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora"))
    with model.use_adapters("lora"):
        alone = logits(model)
    close(logits(model), alone)


def test_shares_that_users_ask_for(tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora", "dora"), layerwise_scalings=True)
    assert model.get_latest_scalings() is None
    plain = logits(model)
    model.enable_scalings_logging()
    logits(model)
    with torch.no_grad():
        model(input_ids=ids()[:, :3])
    model.disable_scalings_logging()
    logits(model)
    assert [tuple(t.shape[:2]) for t in model.get_scalings_log()] == [(3, 5), (3, 3)]
    assert {n: positions for n, (positions, _) in model.get_bucketed_scalings_log().items()} == {5: [0], 3: [1]}
    model.clear_scalings_log()
    assert model.get_scalings_log() == []
    model.set_topk_lora(1)
    assert not torch.allclose(logits(model), plain, atol=1e-3)
    model.set_topk_lora(None)
    model.set_global_scaling_weight(0.0)
    assert model.get_global_scaling_weight() == 0
    close(logits(model), logits(base()))


def test_what_xlora_changes_is_put_back(tmp_path: Path) -> None:
    plain = base()
    before, expected = plain.state_dict().keys(), logits(plain)
    caches = plain.config.use_cache, plain.generation_config.use_cache
    model = inlay.get_peft_model(plain, inlay.XLoraConfig(adapters=on_disk(tmp_path, "lora", "dora")))
    assert set(model.peft_config) == {"default", "lora", "dora"}
    model.delete_adapter("default")
    assert plain.state_dict().keys() == before
    assert torch.equal(logits(plain), expected)
    assert (plain.config.use_cache, plain.generation_config.use_cache) == caches
    assert not plain._forward_pre_hooks
    assert all(q.requires_grad for q in plain.parameters())
    again = inlay.get_peft_model(plain, inlay.XLoraConfig(adapters=on_disk(tmp_path, "lora")))
    assert torch.equal(logits(again.unload()), expected)
    assert not plain._forward_pre_hooks


def test_adapters_that_are_there_are_used_as_they_are(tmp_path: Path) -> None:
    model = inlay.get_peft_model(base(), EXPERTS["lora"](), adapter_name="mine")
    stir(model)
    alone = logits(model)
    model.add_adapter("router", inlay.XLoraConfig(adapters={"mine": "nowhere"}))
    model.set_adapter("router")
    close(logits(model.eval()), alone)
    model.delete_adapter("router")
    assert set(model.peft_config) == {"mine"}


def test_a_router_in_a_mixed_batch(tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora", "dora"))
    mixed = logits(model, adapter_names=["default", "lora", "__base__"])
    close(mixed[0], logits(model)[0])
    with model.use_adapters("lora"):
        close(mixed[1], logits(model)[1])
    close(mixed[2], logits(base())[2])


def test_checkpointed_blocks_get_the_shares_of_their_first_run(tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora", "dora")).train()
    other = copy.deepcopy(model)
    other.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    for m in (model, other):
        m(input_ids=ids(), labels=ids()).loss.backward()
    mine, its = ({n: q.grad for n, q in m.named_parameters() if q.requires_grad} for m in (model, other))
    assert mine.keys() == its.keys()
    for name, grad in mine.items():
        assert grad is not None
        close(its[name], grad)


@pytest.mark.parametrize("trainable", [False, True])
def test_who_is_trained(trainable: bool, tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora"), use_trainable_adapters=trainable)
    trained = [n for n, q in model.named_parameters() if q.requires_grad]
    assert any("xlora_classifier" in n for n in trained)
    assert any("lora_A" in n for n in trained) == trainable
    model.save_pretrained(tmp_path / "saved")
    again = inlay.PeftModel.from_pretrained(base(), tmp_path / "saved", is_trainable=True).eval()
    close(logits(again), logits(model))
    assert len([1 for q in again.parameters() if q.requires_grad]) == len(trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give them as `adapters`"),
        ({"adapters": {"x": "nowhere/at/all"}}, "nowhere/at/all"),
        ({"adapters": {"default": "here"}}, "."),
        ({"xlora_depth": 0}, "`xlora_depth` should be positive"),
        ({"top_k_lora": 0}, "`top_k_lora` should be at least 1"),
    ],
)
def test_what_xlora_refuses(options: dict[str, Any], message: str) -> None:
    model = base()
    with pytest.raises(ValueError, match=message):
        inlay.get_peft_model(model, inlay.XLoraConfig(**options))
    assert not model._forward_pre_hooks


def test_xlora_takes_no_cache_and_no_merging(tmp_path: Path) -> None:
    model = xlora(on_disk(tmp_path, "lora"))
    with model.disable_adapter():
        cache = model(input_ids=ids(), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="use_cache=False"):
        model(input_ids=ids(), past_key_values=cache)
    with pytest.raises(TypeError, match="shares of its own"):
        model.merge_and_unload()


# ---- Arrow ----------------------------------------------------------------------------------------------------------------
def test_arrow_routes_to_any_method(tmp_path: Path) -> None:
    paths = list(on_disk(tmp_path, "lora", "dora", "lokr").values())
    model = inlay.create_arrow_model(base(), paths, inlay.ArrowConfig(top_k=1, rng_seed=0)).eval()
    p = adapters_of(model.get_base_model(), "arrow_router")[0]
    module = p.site.module
    x = torch.randn(4, 6, module.in_features)
    tasks = [n for n in ("task_0", "task_1", "task_2") if n in module._inlay["weight"].adapters]
    towards, outputs = [], []
    with torch.no_grad():
        plain = module._host.forward(module, x) if hasattr(module, "_host") else module(x)
        for name in tasks:
            w, _ = module._inlay["weight"].fold((name,))
            towards.append(torch.linalg.svd(w - p.site.read()[0])[2][0])
            with model.use_adapters(name):
                outputs.append(module(x) - plain)
        best = (x @ torch.stack(towards).T).abs().argmax(-1)
        expected = plain + torch.stack(outputs, -2).gather(-2, best[..., None, None].expand(4, 6, 1, plain.shape[-1])).squeeze(-2)
        found = module(x)
    # Power iteration stops before the last digit; where scores are close, the choice may differ.
    assert (found - expected).abs().amax(-1).lt(1e-4).float().mean() > 0.9


def test_arrow_sees_that_an_adapter_was_trained(tmp_path: Path) -> None:
    paths = list(on_disk(tmp_path, "lora", "lora").values())
    model = inlay.create_arrow_model(base(), [*paths, *paths], inlay.ArrowConfig(top_k=1, rng_seed=0)).eval()
    before = logits(model)
    with torch.no_grad():
        for p in adapters_of(model.get_base_model(), "task_1"):
            p.lora_A.normal_()
    assert not torch.allclose(logits(model), before, atol=1e-4)


@pytest.mark.parametrize(
    ("paths", "options", "message"),
    [
        ([], {}, "at least one adapter path"),
        (["lora"], {"use_gks": True}, "`use_gks` needs `general_adapter_paths`"),
    ],
)
def test_what_arrow_refuses(paths: list[str], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        inlay.create_arrow_model(base(), paths, inlay.ArrowConfig(**options))


def test_genknowsub_needs_factors_of_one_shape(tmp_path: Path) -> None:
    found = on_disk(tmp_path, "lora", "dora")
    model = inlay.create_arrow_model(base(), [found["lora"]], inlay.ArrowConfig(use_gks=True), [found["dora"]])
    with pytest.raises(ValueError, match="LoRA of one rank"):
        logits(model)


# ---- Poly -----------------------------------------------------------------------------------------------------------------
def poly(**options: Any) -> inlay.PeftModel:
    model = inlay.get_peft_model(base(), inlay.PolyConfig(r=2, n_skills=3, target_modules=[*TARGETS, "embed_tokens"], **options)).eval()
    stir(model)
    return model


def test_each_row_has_its_tasks_mixture() -> None:
    model = poly(n_tasks=3, n_splits=2)
    tasks = torch.tensor([2, 0, 2])
    together = logits(model, task_ids=tasks)
    for row, task in enumerate(tasks):
        close(together[row], logits(model, task_ids=task.expand(3))[row])
    # One task is an ordinary low-rank update.
    p = adapters_of(model.get_base_model(), "default")[1]
    shares = torch.sigmoid(p.module_logits[2].view(2, 3))
    shares = shares / shares.sum(-1, keepdim=True)
    a = torch.cat([torch.einsum("s,sdr->dr", shares[q], p.poly_lora_A[q]) for q in range(2)])
    b = torch.cat([torch.einsum("s,srd->rd", shares[q], p.poly_lora_B[q]) for q in range(2)], 1)
    x = torch.randn(3, 5, p.site.size("in"))
    with model.session.calling({"default": {"tasks": torch.tensor([2, 2, 2])}}):
        close(p.site.module(x), torch.nn.functional.linear(x, p.site.module.weight) + x @ a @ b / 2)


def test_poly_in_a_mixed_batch_and_with_beams() -> None:
    model = poly(n_tasks=2)
    tasks = torch.tensor([1, 0, 1])
    mixed = logits(model, task_ids=tasks, adapter_names=["default", "__base__", "default"])
    close(mixed[[0, 2]], logits(model, task_ids=tasks)[[0, 2]])
    close(mixed[1], logits(base())[1])
    asked = {"input_ids": ids(), "max_new_tokens": 3, "num_beams": 2, "do_sample": False, "pad_token_id": 0}
    found = model.generate(**asked, task_ids=tasks)
    row = model.generate(**asked | {"input_ids": ids()[1:2]}, task_ids=tasks[1:2])
    assert torch.equal(found[1, : row.shape[1]], row[0])


def test_poly_of_one_task_merges() -> None:
    model = poly()
    expected = logits(model)
    close(logits(model, task_ids=torch.zeros(3, dtype=torch.int64)), expected)
    close(logits(model.merge_and_unload()), expected)


def test_what_poly_refuses() -> None:
    model = poly(n_tasks=2)
    with pytest.raises(ValueError, match="pass `task_ids` to the model"):
        logits(model)
    with pytest.raises(ValueError, match="go from 0 to 1"):
        logits(model, task_ids=torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="gives each row its task's mixture"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match="`n_skills` should be a positive integer"):
        inlay.PolyConfig(n_skills=0)
    with pytest.raises(ValueError, match="Known: poly"):
        inlay.PolyConfig(poly_type="mhr")
    with pytest.raises(ValueError, match="in training Poly draws a mixture for each row"):
        inlay.PolyConfig(use_dora=True)
    with pytest.raises(ValueError, match="cannot be split into `n_splits` = 5 parts"):
        poly(n_splits=5)
