"""P-tuning, prefix tuning, cartridges, multitask and context-aware prompts against HF peft: files both ways, logits, losses,
generations and training steps."""

from __future__ import annotations

import peft
import pytest
import torch
from safetensors.torch import load_file

import inlay

from .support import assert_same, outputs, settings

CAUSAL = ["llama", "gpt2"]
ALL = [*CAUSAL, "t5", "bart", "bert-sequence", "bert-token", "bert-question", "bert-feature", "llama-sequence"]
TASKED = [*CAUSAL, "t5", "bert-sequence", "bert-token", "llama-sequence"]
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_hidden_size": 12}
CASES = {
    "mlp": ("PromptEncoderConfig", {}, ALL),
    "lstm": ("PromptEncoderConfig", LSTM, [*CAUSAL, "bert-sequence"]),
    "prefix": ("PrefixTuningConfig", {}, ALL),
    "projected": ("PrefixTuningConfig", {"prefix_projection": True, "encoder_hidden_size": 12}, ALL),
    "zero": ("PrefixTuningConfig", {"init_weights": "zero"}, ["llama"]),
    "cartridge": ("CartridgeConfig", {}, ALL),
    "unfrozen": ("CartridgeConfig", {"num_frozen_tokens": 0}, ["llama"]),
    "tasks": ("MultitaskPromptTuningConfig", {"num_tasks": 3, "num_ranks": 2}, TASKED),
    "context": ("CPTConfig", {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [1, 2, 3, 4]}, CAUSAL),
    "decay": (
        "CPTConfig",
        {"cpt_token_ids": [5, 6, 7, 8], "cpt_tokens_type_mask": [2, 4, 6, 8]}
        | {"opt_weighted_loss_type": "decay", "opt_loss_decay_factor": 0.5},
        CAUSAL,
    ),
}
PAIRS = [(case, base) for case, (_, _, bases) in CASES.items() for base in bases]
GREEDY = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}


def wrapped(library, base, task, case):
    cls, options, _ = CASES[case]
    options = options if cls == "CPTConfig" else {"num_virtual_tokens": 4, **options}
    return library.get_peft_model(base, getattr(library, cls)(task_type=task, **options)).eval()


def randomised(model):
    generator = torch.Generator().manual_seed(3)
    for q in model.parameters():
        if q.requires_grad:
            q.data.normal_(0, 0.5, generator=generator)
    return model


def batch(case, task, ids, mask):
    inputs = {"input_ids": ids, "attention_mask": mask}
    if task == "SEQ_2_SEQ_LM":
        inputs["labels"] = ids[:, :4].contiguous()
    if task == "CAUSAL_LM":
        inputs["labels"] = ids
    if task == "SEQ_CLS":
        inputs["labels"] = torch.tensor([0, 2, 1])
    if case == "tasks":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
    if case == "decay":
        # HF writes into this one.
        inputs["input_type_mask"] = torch.tensor([[1, 2, 3, 4, 5, 8, 8]]).repeat(3, 1)
    return inputs


@pytest.mark.parametrize(("case", "name"), PAIRS)
def test_files_both_ways(bases, ids, right_padded, tmp_path, case, name):
    task, base = bases[name]
    theirs = randomised(wrapped(peft, base(), task, case))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path / "theirs").eval()
    inputs = batch(case, task, ids, right_padded)
    expected = outputs(theirs, inputs)
    assert_same(outputs(ours, inputs), expected, 1e-4 if case == "lstm" else 1e-5)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(base(), tmp_path / "ours").eval()
    assert_same(outputs(again, inputs), expected, 1e-4 if case == "lstm" else 1e-5)
    mine, other = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {k: t.shape for k, t in mine.items()} == {k: t.shape for k, t in other.items()}
    assert all(torch.equal(mine[k], other[k]) for k in mine)
    assert settings(tmp_path / "ours") == settings(tmp_path / "theirs")


@pytest.mark.parametrize("case", CASES)
def test_a_fresh_adapter_is_configured_and_sized_as_theirs(bases, tmp_path, case):
    for name in CASES[case][2]:
        task, base = bases[name]
        models = [wrapped(library, base(), task, case) for library in (inlay, peft)]
        for model, who in zip(models, ("ours", "theirs"), strict=True):
            model.save_pretrained(tmp_path / name / who)
        assert settings(tmp_path / name / "ours") == settings(tmp_path / name / "theirs"), name
        assert models[0].get_nb_trainable_parameters()[0] == models[1].get_nb_trainable_parameters()[0], name


