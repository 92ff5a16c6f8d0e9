"""Targeting that one can see: what matches, what does not and why; a typo is never silent."""

import pytest
import torch
from torch import nn

import inlay
from inlay.core.targets import NoMatchingPeftModuleError

from ..tiny import assert_same, bert_classifier, llama, mixtral, snapshot


def adapted(model, **options):
    return inlay.explain_targets(model, inlay.LoraConfig(**options)).matched


def layers(*names, n=2):
    return [f"model.layers.{i}.{name}" for i in range(n) for name in names]


def test_suffixes_regex_and_all_linear():
    model = llama()
    assert adapted(model, target_modules=["q_proj", "mlp.up_proj"]) == layers("self_attn.q_proj", "mlp.up_proj")
    assert adapted(model, target_modules=r".*layers\.1\..*(q|k)_proj") == [
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.self_attn.k_proj",
    ]
    linear = [
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    ]
    assert adapted(model, target_modules="all-linear") == layers(*linear)
    assert adapted(model) == layers("self_attn.q_proj", "self_attn.v_proj")


def test_suffixes_end_at_dots():
    model = nn.ModuleDict({"up_proj": nn.Linear(2, 2), "xup_proj": nn.Linear(2, 2), "inner": nn.ModuleDict({"up_proj": nn.Linear(2, 2)})})
    assert adapted(model, target_modules=["up_proj"]) == ["up_proj", "inner.up_proj"]


def test_exclusion_and_layers():
    model = llama(layers=4)
    found = inlay.explain_targets(model, inlay.LoraConfig(target_modules=["q_proj"], exclude_modules=["layers.0.self_attn.q_proj"]))
    assert found.matched == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 2, 3)]
    assert "exclude_modules" in found.excluded["model.layers.0.self_attn.q_proj"]
    assert adapted(model, target_modules=["q_proj"], layers_to_transform=[1, 3]) == [f"model.layers.{i}.self_attn.q_proj" for i in (1, 3)]
    assert adapted(model, target_modules=["q_proj"], layers_to_transform=2, layers_pattern="layers") == ["model.layers.2.self_attn.q_proj"]


def test_the_first_number_is_the_layer():
    model = nn.ModuleDict(
        {"layers": nn.ModuleList([nn.ModuleDict({"experts": nn.ModuleList([nn.ModuleDict({"up": nn.Linear(2, 2)})])})] * 1)}
    )
    assert adapted(model, target_modules=["up"], layers_to_transform=[0]) == ["layers.0.experts.0.up"]


