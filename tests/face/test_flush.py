"""The host keeps its type, its place, its names and its hooks; initial values depend on seeds and names alone."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import inlay

from ..tiny import ids, llama, logits, stir


def test_types_keys_and_base_checkpoints_stay():
    model = llama()
    base = copy.deepcopy(model.state_dict())
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules="all-linear"))
    layer = model.model.layers[0].self_attn.q_proj
    assert isinstance(layer, nn.Linear)
    assert type(layer).__name__ == "InlaidLinear"
    keys = set(model.state_dict())
    assert set(base) <= keys
    assert all(".adapters.default.lora_" in k for k in keys - set(base))
    missing, unexpected = model.load_state_dict(base, strict=False)
    assert not unexpected
    assert len(missing) == 2 * 14
    assert peft_model.base_model.model is model
    assert next(n for n, q in peft_model.named_parameters() if q.requires_grad).startswith("base_model.model.model.layers.0.")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), "torch"])
def test_copies_are_whole_and_independent(clone):
    if clone == "torch":

        def clone(m):
            buffer = io.BytesIO()
            torch.save(m, buffer)
            return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)

    model = inlay.get_peft_model(
        llama(), inlay.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"], trainable_token_indices=[1])
    ).eval()
    stir(model)
    x = ids()
    y = logits(model, x)
    other = clone(model)
    assert torch.equal(logits(other, x), y)
    stir(other, seed=9)
    other.add_adapter("b", inlay.LoraConfig(target_modules=["v_proj"]))
    other.set_adapter("b")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(logits(model, x), y)
    assert not torch.equal(logits(other, x), y)
    assert type(other.base_model.model.model.layers[0].self_attn.q_proj) is type(model.base_model.model.model.layers[0].self_attn.q_proj)


def test_hooks_installed_before_keep_running():
    from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

    class Count(ModelHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Count.calls += 1
            return args, kwargs

    model, x = llama(), ids()
    layer = model.model.layers[0].self_attn.q_proj
    y = logits(model, x)
    add_hook_to_module(layer, Count())
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]))
    stir(peft_model)
    tuned = logits(peft_model, x)
    assert Count.calls == 1
    assert not torch.equal(tuned, y)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model, x), y)
    remove_hook_from_module(layer)
    assert torch.equal(logits(peft_model, x), tuned)
    assert Count.calls == 2
    add_hook_to_module(layer, Count())
    peft_model.unload()
    assert torch.equal(logits(model, x), y)
    assert Count.calls == 3


def test_a_forward_of_the_users_own_is_taken_over():
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer)
    own = layer.forward
    layer.forward = lambda x: own(x) + 1
    x = torch.randn(2, 4)
    y = model(x)
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["0"]))
    assert torch.equal(peft_model(x), y)
    stir(peft_model, by=1.0)
    assert not torch.equal(peft_model(x), y)
    peft_model.unload()
    assert torch.equal(model(x), y)


def values(model, name="default"):
    return {n: q.detach().clone() for n, q in model.named_parameters() if f".adapters.{name}." in n}


def test_initial_values_depend_on_seed_and_names_alone():
    config = {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
    torch.manual_seed(1)
    first = values(inlay.get_peft_model(llama(), inlay.LoraConfig(**config)))
    torch.manual_seed(2)
    torch.rand(7)
    state = torch.get_rng_state()
    second = values(inlay.get_peft_model(llama(), inlay.LoraConfig(**config)))
    fewer = values(inlay.get_peft_model(llama(), inlay.LoraConfig(**(config | {"target_modules": ["v_proj"]}))))
    other = values(inlay.get_peft_model(llama(), inlay.LoraConfig(**config, seed=5)))
    llama()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert all(torch.equal(first[k], fewer[k]) for k in fewer)
    assert not any(torch.equal(first[k], other[k]) for k in first)
    assert len({float(v.sum()) for v in first.values()}) == len(first)
    torch.set_rng_state(state)
    generator_before = torch.rand(3)
    torch.set_rng_state(state)
    inlay.LoraConfig(**config)
    assert torch.equal(torch.rand(3), generator_before)


def test_injection_draws_nothing_from_the_global_generator():
    model = llama()
    state = torch.get_rng_state()
    inlay.get_peft_model(model, inlay.LoraConfig(target_modules="all-linear"))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("base", "autocast", "expected"),
    [
        (torch.float32, True, torch.float32),
        (torch.bfloat16, True, torch.float32),
        (torch.bfloat16, False, torch.bfloat16),
        (torch.float64, True, torch.float64),
    ],
)
def test_dtype_policy(base, autocast, expected):
    model = inlay.get_peft_model(
        llama().to(base), inlay.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), autocast_adapter_dtype=autocast
    )
    assert {q.dtype for n, q in model.named_parameters() if "adapters" in n} == {expected}
    assert {q.dtype for n, q in model.named_parameters() if "adapters" not in n} == {base}
    x = ids()
    if base == torch.bfloat16 and autocast:
        # A float32 head over a model in half precision; autocast is how it is used.
        with torch.autocast("cpu", torch.bfloat16):
            assert model(x).logits.dtype in (torch.bfloat16, torch.float32)
    else:
        assert model(x).logits.dtype == base


def test_gradient_checkpointing_gives_gradients():
    """A frozen embedding's output asks for no gradient, and a reentrant checkpoint behind it would pass none."""
    x = ids()
    for reentrant in (True, False):
        grads = []
        for checkpointing in (False, True):
            model = llama().train()
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
            peft_model(input_ids=x, labels=x).loss.backward()
            grads.append({n: q.grad for n, q in peft_model.named_parameters() if q.requires_grad})
        assert grads[0].keys() == grads[1].keys()
        for key, value in grads[0].items():
            assert value.abs().sum() > 0
            torch.testing.assert_close(value, grads[1][key], rtol=1e-5, atol=1e-7)