@pytest.mark.parametrize(("case", "name"), [p for p in PAIRS if p[1] in ("llama", "t5", "bert-sequence")])
def test_five_steps_of_training_stay_together(bases, ids, right_padded, case, name):
    task, base = bases[name]
    ends, start = [], None
    for library in (peft, inlay):
        model = wrapped(library, base(), task, case)
        trained = {n.replace("base_model.classifier.adapters.default", "head"): q for n, q in model.named_parameters() if q.requires_grad}
        trained = {n.replace("base_model.classifier.modules_to_save.default", "head"): q for n, q in trained.items()}
        if start is None:
            randomised(model)
            frozen = dict(model.prompt_encoder["default"].named_parameters())
            start = {n: q.detach().clone() for n, q in (trained | {f"prompt_encoder.default.{n}": q for n, q in frozen.items()}).items()}
        else:
            live = trained | {f"prompt_encoder.default.{n}": b for n, b in model.prompt_encoder["default"].named_buffers()}
            assert set(live) == set(start)
            for n, q in live.items():
                q.data.copy_(start[n])
        optimiser = torch.optim.AdamW(trained.values(), lr=1e-2)
        losses = []
        for _ in range(5):
            loss = model(**batch(case, task, ids, right_padded)).loss
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            losses.append(loss.item())
        ends.append((losses, {n: q.detach().clone() for n, q in trained.items()}))
    (theirs, other), (ours, mine) = ends
    assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-4)
    assert mine.keys() == other.keys()
    assert all((mine[n] - other[n]).abs().max() < 1e-4 for n in mine)
    assert ours[-1] != ours[0]


GENERATIONS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "samples": {"do_sample": True, "num_return_sequences": 2},
    "no cache": {"use_cache": False},
}


@pytest.mark.parametrize("how", GENERATIONS)
@pytest.mark.parametrize(("case", "name"), [p for p in PAIRS if p[1] in (*CAUSAL, "t5")])
def test_generations(bases, ids, right_padded, tmp_path, case, name, how):
    """Where HF stops or goes wrong (a prefix without a cache; a decoder's prompts), the mathematics are tested below."""
    task, base = bases[name]
    wrong = (how == "no cache" and CASES[case][0] in ("PrefixTuningConfig", "CartridgeConfig")) or (case, name) == ("tasks", "t5")
    theirs = randomised(wrapped(peft, base(), task, case))
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(base(), tmp_path).eval()
    mask = right_padded if task == "SEQ_2_SEQ_LM" else torch.ones_like(ids)
    inputs = {"input_ids": ids, "attention_mask": mask, **GREEDY, **GENERATIONS[how]}
    if case == "tasks":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
    found = []
    for model in (ours,) if wrong else (ours, theirs):
        torch.manual_seed(0)
        found.append(model.generate(**inputs).tolist())
    if wrong and how == "no cache":
        found.append(ours.generate(**inputs | {"use_cache": True}).tolist())
    assert all(f == found[0] for f in found)


@pytest.mark.parametrize(("case", "name"), [("prefix", "llama"), ("prefix", "gpt2"), ("prefix", "t5"), ("tasks", "t5")])
@pytest.mark.parametrize("beams", [1, 3])
def test_static_caches_generate_what_dynamic_ones_do(bases, ids, case, name, beams):
    task, base = bases[name]
    model = randomised(wrapped(inlay, base(), task, case))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "num_beams": beams, **GREEDY}
    if case == "tasks":
        inputs["task_ids"] = torch.tensor([2, 0, 1])
    assert torch.equal(model.generate(**inputs, cache_implementation="static"), model.generate(**inputs))