def test_explanation_says_why():
    found = inlay.explain_targets(
        llama(), inlay.LoraConfig(target_modules=["q_proj", "self_attn"], modules_to_save=["layers.0.self_attn.q_proj"])
    )
    assert "as a whole" in found.excluded["model.layers.0.self_attn.q_proj"]
    assert "LlamaAttention has no weight" in found.refused["model.layers.1.self_attn"]
    assert "model.layers.1.mlp.up_proj" in found.frozen
    text = str(found)
    assert "1 weights get an adapter" in text
    assert "+ model.layers.1.self_attn.q_proj" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_modules": ["q_porj"]}, r"'q_porj' matches nothing. Did you mean 'q_proj'"),
        ({"target_modules": ["q_proj", "vproj"]}, r"'vproj' matches nothing. Did you mean 'v_proj'"),
        ({"target_modules": r".*nothing"}, "nothing"),
        ({"target_modules": ["q_proj"], "rank_pattern": {"k_proj": 3}}, r"rank_pattern: k_proj.*matches nothing"),
        ({"target_modules": ["q_proj"], "alpha_pattern": {"q_prj": 3}}, r"alpha_pattern: q_prj.*Did you mean 'q_proj'"),
        ({"target_modules": ["q_proj"], "overrides": {"layers.7.*": {"r": 2}}}, r"overrides: layers.7"),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_haed"]}, r"no module 'lm_haed'. Did you mean 'lm_head'"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": {"embed": [1]}}, r"no module 'embed'"),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [10**6]}, "token 1000000 is not among"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, "All modules that match were excluded"),
        ({"target_modules": ["self_attn"]}, "cannot act on 'model.layers.0.self_attn'"),
    ],
)
def test_mistakes_name_the_culprit_and_leave_no_trace(options, message):
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inlay.get_peft_model(model, inlay.LoraConfig(**options))
    assert_same(before, snapshot(model))
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]))
    state = snapshot(peft_model)
    with pytest.raises(ValueError, match=message):
        peft_model.add_adapter("second", inlay.LoraConfig(**options))
    assert_same(state, snapshot(peft_model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "positive integer"),
        ({"r": 2.5}, "positive integer"),
        ({"lora_dropout": 1.5}, r"share in \[0, 1\)"),
        ({"bias": "al"}, r"bias='al' is not one of.*Did you mean 'all'"),
        ({"init_lora_weights": "gausian"}, "Did you mean 'gaussian'"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "odd"),
        ({"task_type": "CAUSAL_LN"}, "Did you mean 'CAUSAL_LM'"),
        ({"layers_pattern": "h"}, "layers_to_transform"),
        ({"use_dora": True, "lora_bias": True}, "lora_bias"),
        ({"overrides": {"q": {"rr": 3}}}, "unknown field 'rr'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        inlay.LoraConfig(**options)


def test_unknown_options_are_type_errors():
    with pytest.raises(TypeError, match="rank"):
        inlay.LoraConfig(rank=4)


def test_a_config_survives_the_dictionary():
    config = inlay.LoraConfig(r=3, target_modules=["b", "a"], rank_pattern={"x": 2}, modules_to_save=["head"], layers_to_transform=[1])
    assert inlay.LoraConfig(**config.to_dict()) == config
    assert config.target_modules == {"a", "b"}


def test_overrides_change_any_field_by_pattern():
    config = inlay.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], overrides={r"layers\.0\..*": {"r": 2, "use_dora": True}}, alpha_pattern={"v_proj": 32}
    )
    model = inlay.get_peft_model(llama(), config)
    first, second = (model.base_model.model.model.layers[i].self_attn for i in (0, 1))
    assert first.q_proj.lora_A["default"].weight.shape == (2, 32)
    assert "default" in first.q_proj.lora_magnitude_vector
    assert second.q_proj.lora_A["default"].weight.shape == (4, 32)
    assert "default" not in second.q_proj.lora_magnitude_vector
    assert (second.v_proj.scaling["default"], first.v_proj.scaling["default"]) == (8.0, 16.0)


def test_no_defaults_for_unknown_architectures():
    with pytest.raises(ValueError, match="no default for architecture None"):
        inlay.get_peft_model(nn.Sequential(nn.Linear(2, 2)), inlay.LoraConfig())
    with pytest.raises(NoMatchingPeftModuleError):
        inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules=[]))


def test_expert_parameters():
    model = mixtral()
    found = adapted(model, target_modules=[], target_parameters=["experts.gate_up_proj"])
    assert found == [f"model.layers.{i}.mlp.experts.gate_up_proj" for i in (0, 1)]
    with pytest.raises(ValueError, match="gate_up_porj"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=[], target_parameters=["experts.gate_up_porj"]))


def test_a_second_look_ignores_the_first_adapter():
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules="all-linear"))
    config = inlay.LoraConfig(target_modules="all-linear")
    assert adapted(model, target_modules="all-linear") == adapted(llama(), target_modules="all-linear")
    model.add_adapter("b", config)
    assert model.get_model_status().num_adapter_layers == 14


def test_the_head_of_a_classifier_is_retrained_not_adapted():
    config = inlay.LoraConfig(target_modules="all-linear", task_type="SEQ_CLS")
    model = inlay.get_peft_model(bert_classifier(), config)
    assert type(model) is inlay.PeftModelForSequenceClassification
    assert model.modules_to_save == {"classifier"}
    trainable = [n for n, q in model.named_parameters() if q.requires_grad and "classifier" in n]
    assert trainable == ["base_model.model.classifier.adapters.default.weight", "base_model.model.classifier.adapters.default.bias"]
    # One more adapter without a head of its own configuration is no error.
    model.add_adapter("b", inlay.LoraConfig(target_modules=["query"]))
    model.set_adapter("b")


def test_adapters_without_retrained_modules_join_those_with():
    model = llama()
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]), model, "a")
    inlay.inject_adapter_in_model(inlay.LoraConfig(target_modules=["v_proj"]), model, "b")
    assert list(model.peft_config) == ["a", "b"]
    x = torch.randint(0, 100, (1, 4))
    assert torch.isfinite(model(x).logits).all()
