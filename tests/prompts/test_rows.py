"""Rows of one batch whose prompts are of several lengths and methods, or none: each row has the numbers that it has alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import inlay
from inlay.together import Job, parameters_of

# The adapters of the rows; 3 virtual tokens in "short", 5 in "long", 4 in "network" and 2 in "prefix".
ROWS = ["long", "__base__", "short", "network", "prefix", ("short", "long"), "__base__", "long"]


def adapted(base: nn.Module, task: str, prefix: bool = True) -> inlay.PeftModel:
    configs = {
        "short": inlay.PromptTuningConfig(task_type=task, num_virtual_tokens=3, seed=1),
        "long": inlay.PromptTuningConfig(task_type=task, num_virtual_tokens=5, seed=2),
        "network": inlay.PromptEncoderConfig(task_type=task, num_virtual_tokens=4, encoder_hidden_size=8, seed=3),
        "prefix": inlay.PrefixTuningConfig(task_type=task, num_virtual_tokens=2, seed=4),
    }
    model = inlay.get_peft_model(base, configs["short"], "short")
    for name in ("long", "network", *(["prefix"] if prefix else [])):
        model.add_adapter(name, configs[name])
    return model.eval()


@pytest.fixture
def batch() -> dict[str, Tensor]:
    """Eight rows, padded on the left."""
    ids = torch.randint(3, 64, (8, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    for row in range(8):
        mask[row, : row % 3] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def alone(model: inlay.PeftModel, row: Any, batch: dict[str, Any], call: Any, i: int) -> Any:
    names = () if row == "__base__" else (row,) if isinstance(row, str) else row
    with model.use_adapters(*names):
        return call(**{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in batch.items()})


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert-token", "t5"])
def test_each_row_is_what_it_is_alone(name: str, bases: Any, batch: dict[str, Any]) -> None:
    task, build = bases[name]
    model = adapted(build(), task, prefix=name != "t5")
    rows = [row if row != "prefix" or name != "t5" else "short" for row in ROWS]
    if name == "t5":
        batch["decoder_input_ids"] = batch["input_ids"][:, :4]
    mixed = model(**batch, adapter_names=rows, output_hidden_states=name == "llama")
    virtual = {"long": 5, "short": 3, "network": 4, ("short", "long"): 8}
    assert mixed.logits.shape == ((8, 4, 64) if name == "t5" else (8, 15, 3 if name == "bert-token" else 64))
    for i, row in enumerate(rows):
        single = alone(model, row, batch, model, i).logits[0]
        assert (mixed.logits[i, -len(single) :] - single).abs().max() < 1e-5
        if name != "t5":
            assert len(single) == 7 + virtual.get(row, 0)
            assert not mixed.logits[i, : -len(single)].any()
    if name == "llama":
        assert [h.shape for h in mixed.hidden_states] == [(8, 15, 32)] * 3
    as_tuple = model(**batch, adapter_names=rows, return_dict=False)
    assert torch.equal(as_tuple[0], mixed.logits)


def test_scores_of_positions(bases: Any, batch: dict[str, Any]) -> None:
    model = adapted(bases["bert-question"][1](), "QUESTION_ANS")
    mixed = model(**batch, adapter_names=ROWS)
    for i, row in enumerate(ROWS):
        single = alone(model, row, batch, model, i).start_logits[0]
        assert (mixed.start_logits[i, -len(single) :] - single).abs().max() < 1e-5
        # A position that is none has no share.
        assert (mixed.start_logits[i].softmax(0)[: -len(single)] == 0).all()


@pytest.mark.parametrize(("name", "whole"), [("llama", False), ("llama", True), ("bert-token", False), ("bert-sequence", False)])
def test_one_loss(name: str, whole: bool, bases: Any, batch: dict[str, Any]) -> None:
    """The mean over all labels of the batch, of rows of all kinds, and gradients that are those of the rows alone."""
    task, build = bases[name]
    model = adapted(build(), task)
    model.set_requires_grad(list(model.peft_config), True)
    model.set_adapter(["short", "long", "network", "prefix"])
    labels = torch.randint(0, 3, (8, 7), generator=torch.Generator().manual_seed(2))
    labels[batch["attention_mask"] == 0] = -100
    labels[1], labels[3, 2:] = -100, -100
    labels = labels[:, 4] if name == "bert-sequence" else labels
    options = {"num_items_in_batch": torch.tensor(20)} if whole else {}
    mixed = model(**batch, labels=labels, adapter_names=ROWS, **options)
    mixed.loss.backward()
    mine = {n: q.grad.clone() for n, q in model.named_parameters() if q.grad is not None}
    model.zero_grad()
    total, count = torch.tensor(0.0), 0
    for i, row in enumerate(ROWS):
        out = alone(model, row, batch, model, i).logits[0]
        own = labels[i]
        if name == "llama":
            out, own = out[:-1], F.pad(own, (len(out) - 7, 0), value=-100)[1:]
        elif name == "bert-token":
            own = F.pad(own, (len(out) - 7, 0), value=-100)
        total = total + F.cross_entropy(out, own, reduction="sum")
        count += int((own != -100).sum())
    (total / (20 if whole else count)).backward()
    assert abs(mixed.loss.item() - total.item() / (20 if whole else count)) < 1e-5
    theirs = {n: q.grad for n, q in model.named_parameters() if q.grad is not None}
    assert set(mine) <= set(theirs)
    assert sum(g.abs().max() > 1e-3 for g in mine.values()) > 2
    for n, grad in theirs.items():
        # What has no label has no gradient.
        assert (mine.get(n, torch.zeros(())) - grad).abs().max() < 1e-5 * max(1, float(grad.abs().max()))


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_generation(name: str, options: dict[str, Any], bases: Any, batch: dict[str, Any]) -> None:
    task, build = bases[name]
    model = adapted(build(), task, prefix=name != "t5")
    rows = [row if row != "prefix" or name != "t5" else "short" for row in ROWS]
    options = {"max_new_tokens": 5, "do_sample": False} | options
    mixed, each = model.generate(**batch, adapter_names=rows, **options), options.get("num_return_sequences", 1)
    assert mixed.shape[0] == 8 * each
    for i, row in enumerate(rows):
        single = alone(model, row, batch, lambda **inputs: model.generate(**inputs, **options), i)
        assert torch.equal(mixed[i * each : (i + 1) * each, : single.shape[1]], single)
        # Beams that are done are filled up with the token that ends a text.
        tail, filling = mixed[i * each : (i + 1) * each, single.shape[1] :], {0, 1 if name == "t5" else 2}
        assert set(tail.flatten().tolist()) <= filling


def test_trained_together_as_apart(bases: Any) -> None:
    def trained(passes: list[list[str]]) -> dict[str, Tensor]:
        model = adapted(bases["llama"][1](), "CAUSAL_LM")
        names = ["short", "long", "network", "prefix"]
        model.set_requires_grad(names, True)
        model.set_adapter(names)
        jobs = {name: Job(torch.optim.SGD(parameters_of(model, name), lr=0.1 * i), max_grad_norm=0.5) for i, name in enumerate(names, 1)}
        generator = torch.Generator().manual_seed(1)
        given = {name: torch.randint(3, 64, (i, 4 + i), generator=generator) for i, name in enumerate(names, 1)}
        for together in passes:
            inlay.step_together(model, {n: jobs[n] for n in together}, {n: {"input_ids": given[n], "labels": given[n]} for n in together})
        return {n: q.detach().clone() for n, q in model.prompt_encoder.named_parameters()}

    before, after = trained([]), trained([["short", "long", "network", "prefix"]] * 2)
    apart = trained([["prefix"], ["short"], ["long"], ["network"]] * 2)
    assert all((after[n] - before[n]).abs().max() > 1e-5 for n in after)
    for n in after:
        torch.testing.assert_close(after[n], apart[n], rtol=1e-4, atol=1e-5)


def test_what_cannot_be_of_several_lengths(bases: Any, batch: dict[str, Any]) -> None:
    model = adapted(bases["llama"][1](), "CAUSAL_LM")
    told = "long: 5, __base__: 0, short: 3"
    with pytest.raises(ValueError, match=f"{told}.*have not a cache"):
        model(**batch, adapter_names=ROWS, use_cache=True)
    with pytest.raises(ValueError, match=f"{told}.*have not one generation for `return_dict_in_generate`"):
        model.generate(**batch, adapter_names=ROWS, return_dict_in_generate=True)
    with pytest.raises(ValueError, match="several methods cannot act together"):
        model(**batch, adapter_names=[("short", "prefix")] * 8)
    # One kind alone takes all of these.
    assert model(**batch, adapter_names=["long"] * 8, use_cache=True).past_key_values.get_seq_length() == 12
