"""Active, trainable, merged and train/eval are four independent states; local choices stay local."""

import asyncio
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import inlay
from inlay.core.inlaid import places
from inlay.core.session import CarriedChoice

from ..tiny import assert_same, ids, llama, logits, snapshot, stir


@pytest.fixture
def two():
    """A model with adapters a and b that differ, and the logits of base, a, b and both."""
    model = llama()
    x = ids()
    base = logits(model, x)
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]), "a").eval()
    peft_model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    stir(peft_model, "a", seed=1)
    stir(peft_model, "b", seed=2)
    out = {"base": base, "a": logits(peft_model, x)}
    peft_model.set_adapter("b")
    out["b"] = logits(peft_model, x)
    peft_model.set_adapter(["a", "b"])
    out["ab"] = logits(peft_model, x)
    peft_model.set_adapter("a")
    assert len({float(v.abs().sum()) for v in out.values()}) == 4
    return peft_model, x, out


def requires_grad(model, name):
    flags = {q.requires_grad for n, q in model.named_parameters() if f".adapters.{name}." in n}
    assert len(flags) == 1
    return flags.pop()


def test_activity_does_not_decide_what_is_trained(two, tmp_path):
    model, _, _ = two
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path / "a", "frozen")
    assert [requires_grad(model, n) for n in ("a", "b", "frozen")] == [True, False, False]
    model.set_adapter("frozen")
    assert [requires_grad(model, n) for n in ("a", "b", "frozen")] == [False, False, False]
    model.set_adapter("b")
    assert [requires_grad(model, n) for n in ("a", "b", "frozen")] == [False, True, False]
    model.set_adapter("a")
    model.set_requires_grad("a", False)
    model.set_adapter("b")
    model.set_adapter("a")
    assert not requires_grad(model, "a")


def test_new_adapters_inherit_train_and_eval_mode(two):
    model, _, _ = two
    model.add_adapter("c", inlay.LoraConfig(target_modules=["q_proj"]))
    assert {p.adapters["c"].training for p in places(model.get_base_model()) if "c" in p.adapters} == {False}
    model.train()
    model.add_adapter("d", inlay.LoraConfig(target_modules=["q_proj"]))
    assert {p.adapters["d"].training for p in places(model.get_base_model()) if "d" in p.adapters} == {True}


def test_merged_weights_do_not_decide_who_acts(two):
    model, x, out = two
    model.merge_adapter(["a"])
    torch.testing.assert_close(logits(model, x), out["a"], rtol=1e-5, atol=1e-5)
    model.set_adapter("b")
    torch.testing.assert_close(logits(model, x), out["b"], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        assert torch.equal(logits(model, x), out["base"])
    model.unmerge_adapter()
    model.merge_adapter(["a", "b"])
    model.set_adapter(["a", "b"])
    torch.testing.assert_close(logits(model, x), out["ab"], rtol=1e-5, atol=1e-5)


def test_blocks_nest(two):
    model, x, out = two
    with model.disable_adapter():
        with model.use_adapters("b"):
            assert torch.equal(logits(model, x), out["b"])
            with model.disable_adapter(), model.disable_adapter():
                assert torch.equal(logits(model, x), out["base"])
            assert torch.equal(logits(model, x), out["b"])
        assert torch.equal(logits(model, x), out["base"])
    assert torch.equal(logits(model, x), out["a"])


def test_a_block_that_raises_restores_the_choice(two):
    model, x, out = two
    with pytest.raises(RuntimeError, match="boom"), model.disable_adapter():
        raise RuntimeError("boom")
    assert torch.equal(logits(model, x), out["a"])


def test_threads_do_not_disturb_each_other(two):
    model, x, out = two

    def serve(name):
        right = 0
        for _ in range(60):
            with model.use_adapters(*name) if name else model.disable_adapter():
                right += torch.equal(logits(model, x), out[name or "base"])
        return right

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(serve, ("a", "b", "", "ab"))) == [60] * 4


def test_tasks_do_not_disturb_each_other(two):
    model, x, out = two

    async def serve(name):
        with model.use_adapters(name):
            for _ in range(5):
                await asyncio.sleep(0)
                assert torch.equal(logits(model, x), out[name])
                await asyncio.sleep(0)

    async def main():
        await asyncio.gather(*(serve(n) for n in ("a", "b", "a", "b")))

    asyncio.run(main())


def test_mixed_batch_equals_row_by_row(two):
    model, _, _ = two
    x = ids(rows=5)
    rows = ["a", "__base__", "b", "a", "b"]
    mixed = logits(model, x, adapter_names=rows)
    for i, name in enumerate(rows):
        with model.disable_adapter() if name == "__base__" else model.use_adapters(name):
            torch.testing.assert_close(mixed[i : i + 1], logits(model, x[i : i + 1]), rtol=1e-5, atol=1e-5)


