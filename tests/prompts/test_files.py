"""Files of prompts: checked before anything is allocated, and errors that name the keys."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay


def config(task="SEQ_CLS", **options):
    return inlay.PromptTuningConfig(task_type=task, **({"num_virtual_tokens": 4} | options))


@pytest.fixture
def base(bases):
    return bases["bert-sequence"][1]


@pytest.fixture
def folder(base, tmp_path):
    """An adapter with a prompt and a head, both unlike what they start from."""
    model = inlay.get_peft_model(base(), config())
    for q in model.parameters():
        if q.requires_grad:
            q.data.normal_()
    model.save_pretrained(tmp_path)
    return tmp_path


def rewrite(folder, change):
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def test_the_file(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    assert {k: tuple(t.shape) for k, t in tensors.items()} == {
        "prompt_embeddings": (4, 32),
        "base_model.classifier.weight": (3, 32),
        "base_model.classifier.bias": (3,),
    }


FAULTS = {
    "missing prompt": (lambda t: t.pop("prompt_embeddings"), "1 tensors are missing: prompt_embeddings"),
    "missing head": (lambda t: t.pop("base_model.classifier.bias"), "1 tensors are missing: base_model.classifier.bias"),
    "unexpected": (lambda t: t.update({"base_model.x.weight": torch.ones(1)}), "no place in the model: base_model.x.weight"),
    "shape": (
        lambda t: t.update(prompt_embeddings=torch.ones(5, 32)),
        r"prompt_embeddings is \(5, 32\) in the file and \(4, 32\) in the model",
    ),
    "shape of head": (
        lambda t: t.update({"base_model.classifier.weight": torch.ones(2, 32)}),
        r"base_model.classifier.weight is \(2, 32\) in the file and \(3, 32\) in the model",
    ),
    "not finite": (lambda t: t["prompt_embeddings"].fill_(torch.nan), "not finite: prompt_embeddings"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(base, folder, fault):
    change, message = FAULTS[fault]
    rewrite(folder, change)
    model = base()
    before = {n: (q.requires_grad, id(q)) for n, q in model.named_parameters()}
    with pytest.raises(inlay.AdapterMismatch, match=message):
        inlay.PeftModel.from_pretrained(model, folder)
    assert {n: (q.requires_grad, id(q)) for n, q in model.named_parameters()} == before
    assert "_inlay_session" not in vars(model)

    peft_model = inlay.get_peft_model(model, config())
    state = {k: t.clone() for k, t in peft_model.state_dict().items()}
    for name in ("other", "default"):
        with pytest.raises(inlay.AdapterMismatch, match=message) as raised:
            peft_model.load_adapter(folder, name)
    assert list(peft_model.peft_config) == ["default"]
    assert all(torch.equal(t, state[k]) for k, t in peft_model.state_dict().items())
    assert raised.value.report


def test_what_fits_can_be_loaded(base, folder):
    whole = load_file(folder / "adapter_model.safetensors")
    rewrite(folder, lambda t: (t.pop("prompt_embeddings"), t.update({"base_model.x.weight": torch.ones(1)})))
    with pytest.warns(UserWarning, match=r"prompt_embeddings.*base_model\.x\.weight"):
        model = inlay.PeftModel.from_pretrained(base(), folder, strict=False)
    found = inlay.get_peft_model_state_dict(model)
    assert torch.equal(found["base_model.classifier.weight"], whole["base_model.classifier.weight"])
    assert found["prompt_embeddings"].isfinite().all()
    report = model.load_adapter(folder, "default", strict=False)
    assert report.missing_keys == ["prompt_embeddings"]
    assert report.unexpected_keys == ["base_model.x.weight"]


def test_a_claim_of_gigabytes_is_an_error_and_not_an_allocation(base, folder):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_virtual_tokens": 10**11}))
    with pytest.raises(inlay.AdapterMismatch, match=r"prompt_embeddings is \(4, 32\) in the file and \(100000000000, 32\)"):
        inlay.PeftModel.from_pretrained(base(), folder)


def test_several_adapters_in_folders_of_their_names(base, folder, ids, tmp_path):
    model = inlay.PeftModel.from_pretrained(base(), folder).eval()
    model.add_adapter("other", config(num_virtual_tokens=6, seed=5))
    model.save_pretrained(tmp_path / "all")
    again = inlay.PeftModel.from_pretrained(base(), tmp_path / "all").eval()
    report = again.load_adapter(tmp_path / "all/other", "other")
    assert not report
    assert again.active_adapters == ["default"]
    for name in ("default", "other"):
        with model.use_adapters(name), again.use_adapters(name):
            assert torch.equal(model(ids).logits, again(ids).logits)
    assert not any(q.requires_grad for q in again.parameters())
    trained = inlay.PeftModel.from_pretrained(base(), tmp_path / "all", is_trainable=True)
    assert trained.get_nb_trainable_parameters()[0] == 4 * 32 + 99


def test_new_values_for_a_loaded_adapter(base, folder):
    model = inlay.get_peft_model(base(), config())
    whole = load_file(folder / "adapter_model.safetensors")
    assert not model.load_adapter(folder, "default")
    assert all(torch.equal(t, whole[k]) for k, t in inlay.get_peft_model_state_dict(model).items())
    assert trainable_names(model), "loading new values does not freeze"


def trainable_names(model):
    return [n for n, q in model.named_parameters() if q.requires_grad]


def test_state_dicts(base, folder):
    model = inlay.get_peft_model(base(), config())
    whole = load_file(folder / "adapter_model.safetensors")
    report = inlay.set_peft_model_state_dict(model, {"prompt_embeddings": whole["prompt_embeddings"], "surplus": torch.ones(1)})
    assert sorted(report.missing_keys) == ["base_model.classifier.bias", "base_model.classifier.weight"]
    assert report.unexpected_keys == ["surplus"]
    assert torch.equal(inlay.get_peft_model_state_dict(model)["prompt_embeddings"], whole["prompt_embeddings"])
    with pytest.raises(inlay.AdapterMismatch, match="another shape"):
        inlay.set_peft_model_state_dict(model, {"prompt_embeddings": torch.ones(2, 32)})
    report = inlay.set_peft_model_state_dict(model, {"prompt_embeddings": torch.ones(2, 32)}, ignore_mismatched_sizes=True)
    assert report.mismatched_keys == [("prompt_embeddings", (2, 32), (4, 32))]

    doubled = {k: 2 * t for k, t in model.state_dict().items()}
    for prefix in ("", "module."):
        found = inlay.get_peft_model_state_dict(model, {prefix + k: t for k, t in doubled.items()})
        own = inlay.get_peft_model_state_dict(model)
        assert sorted(found) == sorted(own)
        assert all(torch.equal(found[k], 2 * t) for k, t in own.items())
    with pytest.raises(ValueError, match="does not hold the prompt 'default'"):
        inlay.get_peft_model_state_dict(model, {k: t for k, t in doubled.items() if "prompt" not in k})


def test_embeddings_can_be_saved_along(bases, ids, tmp_path):
    base = bases["llama"][1]()
    model = inlay.get_peft_model(base, config("CAUSAL_LM")).eval()
    base.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.embed_tokens.weight" in load_file(tmp_path / "adapter_model.safetensors")
    again = inlay.PeftModel.from_pretrained(bases["llama"][1](), tmp_path).eval()
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_base_and_prompt_in_one_call(bases, ids, tmp_path):
    bases["llama"][1]().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = inlay.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), config("CAUSAL_LM")).eval()
    model.save_pretrained(tmp_path / "adapter")
    again = inlay.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    assert torch.equal(again(ids).logits, model(ids).logits)
