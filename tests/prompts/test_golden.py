"""Files, logits, losses, generations and training steps against HF peft, both ways."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import inlay

from .support import assert_same, outputs, settings

NAMES = ["llama", "gpt2", "t5", "bart", "bert-sequence", "bert-token", "bert-question", "bert-feature", "llama-sequence"]
GENERATIONS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "several": {"do_sample": False, "num_beams": 4, "num_return_sequences": 2},
    "sample": {"do_sample": True, "temperature": 0.8, "num_return_sequences": 2},
    "no cache": {"do_sample": False, "use_cache": False},
    "penalty": {"do_sample": False, "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    "whole length": {"do_sample": False, "max_length": 15, "max_new_tokens": None, "min_length": 12, "eos_token_id": 33},
}


def wrapped(library, base, task, **options):
    return library.get_peft_model(base, library.PromptTuningConfig(task_type=task, num_virtual_tokens=4, **options)).eval()


def randomised(model):
    """Values that no start gives, in the prompt and in the retrained head."""
    generator = torch.Generator().manual_seed(3)
    for q in model.parameters():
        if q.requires_grad:
            q.data.normal_(generator=generator)
    return model


def batch(task, ids, mask):
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids[:, :4]
    if task in ("SEQ_CLS", "TOKEN_CLS"):
        inputs["token_type_ids"] = (ids % 2).long()
    return inputs


@pytest.fixture(params=NAMES)
def case(request, bases, tmp_path):
    """HF's model with a random adapter, the folder it wrote, and ours loaded from that."""
    task, base = bases[request.param]
    theirs = randomised(wrapped(peft, base(), task))
    theirs.save_pretrained(tmp_path)
    return task, base, theirs, inlay.PeftModel.from_pretrained(base(), tmp_path).eval(), tmp_path


def test_their_file_here(case, ids, right_padded):
    task, _, theirs, ours, _ = case
    inputs = batch(task, ids, right_padded)
    if "llama" in str(type(theirs.get_base_model())).lower():
        inputs.pop("token_type_ids", None)
    assert type(ours).__name__ == type(theirs).__name__
    found = outputs(ours, inputs)
    assert_same(found, outputs(theirs, inputs))
    for mask in (torch.ones_like(ids), right_padded.flip(1)):
        assert_same(outputs(ours, inputs | {"attention_mask": mask}), outputs(theirs, inputs | {"attention_mask": mask}))
    # The prompt matters: a comparison of two bases would pass as well.
    with ours.disable_adapter():
        plain = outputs(ours, inputs)
    assert any(plain[k].shape != found[k].shape or (plain[k] - found[k]).abs().max() > 1e-2 for k in found)


def test_our_file_there(case, ids, right_padded, tmp_path):
    task, base, theirs, ours, folder = case
    inputs = {"input_ids": ids, "attention_mask": right_padded} | ({"decoder_input_ids": ids} if task == "SEQ_2_SEQ_LM" else {})
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_same(outputs(again, inputs), outputs(theirs, inputs), 1e-6)
    mine, other = load_file(tmp_path / "ours/adapter_model.safetensors"), load_file(folder / "adapter_model.safetensors")
    assert sorted(mine) == sorted(other)
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert settings(tmp_path / "ours") == settings(folder)


def test_a_fresh_configuration_is_the_one_that_hf_writes(bases, tmp_path):
    for name, (task, base) in bases.items():
        found = []
        for library in (inlay, peft):
            wrapped(library, base(), task).save_pretrained(tmp_path / name / library.__name__)
            found.append(settings(tmp_path / name / library.__name__))
        assert found[0] == found[1], name


@pytest.mark.parametrize("submodules", [1, 2])
def test_encoder_decoder_with_one_or_two_submodules(bases, ids, right_padded, tmp_path, submodules):
    task, base = bases["t5"]
    theirs = randomised(wrapped(peft, base(), task, num_transformer_submodules=submodules))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path).eval()
    assert inlay.get_peft_model_state_dict(ours)["prompt_embeddings"].shape == (4 * submodules, 32)
    inputs = {"input_ids": ids, "attention_mask": right_padded, "labels": ids[:, :5].contiguous()}
    assert_same(outputs(ours, inputs), outputs(theirs, inputs))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-sequence", "bert-question"])