@pytest.mark.parametrize("case", ["prefix", "tasks"])
def test_every_token_of_a_decoder_is_the_best_after_a_whole_forward_pass(bases, ids, case):
    """The decoder's prompts are there in a generation as they are in training; HF peft leaves multitask prompts out."""
    task, base = bases["t5"]
    model = randomised(wrapped(inlay, base(), task, case))
    options = {"task_ids": torch.tensor([2, 0, 1])} if case == "tasks" else {}
    found = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options, **GREEDY)
    for length in range(1, 7):
        scores = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=found[:, :length], **options).logits[:, -1]
        scores[:, 1] = -torch.inf
        assert torch.equal(scores.argmax(-1), found[:, length])


@pytest.mark.parametrize("name", CAUSAL)
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_a_left_padded_row_generates_what_it_generates_alone(bases, ids, name, options):
    task, base = bases[name]
    model = randomised(wrapped(inlay, base(), task, "prefix"))
    mask = torch.tensor([[1] * 7, [0] * 2 + [1] * 5, [0] * 4 + [1] * 3])
    together = model.generate(input_ids=ids.masked_fill(mask == 0, 0), attention_mask=mask, **GREEDY, **options)
    for row, start in enumerate((0, 2, 4)):
        alone = model.generate(input_ids=ids[row : row + 1, start:], **GREEDY, **options)
        assert torch.equal(alone[0, 7 - start :], together[row, 7:]), row


@pytest.mark.parametrize("name", CAUSAL)
def test_assisted_generations_embeddings_and_caches_that_go_on(bases, ids, name):
    task, base = bases[name]
    model = randomised(wrapped(inlay, base(), task, "prefix"))
    inputs = {"input_ids": ids[:1], "attention_mask": torch.ones_like(ids[:1]), **GREEDY}
    expected = model.generate(**inputs)
    assert torch.equal(model.generate(**inputs, prompt_lookup_num_tokens=2), expected)
    assert torch.equal(model.generate(**inputs, assistant_model=base()), expected)
    embeds = model.get_input_embeddings()(ids[:1])
    assert torch.equal(model.generate(inputs_embeds=embeds, attention_mask=torch.ones_like(ids[:1]), **GREEDY), expected[:, 7:])
    cache = model(input_ids=ids[:1, :5], use_cache=True).past_key_values
    assert cache.get_seq_length() == 9
    assert torch.equal(model.generate(**inputs, past_key_values=cache), expected)
    with pytest.raises(ValueError, match="`prefill_chunk_size` is not possible"):
        model.generate(**inputs, prefill_chunk_size=3)


@pytest.mark.parametrize("name", ["llama", "bert-sequence"])
def test_several_prefixes_rows_and_none(bases, ids, name):
    task, base = bases[name]
    model = wrapped(inlay, base(), task, "prefix")
    model.add_adapter("b", inlay.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, seed=5))
    one = model(input_ids=ids).logits
    with model.use_adapters("b"):
        other = model(input_ids=ids).logits
    mixed = model(input_ids=ids, adapter_names=["b", "default", "b"]).logits
    assert (mixed[0] - other[0]).abs().max() < 1e-5
    assert (mixed[1] - one[1]).abs().max() < 1e-5
    assert (one - other).abs().max() > 1e-2
    with model.disable_adapter():
        assert torch.equal(model(input_ids=ids).logits, base()(input_ids=ids).logits)
    with model.use_adapters("default", "b"):
        both = model(input_ids=ids).logits
    assert both.shape == one.shape
    assert (both - one).abs().max() > 1e-3


def test_rows_of_several_prefixes(bases, ids):
    task, base = bases["llama"]
    model = wrapped(inlay, base(), task, "prefix")
    for seed, name in enumerate("bc", 5):
        model.add_adapter(name, inlay.PrefixTuningConfig(task_type=task, num_virtual_tokens=4, seed=seed))
    rows = [("default", "b"), ("b", "c"), ["c", "default"]]
    mixed = model(input_ids=ids, adapter_names=rows).logits
    told = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **GREEDY}
    generated = model.generate(**told, adapter_names=rows)
    for i, row in enumerate(rows):
        with model.use_adapters(*row):
            assert (model(input_ids=ids).logits[i] - mixed[i]).abs().max() < 1e-5
            assert torch.equal(model.generate(**told)[i], generated[i])
    with pytest.raises(ValueError, match="virtual tokens are default and b: 8, c: 4"):
        model(input_ids=ids, adapter_names=[("default", "b"), "c", ("default", "b")], use_cache=True)


