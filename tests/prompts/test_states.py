"""Prompts in a model's session: who acts, who is trained, what goes in and comes out, and that threads do not meet."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

import inlay


def config(task="CAUSAL_LM", **options):
    return inlay.PromptTuningConfig(task_type=task, **({"num_virtual_tokens": 4} | options))


@pytest.fixture
def base(bases):
    return bases["llama"][1]()


@pytest.fixture
def model(base):
    model = inlay.get_peft_model(base, config(seed=1), "a").eval()
    model.add_adapter("b", config(seed=2))
    return model


def trainable(model):
    return sorted(n for n, q in model.named_parameters() if q.requires_grad)


def logits(model, ids, **options):
    with torch.no_grad():
        return model(input_ids=ids, **options).logits


def test_names_and_flags(model):
    live = "prompt_encoder.{}.embedding.weight"
    assert [n for n, _ in model.named_parameters() if "prompt" in n] == [live.format("a"), live.format("b")]
    assert trainable(model) == [live.format("a")]
    assert (model.active_adapter, model.active_adapters, model.peft_type) == ("a", ["a"], "PROMPT_TUNING")
    model.set_adapter("b")
    assert trainable(model) == [live.format("b")]
    model.set_requires_grad("b", False)
    assert trainable(model) == []
    model.set_requires_grad(["b"], True)
    assert trainable(model) == [live.format("b")]
    with pytest.raises(ValueError, match="Adapter 'c' not found"):
        model.set_adapter("c")
    with pytest.raises(ValueError, match="There is an adapter 'a' already"):
        model.add_adapter("a", config())
    assert list(model.peft_config) == list(model.prompt_encoder) == ["a", "b"]


def test_blocks_nest(model, ids):
    a, plain = logits(model, ids), model.get_base_model()(input_ids=ids).logits
    assert a.shape == (3, 11, 64)
    with model.use_adapters("b"):
        b = logits(model, ids)
        with model.disable_adapter():
            assert torch.equal(logits(model, ids), plain)
            with model.use_adapters("a"):
                assert torch.equal(logits(model, ids), a)
            assert torch.equal(logits(model, ids), plain)
        assert torch.equal(logits(model, ids), b)
    assert torch.equal(logits(model, ids), a)
    assert (a - b).abs().max() > 1e-2
    model.session.enabled = False
    assert torch.equal(logits(model, ids), plain)


def test_several_prompts_follow_each_other(model, ids):
    model.set_adapter(["b", "a"])
    both = logits(model, ids)
    assert both.shape == (3, 15, 64)
    words = model.get_input_embeddings()(ids)
    tensors = [model.prompt_encoder[n].embedding.weight.expand(3, 4, 32) for n in "ba"]
    expected = model.get_base_model()(inputs_embeds=torch.cat((*tensors, words), 1)).logits
    assert torch.equal(both, expected)
    assert len(trainable(model)) == 2


def test_rows(model, ids):
    mixed = logits(model, ids, adapter_names=["b", "a", "b"], attention_mask=torch.ones_like(ids))
    for row, name in enumerate("bab"):
        with model.use_adapters(name):
            assert (mixed[row] - logits(model, ids)[row]).abs().max() < 1e-5
    twice = logits(model, ids.repeat_interleave(2, 0), adapter_names=["b", "b", "a", "a", "b", "b"])
    assert (twice[::2] - mixed).abs().max() < 1e-5
    plain = model.get_base_model()(input_ids=ids).logits
    assert torch.equal(logits(model, ids, adapter_names=["__base__"] * 3), plain)
    with pytest.raises(ValueError, match="2 adapter names were given for a batch of 3"):
        model(input_ids=ids, adapter_names=["a", "b"])


def test_rows_of_several_prompts(model, ids):
    rows = [("b", "a"), ("a", "b"), ["b", "b"]]
    mixed = logits(model, ids, adapter_names=rows)
    assert mixed.shape == (3, 15, 64)
    tensors = [torch.cat([model.prompt_encoder[n].embedding.weight for n in row]) for row in rows]
    words = model.get_input_embeddings()(ids)
    expected = model.get_base_model()(inputs_embeds=torch.cat((torch.stack(tensors), words), 1)).logits
    assert (mixed - expected).abs().max() < 1e-5


def test_deleting_leaves_no_trace(bases, ids):
    base = bases["bert-sequence"][1]()
    base.bert.embeddings.requires_grad_(False)
    before = {n: (q.requires_grad, id(q)) for n, q in base.named_parameters()}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain, cls = base(**inputs).logits, type(base.classifier)
    model = inlay.get_peft_model(base, config("SEQ_CLS"), "a").eval()
    model.add_adapter("b", config("SEQ_CLS"))
    assert not any(q.requires_grad for n, q in base.named_parameters() if "adapters." not in n)
    model.delete_adapter("a")
    assert model.active_adapters == ["b"]
    assert trainable(model) == [f"base_model.classifier.adapters.b.{n}" for n in ("bias", "weight")] + ["prompt_encoder.b.embedding.weight"]
    model.delete_adapter("b")
    assert {n: (q.requires_grad, id(q)) for n, q in base.named_parameters()} == before
    assert type(base.classifier) is cls
    assert "_inlay_session" not in vars(base)
    assert torch.equal(model(**inputs).logits, plain)
    with pytest.raises(ValueError, match="no adapters"):
        model.get_model_status()


def test_retrained_heads_go_with_their_prompt(bases, ids):
    model = inlay.get_peft_model(bases["bert-sequence"][1](), config("SEQ_CLS"), "a").eval()
    model.add_adapter("b", config("SEQ_CLS", seed=0))
    assert model.modules_to_save == {"classifier"}
    model.set_adapter("b")
    model.base_model.classifier.adapters["b"].weight.data.zero_()
    model.base_model.classifier.adapters["b"].bias.data.fill_(5)
    assert torch.equal(logits(model, ids), torch.full((3, 3), 5.0))
    with model.use_adapters("a"):
        assert not torch.equal(logits(model, ids), torch.full((3, 3), 5.0))
    with model.disable_adapter():
        assert torch.equal(logits(model, ids), bases["bert-sequence"][1]()(input_ids=ids).logits)
    mixed = logits(model, ids, adapter_names=["a", "b", "a"])
    assert torch.equal(mixed[1], torch.full((3,), 5.0))
    assert not torch.equal(mixed[0], mixed[1])


def test_status(model, capsys):
    model.print_trainable_parameters()
    total = sum(q.numel() for q in model.parameters())
    assert capsys.readouterr().out == f"trainable params: 128 || all params: {total:,} || trainable%: {12800 / total:.4f}\n"
    status = model.get_model_status()
    assert (status.base_model_type, status.peft_types) == ("LlamaForCausalLM", {"a": "PROMPT_TUNING", "b": "PROMPT_TUNING"})
    assert (status.trainable_params, status.total_params, status.num_adapter_layers) == (128, total, 1)
    assert (status.active_adapters, status.available_adapters, status.merged_adapters) == (["a"], ["a", "b"], [])
    assert (status.requires_grad, status.devices) == ({"a": True, "b": False}, {"a": ["cpu"], "b": ["cpu"]})
    (layer,) = model.get_layer_status()
    assert (layer.name, layer.active_adapters, layer.requires_grad) == ("prompt_encoder", ["a"], {"a": True, "b": False})


def test_status_with_a_head(bases):
    model = inlay.get_peft_model(bases["bert-sequence"][1](), config("SEQ_CLS"))
    status = model.get_model_status()
    assert (status.num_adapter_layers, status.requires_grad, status.trainable_params) == (2, {"default": True}, 128 + 99)
    assert [layer.name for layer in model.get_layer_status()] == ["prompt_encoder", "model.classifier"]
    model.prompt_encoder["default"].requires_grad_(False)
    assert model.get_model_status().requires_grad == {"default": "irregular"}


def test_training_mode_and_gradients(model, ids):
    model.train()
    assert model.prompt_encoder["a"].training
    model(input_ids=ids, labels=ids).loss.backward()
    assert model.prompt_encoder["a"].embedding.weight.grad.abs().min() > 0
    assert all(q.grad is None for n, q in model.named_parameters() if "prompt_encoder.a" not in n)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("when", ["before", "after"])
def test_gradient_checkpointing(bases, ids, reentrant, when):
    found = []
    for checkpointing in (True, False):
        base = bases["llama"][1]()
        if checkpointing and when == "before":
            base.gradient_checkpointing_enable({"use_reentrant": reentrant})
        model = inlay.get_peft_model(base, config()).train()
        if checkpointing and when == "after":
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        assert base.is_gradient_checkpointing == checkpointing
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        found.append(model.prompt_encoder["default"].embedding.weight.grad)
    assert (found[0] - found[1]).abs().max() < 1e-6
    assert found[1].abs().max() > 1e-3


def test_masks_with_four_axes(bases, ids, right_padded):
    causal = torch.ones(7, 7, dtype=torch.bool).tril() & right_padded[:, None, None].bool()
    added = torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min)
    model = inlay.get_peft_model(bases["llama"][1](), config()).eval()
    expected = logits(model, ids, attention_mask=right_padded)
    seen = torch.cat((torch.ones(3, 4), right_padded), 1).bool()
    for mask in (causal, added, causal.long()):
        assert (logits(model, ids, attention_mask=mask) - expected)[seen].abs().max() < 1e-5
    encoder = inlay.get_peft_model(bases["bert-token"][1](), config("TOKEN_CLS")).eval()
    expected = logits(encoder, ids, attention_mask=right_padded)
    square = right_padded[:, None, None].bool().expand(3, 1, 7, 7)
    assert (logits(encoder, ids, attention_mask=square) - expected)[seen].abs().max() < 1e-5
    with pytest.raises(ValueError, match="attention_mask has 3 axes"):
        model(input_ids=ids, attention_mask=torch.ones(3, 7, 7))


def test_a_model_of_no_known_task(bases, ids):
    model = inlay.get_peft_model(bases["llama"][1](), config(None)).eval()
    of_task = inlay.get_peft_model(bases["llama"][1](), config()).eval()
    found, expected = model(input_ids=ids, labels=ids), of_task(input_ids=ids, labels=ids)
    assert torch.equal(found.logits, expected.logits)
    assert torch.equal(found.loss, expected.loss)


def test_copies_and_pickles(model, ids):
    expected = logits(model, ids)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(other, ids), expected)
        other.set_adapter("b")
        other.prompt_encoder["a"].embedding.weight.data.zero_()
        assert model.active_adapter == "a"
    assert torch.equal(logits(model, ids), expected)


def test_a_compiled_forward_pass(model, ids):
    torch._dynamo.reset()  # what others compiled in this process counts against a limit of the same function
    expected = logits(model, ids)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert (logits(compiled, ids) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_threads_with_prompts_of_their_own(bases, ids, name):
    """They meet in the middle of each generation, on one model, and each gets what it gets alone."""
    task, base = bases[name]
    model = inlay.get_peft_model(base(), config(task, seed=1), "a").eval()
    model.add_adapter("b", config(task, seed=2, num_virtual_tokens=7))
    options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6}
    barrier = Barrier(3)

    def work(name, meet):
        found = []
        for _ in range(4):
            if name == "base":
                with model.disable_adapter():
                    barrier.wait() if meet else None
                    found.append(model.generate(input_ids=ids, **options))
            else:
                with model.use_adapters(name):
                    barrier.wait() if meet else None
                    found.append(model.generate(input_ids=ids, **options))
        return found

    names = ["a", "b", "base"]
    expected = {n: work(n, meet=False)[0] for n in names}
    assert len({str(t.tolist()) for t in expected.values()}) == 3
    with ThreadPoolExecutor(3) as pool:
        for name, found in zip(names, pool.map(lambda n: work(n, meet=True), names), strict=True):
            assert all(torch.equal(t, expected[name]) for t in found), name
    assert "prepare_inputs_for_generation" not in vars(model.get_base_model())


@pytest.mark.parametrize("name", ["merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"])
def test_what_is_done_with_changes_of_weights_is_not_there(model, name):
    with pytest.raises(AttributeError, match=f"PROMPT_TUNING acts on inputs and changes no weight, so there is nothing for '{name}'"):
        getattr(model, name)