def test_compiled_models_follow_switches():
    torch._dynamo.reset()
    model = inlay.get_peft_model(llama(layers=1), inlay.LoraConfig(target_modules=["q_proj"]), "a").eval()
    model.add_adapter("b", inlay.LoraConfig(target_modules=["v_proj"]))
    stir(model, "a")
    stir(model, "b", seed=4)
    x = ids()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for name in ("a", "b", "a"):
        model.set_adapter(name)
        torch.testing.assert_close(logits(compiled, x), logits(model, x))
    with model.disable_adapter():
        torch.testing.assert_close(logits(compiled, x), logits(model, x))
    with model.use_adapters("b"):
        torch.testing.assert_close(logits(compiled, x), logits(model, x))


def test_views_for_other_libraries():
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj"]))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (4, 32)
    assert layer.lora_B["default"].weight.shape == (32, 4)
    assert dict(layer.r) == {"default": 4}
    assert layer.scaling["default"] == 3.0
    assert layer.active_adapters == ["default"]
    assert type(layer.base_layer) is type(layer.get_base_layer()) is nn.Linear
    assert layer.base_layer.weight is layer.weight
    stir(model)
    x = torch.randn(2, 32)
    y, base = layer(x), nn.functional.linear(x, layer.weight)
    assert torch.equal(layer.base_layer(x), base)
    for scale in (0.5, 2.0, 0.0):
        layer.set_scale("default", scale)
        torch.testing.assert_close(layer(x) - base, scale * (y - base), rtol=1e-4, atol=1e-5)
    layer.set_scale("default", 1.0)
    layer.scale_layer(3.0)
    torch.testing.assert_close(layer(x) - base, 3 * (y - base), rtol=1e-4, atol=1e-5)
    layer.unscale_layer(3.0)
    torch.testing.assert_close(layer(x), y)
    torch.testing.assert_close(layer.get_delta_weight("default"), 3 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight)