def test_mixed_batch_trains_each_adapter_on_its_rows(two):
    model, _, _ = two
    x = ids(rows=3)
    model.set_adapter(["a", "b"])
    grads = {}
    for rows in (["a", "b", "a"], None):
        model.zero_grad()
        if rows:
            model(input_ids=x, labels=x, adapter_names=rows).logits.pow(2).sum().backward()
        else:
            for i, name in enumerate(("a", "b", "a")):
                with model.use_adapters(name):
                    model(input_ids=x[i : i + 1]).logits.pow(2).sum().backward()
        grads[bool(rows)] = {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}
    assert grads[True].keys() == grads[False].keys()
    for key, value in grads[True].items():
        torch.testing.assert_close(value, grads[False][key], rtol=1e-4, atol=1e-4)


def test_mixed_generation(two):
    model, _, _ = two
    x = ids(rows=3, length=4)
    rows = ["b", "__base__", "a"]
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    mixed = model.generate(input_ids=x, adapter_names=rows, **options)
    beams = model.generate(input_ids=x, adapter_names=rows, num_beams=2, **options)
    for i, name in enumerate(rows):
        with model.disable_adapter() if name == "__base__" else model.use_adapters(name):
            assert torch.equal(mixed[i], model.generate(input_ids=x[i : i + 1], **options)[0])
            assert torch.equal(beams[i], model.generate(input_ids=x[i : i + 1], num_beams=2, **options)[0])


def test_a_wrong_number_of_rows_is_an_error(two):
    model, _, _ = two
    with pytest.raises(ValueError, match="2 adapter names were given for a batch of 3"):
        model(input_ids=ids(rows=3), adapter_names=["a", "b"])
    with pytest.raises(ValueError, match="Adapter 'c' not found"):
        model(input_ids=ids(rows=1), adapter_names=["c"])


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("rows", [None, ["b", "__base__"]])
def test_checkpointed_blocks_are_computed_again_with_the_same_adapters(two, reentrant, rows):
    model, x, _ = two
    model.train()
    model.set_adapter(["a", "b"])
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        if rows:
            y = model(input_ids=x, adapter_names=rows).logits
        else:
            with model.use_adapters("b"):
                y = model(input_ids=x).logits
        # The backward pass runs where nobody has chosen: there, both are active.
        y.pow(2).sum().backward()
        grads.append({n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(".adapters.b." in n for n in grads[0])
    for key, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][key], rtol=1e-5, atol=1e-6)
    carried = [v for m in model.modules() for v in vars(m).values() if isinstance(v, CarriedChoice)]
    assert len(carried) == 3
    pickle.dumps(carried)
    base = model.unload()
    assert not any(isinstance(v, CarriedChoice) for m in base.modules() for v in vars(m).values())


def test_unloading_leaves_the_model_as_it_was():
    model = llama()
    before = snapshot(model)
    x = ids()
    y = logits(model, x)
    config = inlay.LoraConfig(target_modules="all-linear", modules_to_save=["lm_head"], trainable_token_indices=[1, 2])
    peft_model = inlay.get_peft_model(model, config)
    peft_model.add_adapter("b", inlay.LoraConfig(target_modules=["q_proj"], bias="all"))
    stir(peft_model)
    assert not torch.equal(logits(peft_model, x), y)
    peft_model.merge_adapter()
    assert peft_model.unload() is model
    assert_same(before, snapshot(model))
    assert torch.equal(logits(model, x), y)


def test_deleting_the_last_adapter_leaves_the_model_as_it_was(two):
    model, x, out = two
    for name in ("a", "b"):
        model.delete_adapter(name)
    base = model.get_base_model()
    assert torch.equal(logits(base, x), out["base"])
    assert all(q.requires_grad for q in base.parameters())
    assert not any("adapters" in n for n, _ in base.named_modules())


def test_status(two):
    model, _, _ = two
    model.merge_adapter(["a"])
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "LoraModel"
    assert status.peft_types == {"a": "LORA", "b": "LORA"}
    assert status.active_adapters == ["a"]
    assert status.merged_adapters == "irregular"
    assert status.available_adapters == ["a", "b"]
    assert status.num_adapter_layers == 6
    assert status.requires_grad == {"a": True, "b": False}
    assert status.trainable_params == 2 * (4 * (32 + 32) + 4 * (32 + 16))
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert layers["model.model.layers.0.self_attn.q_proj"].available_adapters == ["a", "b"]
    assert layers["model.model.layers.0.self_attn.q_proj"].module_type == "torch.Linear"


def test_trainable_parameters_are_counted(two, capsys):
    model, _, _ = two
    model.print_trainable_parameters()
    trainable = 2 * (4 * (32 + 32) + 4 * (32 + 16))
    total = sum(q.numel() for q in model.parameters())
    assert (
        capsys.readouterr().out.strip()
        == f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
    )