@pytest.mark.parametrize("name", ["bert-question", "bert-feature"])
def test_tasks_where_the_real_library_has_no_way_to_name_them(bases, ids, name):
    """HF peft asks for ``task_ids`` there and does not take them."""
    task, base = bases[name]
    model = randomised(wrapped(inlay, base(), task, "tasks"))
    tasks = torch.tensor([2, 0, 1])
    p = model.prompt_encoder["default"]
    vectors = p.embedding.weight * (p.prefix_task_cols @ p.prefix_task_rows)[tasks]
    words = base().get_input_embeddings()(ids)
    expected = model.get_base_model()(inputs_embeds=torch.cat((vectors, words), 1))[0]
    found = model(input_ids=ids, task_ids=tasks)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() < 1e-5
    with pytest.raises(ValueError, match="task_ids"):
        model(input_ids=ids)


@pytest.mark.parametrize("case", ["prefix", "cartridge"])
def test_checkpointing_says_what_to_do(bases, ids, case):
    """HF peft trains on nothing here if checkpointing is switched on after the adapter was made."""
    task, base = bases["llama"]
    model = wrapped(inlay, base(), task, case).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match=r"gradient_checkpointing_disable\(\)"):
        model(input_ids=ids, labels=ids)
    model.eval()
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(q.grad.abs().max() > 0 for q in model.parameters() if q.requires_grad)
    model.train()
    model.gradient_checkpointing_disable()
    model(input_ids=ids, labels=ids).loss.backward()


def test_a_base_without_a_cache_is_refused():
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    base = DistilBertForSequenceClassification(DistilBertConfig(vocab_size=64, dim=32, n_layers=1, n_heads=4, hidden_dim=48))
    with pytest.raises(ValueError, match="takes no `past_key_values`"):
        inlay.get_peft_model(base, inlay.PrefixTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4))


@pytest.mark.parametrize("case", ["mlp", "lstm", "projected"])
def test_a_file_for_a_network_gives_what_the_network_made(bases, ids, tmp_path, case):
    """HF peft feeds the network's results to the network once more."""
    task, base = bases["llama"]
    trained = randomised(wrapped(inlay, base(), task, case))
    trained.save_pretrained(tmp_path)
    expected = trained(input_ids=ids).logits
    fresh = wrapped(inlay, base(), task, case)
    assert not fresh.load_adapter(tmp_path, "default")
    assert (fresh(input_ids=ids).logits - expected).abs().max() < 1e-4
    again = inlay.PeftModel.from_pretrained(base(), tmp_path, is_trainable=True)
    assert [n for n, q in again.named_parameters() if q.requires_grad] == ["prompt_encoder.default.embedding.weight"]
    assert (again(input_ids=ids).logits - expected).abs().max() < 1e-4


def test_prefixes_of_layers_that_look_through_a_window(bases, ids):
    from transformers import MistralConfig, MistralForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    ends = {"num_key_value_heads": 2, "initializer_range": 0.2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    torch.manual_seed(0)
    base = MistralForCausalLM(MistralConfig(**sizes, **ends, sliding_window=6)).eval()
    theirs = randomised(wrapped(peft, base, "CAUSAL_LM", "prefix"))
    prefix = theirs.prompt_encoder["default"].embedding.weight.data
    expected = theirs(input_ids=ids).logits
    ours = wrapped(inlay, base, "CAUSAL_LM", "prefix")
    ours.prompt_encoder["default"].load_prompt_embeddings(prefix)
    assert (ours(input_ids=ids).logits - expected).abs().max() < 1e-5
    found = ours.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **GREEDY)
    for length in range(7, 13):
        scores = ours(input_ids=found[:, :length]).logits[:, -1]
        scores[:, 2] = -torch.inf
        assert torch.equal(scores.argmax(-1), found[:, length])


