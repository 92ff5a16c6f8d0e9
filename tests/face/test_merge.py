"""Merging is exact, and comes undone to the bit."""

import pytest
import torch

import inlay
from inlay.core.inlaid import places

from ..tiny import assert_same, bert_classifier, ids, llama, logits, mixtral, snapshot, stir


def test_a_thousand_cycles_in_bfloat16_change_no_bit():
    model = llama(layers=1).to(torch.bfloat16)
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules="all-linear"))
    stir(peft_model)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    for _ in range(1000):
        peft_model.merge_adapter()
        peft_model.unmerge_adapter()
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


def test_merging_rounds_once_in_half_precision():
    model = llama(layers=1).to(torch.bfloat16)
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(r=4, lora_alpha=3, target_modules=["q_proj"]))
    stir(peft_model, by=0.3)
    (place,) = places(model)
    p, w = place.adapters["default"], place.site.module.weight.detach()
    exact = w.double() + 3 / 4 * p.lora_B.detach().double() @ p.lora_A.detach().double()
    peft_model.merge_adapter()
    merged = place.site.module.weight
    # The nearest bfloat16 of the exact sum; float32 arithmetic in between may turn a tie.
    assert (merged == exact.to(torch.bfloat16)).float().mean() > 0.999
    assert (merged.double() - exact).abs().max() <= (exact.to(torch.bfloat16).double() - exact).abs().max() * 1.01


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["classifier"]}])
def test_merged_equals_adapted(options):
    model, x = bert_classifier(), ids()
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["query", "dense"], **options)).eval()
    stir(peft_model)
    y = logits(peft_model, x)
    merged = peft_model.merge_and_unload(safe_merge=True)
    assert type(merged).__name__ == "BertForSequenceClassification"
    assert not list(places(merged))
    torch.testing.assert_close(logits(merged, x), y, rtol=1e-5, atol=1e-5)


KINDS = {
    "module": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "tokens": {"target_modules": ["v_proj"], "trainable_token_indices": [3, 4]},
    "plain": {"target_modules": ["q_proj", "lm_head"]},
}


def of_all_kinds():
    model = None
    for i, (name, options) in enumerate(KINDS.items()):
        config = inlay.LoraConfig(r=2, **options)
        if model is None:
            model = inlay.get_peft_model(llama(layers=1), config, name)
        else:
            model.add_adapter(name, config)
        stir(model, name, by=0.3, seed=i)
    return model.eval()