def test_losses(bases, ids, right_padded, tmp_path, name):
    task, base = bases[name]
    theirs = randomised(wrapped(peft, base(), task))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path).eval()
    given = {
        "CAUSAL_LM": {"labels": ids.masked_fill(right_padded == 0, -100)},
        "SEQ_CLS": {"labels": torch.tensor([0, 2, 1])},
        "QUESTION_ANS": {"start_positions": torch.tensor([0, 1, 2]), "end_positions": torch.tensor([3, 4, 2])},
    }[task]
    inputs = {"input_ids": ids, "attention_mask": right_padded, **given}
    found = outputs(ours, inputs)
    assert "loss" in found
    assert_same(found, outputs(theirs, inputs))


def test_labels_of_tokens_keep_to_their_tokens(bases, ids):
    """HF peft stops here, for it has logits of the virtual tokens and no labels for them."""
    task, base = bases["bert-token"]
    ours = wrapped(inlay, base(), task)
    labels = ids % 3
    found = ours(input_ids=ids, labels=labels)
    assert found.logits.shape == (3, 11, 3)
    expected = torch.nn.functional.cross_entropy(found.logits[:, 4:].reshape(-1, 3), labels.reshape(-1))
    assert abs((found.loss - expected).item()) < 1e-6


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_embeddings_in_place_of_tokens_and_positions_left_out(bases, ids, tmp_path, name):
    task, base = bases[name]
    theirs = randomised(wrapped(peft, base(), task))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path).eval()
    inputs = {"inputs_embeds": ours.get_input_embeddings()(ids), "attention_mask": torch.ones_like(ids)}
    if task == "SEQ_2_SEQ_LM":
        inputs["decoder_input_ids"] = ids
    else:
        inputs["position_ids"] = torch.arange(5, 12).expand(3, 7)
        with pytest.warns(UserWarning, match="`position_ids` cannot be combined"):
            ours(**inputs)
    assert_same(outputs(ours, inputs), outputs(theirs, inputs))
    if task == "CAUSAL_LM":
        by_position = outputs(ours, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})["logits"]
        assert torch.equal(ours(ids, attention_mask=torch.ones_like(ids)).logits, by_position)


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generations(bases, ids, right_padded, tmp_path, name, how):
    task, base = bases[name]
    theirs = randomised(wrapped(peft, base(), task))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path).eval()
    mask = right_padded if task == "SEQ_2_SEQ_LM" else torch.ones_like(ids)
    found = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        found.append(model.generate(input_ids=ids, attention_mask=mask, **({"max_new_tokens": 8} | GENERATIONS[how])).tolist())
    assert found[0] == found[1]
    torch.manual_seed(0)
    with ours.disable_adapter():
        plain = ours.generate(input_ids=ids, attention_mask=mask, **({"max_new_tokens": 8} | GENERATIONS[how])).tolist()
    assert plain != found[0]


@pytest.mark.parametrize("name", ["llama", "t5", "bert-sequence"])
def test_five_steps_of_training_stay_together(bases, ids, right_padded, tmp_path, name):
    task, base = bases[name]
    randomised(wrapped(peft, base(), task)).save_pretrained(tmp_path)
    labels = torch.tensor([0, 2, 1]) if task == "SEQ_CLS" else ids
    ends = []
    for library in (inlay, peft):
        if library is inlay:
            model = inlay.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True).eval()
        else:
            # HF loads no prompt for training; this is the way around.
            model = wrapped(peft, base(), task)
            peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(tmp_path), device="cpu"))
        trained = [q for q in model.parameters() if q.requires_grad]
        assert sum(q.numel() for q in trained) == {"llama": 128, "t5": 256, "bert-sequence": 128 + 99}[name]
        optimiser = torch.optim.AdamW(trained, lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(input_ids=ids, attention_mask=right_padded, labels=labels).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        ends.append((losses, {k: v.clone() for k, v in library.get_peft_model_state_dict(model).items()}))
    (ours, mine), (theirs, other) = ends
    assert ours == pytest.approx(theirs, abs=1e-5)
    assert ours[-1] < ours[0] - 1e-2
    assert sorted(mine) == sorted(other)
    assert all((mine[k].cpu() - other[k].cpu()).abs().max() < 1e-5 for k in mine)


def test_numbers_of_parameters(bases):
    for name, (task, base) in bases.items():
        ours, theirs = wrapped(inlay, base(), task), wrapped(peft, base(), task)
        assert ours.get_nb_trainable_parameters()[0] == theirs.get_nb_trainable_parameters()[0], name
        assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters(), name