def test_cartridges_start_from_texts_and_follow_each_other(bases, ids, tmp_path):
    task, base = bases["llama"]
    model = wrapped(inlay, base(), task, "unfrozen")
    cache = base()(input_ids=ids[:1], use_cache=True).past_key_values
    start = inlay.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=4)
    # A prefix that is the text's own cache is the text.
    expected = base()(input_ids=ids[:1]).logits[:, 4:]
    assert (model(input_ids=ids[:1, 4:]).logits - expected).abs().max() < 1e-5

    class Words:
        def __call__(self, text, return_tensors):
            return {"input_ids": ids[:1]}

    other = wrapped(inlay, base(), task, "cartridge")
    assert torch.equal(inlay.initialize_kv_prefix_from_text(other, Words(), text="any"), start)
    assert (other(input_ids=ids[:1, 4:]).logits - expected).abs().max() < 1e-5
    frozen = other.prompt_encoder["default"].frozen_embedding.clone()
    other(input_ids=ids, labels=ids).loss.backward()
    torch.optim.AdamW([q for q in other.parameters() if q.requires_grad], lr=1.0).step()
    assert torch.equal(other.prompt_encoder["default"].frozen_embedding, frozen)

    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    for library in (inlay, peft.tuners.cartridge.utils):
        library.compose_cartridge_adapters([tmp_path / "a", tmp_path / "b"], output_path=tmp_path / library.__name__)
    tensors = [load_file(tmp_path / x.__name__ / "adapter_model.safetensors") for x in (inlay, peft.tuners.cartridge.utils)]
    assert torch.equal(tensors[0]["prompt_embeddings"], tensors[1]["prompt_embeddings"])
    assert settings(tmp_path / "inlay") == settings(tmp_path / "peft.tuners.cartridge.utils")
    with pytest.raises(ValueError, match="holds 7 tokens and the prefix 9"):
        inlay.initialize_kv_prefix_from_past_key_values(model, past_key_values=cache, num_virtual_tokens=9)


@pytest.mark.parametrize("init", ["AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED"])
@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_multitask_prompts_start_from_others(bases, tmp_path, init, ending):
    task, base = bases["llama"]
    source = randomised(wrapped(peft, base(), task, "tasks"))
    source.save_pretrained(tmp_path, safe_serialization=ending == "safetensors")
    found = []
    for library in (inlay, peft):
        config = library.MultitaskPromptTuningConfig(
            task_type=task,
            num_virtual_tokens=4,
            num_ranks=2,
            prompt_tuning_init=init,
            prompt_tuning_init_state_dict_path=str(tmp_path / f"adapter_model.{ending}"),
            prompt_tuning_init_task=2,
        )
        found.append(library.get_peft_model_state_dict(library.get_peft_model(base(), config)))
    ours, theirs = found
    names = ["prompt_embeddings"] if init == "ONLY_SOURCE_SHARED" else list(theirs)
    assert sorted(ours) == sorted(theirs)
    assert all(torch.equal(ours[n], theirs[n].detach()) for n in names)


def test_bad_options(bases):
    task, base = bases["llama"]
    for make, told in {
        lambda: inlay.PromptEncoderConfig(encoder_reparameterization_type="MPL"): "Did you mean 'MLP'",
        lambda: inlay.PrefixTuningConfig(init_weights="one"): "leave it out or set 'zero'",
        lambda: inlay.CartridgeConfig(num_virtual_tokens=2, num_frozen_tokens=3): "num_frozen_tokens=3 of num_virtual_tokens=2",
        lambda: inlay.CPTConfig(task_type="SEQ_CLS"): "task_type='CAUSAL_LM'",
        lambda: inlay.CPTConfig(task_type=task, cpt_token_ids=[1, 2], cpt_mask=[1]): "cpt_mask is of 1 tokens",
        lambda: inlay.MultitaskPromptTuningConfig(prompt_tuning_init="SAMPLE_VOCAB"): "is unknown",
    }.items():
        with pytest.raises(ValueError, match=told):
            make()
    with pytest.raises(ValueError, match="needs `task_ids`"):
        wrapped(inlay, base(), task, "tasks")(input_ids=torch.ones(1, 3, dtype=torch.long))


def test_one_task_need_not_be_named(bases, ids):
    task, base = bases["llama"]
    config = inlay.MultitaskPromptTuningConfig(task_type=task, num_virtual_tokens=4, num_tasks=1)
    model = randomised(inlay.get_peft_model(base(), config).eval())
    named = model(input_ids=ids, task_ids=torch.zeros(len(ids), dtype=torch.long)).logits
    assert torch.equal(model(input_ids=ids).logits, named)