@pytest.mark.parametrize("merged", KINDS)
def test_each_adapter_acts_as_ever_while_one_is_merged(merged):
    model, x = of_all_kinds(), ids()
    expected = {}
    for name in KINDS:
        with model.use_adapters(name):
            expected[name] = logits(model, x)
    with model.disable_adapter():
        expected["__base__"] = logits(model, x)
    assert (expected["module"] - expected["__base__"]).abs().max() > 0.1
    model.merge_adapter([merged])
    for name in KINDS:
        with model.use_adapters(name):
            torch.testing.assert_close(logits(model, x), expected[name], rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model, x), expected["__base__"], rtol=1e-4, atol=1e-5)
    rows = [*KINDS, "__base__", merged]
    mixed = logits(model, x[:1].expand(len(rows), -1), adapter_names=rows)
    for i, row in enumerate(rows):
        torch.testing.assert_close(mixed[i], expected[row][0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("merged", KINDS)
def test_a_file_does_not_tell_whether_the_adapter_was_merged(merged, tmp_path):
    model = of_all_kinds()
    model.save_pretrained(tmp_path / "before")
    model.merge_adapter([merged])
    model.save_pretrained(tmp_path / "merged")
    for name in KINDS:
        one, other = ((tmp_path / state / name / "adapter_model.safetensors").read_bytes() for state in ("before", "merged"))
        assert one == other


def test_expert_stacks_merge():
    model, x = mixtral(), ids()
    config = inlay.LoraConfig(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    peft_model = inlay.get_peft_model(model, config).eval()
    peft_model.add_adapter("down", inlay.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.1))
    stir(peft_model)
    stir(peft_model, "down", seed=5)
    base = {n: t.clone() for n, t in model.state_dict().items()}
    for names in (["default"], ["down"], ["default", "down"]):
        peft_model.set_adapter(names)
        y = logits(peft_model, x)
        peft_model.merge_adapter(names)
        torch.testing.assert_close(logits(peft_model, x), y, rtol=1e-5, atol=1e-5)
        peft_model.unmerge_adapter()
        assert all(torch.equal(t, base[n]) for n, t in model.state_dict().items())


def test_a_merge_that_is_not_finite_changes_nothing():
    model, x = llama(), ids()
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj", "v_proj"]))
    stir(peft_model)
    y = logits(peft_model, x)
    last = list(places(model))[-1].adapters["default"]
    last.lora_B.data[0, 0] = float("nan")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"v_proj.*not finite"):
        peft_model.merge_adapter(safe_merge=True)
    last_values = {k: v for k, v in snapshot(model)["tensors"].items() if "adapters" not in k}
    assert all(torch.equal(v, before["tensors"][k]) for k, v in last_values.items())
    last.lora_B.data[0, 0] = 0
    assert not torch.equal(logits(peft_model, x), y * 2)


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_are_merged_once_and_stay_tied(tie):
    model, x = llama(tie_word_embeddings=True), ids()
    before = snapshot(model)
    config = inlay.LoraConfig(target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=tie)
    peft_model = inlay.get_peft_model(model, config)
    stir(peft_model)
    y = logits(peft_model, x)
    peft_model.merge_adapter()
    torch.testing.assert_close(logits(peft_model, x), y, rtol=1e-5, atol=1e-5)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie
    peft_model.unmerge_adapter()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(logits(merged, x), y, rtol=1e-5, atol=1e-5)
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tie
    # A file of weights that have come apart must hold both.
    assert merged.config.tie_word_embeddings == tie
    assert before["classes"] == snapshot(merged)["classes"]


def test_merged_models_save_and_load(tmp_path):
    from transformers import AutoModelForCausalLM

    model, x = llama(tie_word_embeddings=True), ids()
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    stir(peft_model)
    y = logits(peft_model, x)
    peft_model.merge_and_unload().save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path), x), y, rtol=1e-5, atol=1e-5)


def test_unload_restores_after_merge():
    model = llama()
    before = snapshot(model)
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]))
    stir(peft_model)
    peft_model.merge_adapter()
    peft_model.unload()
    assert_same(before, snapshot(model))


def test_dropout_on_expert_stacks_leaves_out_input_features_and_keeps_the_mean():
    model = mixtral()
    config = inlay.LoraConfig(target_modules=[], target_parameters=["experts.down_proj"], lora_dropout=0.25)
    peft_model = inlay.get_peft_model(model, config)
    stir(peft_model)
    experts = model.model.layers[0].mlp.experts
    own = experts._parameters["down_proj"]
    peft_model.eval()
    delta = experts.down_proj - own
    peft_model.train()
    torch.manual_seed(0)
    drawn = torch.stack([(experts.down_proj - own).detach() for _ in range(400)])
    share = drawn / delta.detach()
    values = share[..., delta.detach().abs().amin(dim=(0, 1)) > 1e-5]
    assert ((values.abs() < 1e-2) | ((values - 4 / 3).abs() < 1e-2)).all()
    assert values.mean().item() == pytest.approx(1.0, abs=0.03)
    # A feature is left out of all experts and outputs at once.
    assert ((values > 0.5).float().std(dim=(1, 2)) == 0).all()
    peft_model.merge_adapter()
    torch.testing.assert_close(experts._parameters["down_proj"] - own, delta.detach(), rtol=1e-4, atol=1e-6)
