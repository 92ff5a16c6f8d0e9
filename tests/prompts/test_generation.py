"""Generation where HF peft has nothing to compare with, or is wrong: against generations without padding, without a cache, alone."""

from __future__ import annotations

import peft
import pytest
import torch
from transformers import DynamicCache, GenerationConfig

import inlay

# A text never ends early, so that rows can be compared whole.
GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def prompted(base, task, *names, **options):
    """A model with a random prompt for each name."""
    model = None
    for seed, name in enumerate(names or ("default",)):
        config = inlay.PromptTuningConfig(task_type=task, num_virtual_tokens=4, seed=seed, **options)
        if model is None:
            model = inlay.get_peft_model(base, config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


@pytest.fixture(params=["llama", "gpt2", "t5"])
def model(request, bases):
    task, base = bases[request.param]
    return prompted(base(), task, "a", "b")


@pytest.fixture
def decoder(bases):
    return prompted(bases["llama"][1](), "CAUSAL_LM", "a", "b")


@pytest.mark.parametrize("beams", [1, 3])
def test_static_caches_generate_what_dynamic_ones_do(model, ids, beams):
    mask = torch.ones_like(ids)
    options = GREEDY | {"num_beams": beams}
    expected = model.generate(input_ids=ids, attention_mask=mask, **options)
    assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, cache_implementation="static", **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}])
def test_a_left_padded_row_generates_what_it_generates_alone(bases, ids, name, options):
    model = prompted(bases[name][1](), "CAUSAL_LM")
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 4 + [1] * 3])
    batch = model.generate(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, **GREEDY, **options)
    unmasked = model.generate(input_ids=ids.masked_fill(mask == 0, 0), **GREEDY, **options)
    assert torch.equal(batch, unmasked), "padding is seen from its tokens"
    for row, start in enumerate((0, 2, 4)):
        alone = model.generate(input_ids=ids[row : row + 1, start:], **GREEDY, **options)
        assert torch.equal(alone[0, 7 - start :], batch[row, 7:]), row


def test_positions_can_be_given(bases, ids, tmp_path):
    """HF peft counts padding: with its positions its tokens come out."""
    theirs = peft.get_peft_model(bases["gpt2"][1](), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)).eval()
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(bases["gpt2"][1](), tmp_path).eval()
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 4 + [1] * 3])
    expected = theirs.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    found = ours.generate(input_ids=ids, attention_mask=mask, position_ids=torch.arange(7).expand(3, 7), **GREEDY)
    assert torch.equal(found, expected)
    assert not torch.equal(ours.generate(input_ids=ids, attention_mask=mask, **GREEDY), expected)


def test_every_token_is_the_best_after_a_whole_forward_pass(decoder, ids):
    found = decoder.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    for length in range(7, 15):
        scores = decoder(input_ids=found[:, :length]).logits[:, -1]
        scores[:, 2] = -torch.inf
        best = scores.argmax(-1)
        assert torch.equal(best, found[:, length])


def test_a_cache_can_be_gone_on_with(decoder, ids):
    mask = torch.ones_like(ids)
    first = decoder(input_ids=ids, attention_mask=mask, past_key_values=DynamicCache(), use_cache=True)
    new = ids[:, :1]
    longer = torch.cat((ids, new), 1)
    on = decoder(input_ids=new, attention_mask=torch.ones_like(longer), past_key_values=first.past_key_values)
    assert on.logits.shape == (3, 1, 64)
    assert (on.logits[:, -1] - decoder(input_ids=longer).logits[:, -1]).abs().max() < 1e-5

    result = decoder.generate(input_ids=ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY)
    turn = torch.cat((result.sequences, ids[:, :3]), 1)
    seen = torch.ones_like(turn)
    expected = decoder.generate(input_ids=turn, attention_mask=seen, **GREEDY)
    found = decoder.generate(input_ids=turn, attention_mask=seen, past_key_values=result.past_key_values, **GREEDY)
    assert torch.equal(found, expected)


def test_switching_adapters(model, ids):
    mask = torch.ones_like(ids)

    def generated():
        return model.generate(input_ids=ids, attention_mask=mask, **GREEDY).tolist()

    a = generated()
    model.set_adapter("b")
    b = generated()
    with model.use_adapters("a"):
        assert generated() == a
        with model.disable_adapter():
            plain = generated()
            assert plain == model.get_base_model().generate(input_ids=ids, attention_mask=mask, **GREEDY).tolist()
        assert generated() == a
    assert generated() == b
    assert a != b
    assert plain not in (a, b)


def test_rows_with_adapters_of_their_own(model, ids):
    mask = torch.ones_like(ids)
    mixed = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["b", "a", "b"], **GREEDY)
    for row, name in enumerate("bab"):
        with model.use_adapters(name):
            alone = model.generate(input_ids=ids, attention_mask=mask, **GREEDY)
        assert torch.equal(mixed[row], alone[row])
    assert len({tuple(r) for r in mixed.tolist()}) > 1


def test_inputs_by_every_name(decoder, ids):
    mask = torch.ones_like(ids)
    expected = decoder.generate(input_ids=ids, attention_mask=mask, **GREEDY)
    assert torch.equal(decoder.generate(ids, attention_mask=mask, **GREEDY), expected)
    assert torch.equal(decoder.generate(inputs=ids, attention_mask=mask, **GREEDY), expected)
    embeds = decoder.get_input_embeddings()(ids)
    assert torch.equal(decoder.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY), expected[:, 7:])
    assert torch.equal(decoder.generate(inputs_embeds=embeds, **GREEDY), expected[:, 7:])
    begun = decoder.generate(**GREEDY)
    assert torch.equal(begun, decoder.generate(input_ids=torch.tensor([[1]]), **GREEDY))


def test_lengths_count_the_callers_tokens(decoder, ids):
    mask = torch.ones_like(ids)
    free = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    assert decoder.generate(input_ids=ids, attention_mask=mask, max_length=10, **free).shape == (3, 10)
    assert decoder.generate(input_ids=ids, attention_mask=mask, generation_config=GenerationConfig(max_length=12, **free)).shape == (3, 12)
    assert decoder.generate(input_ids=ids, attention_mask=mask, **free).shape == (3, 27)
    config = GenerationConfig(max_length=12, pad_token_id=0)
    decoder.generate(input_ids=ids, attention_mask=mask, generation_config=config)
    assert config.max_length == 12, "the caller's settings stay"
    first = decoder.generate(input_ids=ids[:1], max_length=8, **free)[0, 7].item()
    ending = {"input_ids": ids[:1], "max_length": 20, "do_sample": False, "eos_token_id": first}
    assert decoder.generate(**ending).shape == (1, 8)
    assert decoder.generate(**ending, min_length=12).shape[1] >= 12


@pytest.mark.parametrize("option", [{"prompt_lookup_num_tokens": 2}, {"prefill_chunk_size": 4}])
def test_what_reads_the_prompt_as_tokens_is_refused(decoder, ids, option):
    with pytest.raises(ValueError, match=f"`{next(iter(option))}` reads the prompt as tokens"):
        decoder.generate(input_ids=ids, **GREEDY, **option)


def test_errors_of_inputs(decoder, ids):
    with pytest.raises(ValueError, match="no `input_ids`"):
        decoder(labels=ids)
    with pytest.raises(ValueError, match="attention_mask has 3 axes"):
        decoder.generate(input_ids=ids, attention_mask=torch.ones(3, 7, 7), **GREEDY)
    decoder.get_base_model().generation_config.bos_token_id = None
    with pytest.raises(ValueError, match="no token that begins a text"):
        decoder.generate(**GREEDY)
