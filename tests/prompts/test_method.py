"""A method of another kind is one class: vectors made of several tensors, by row, with an option and a loss of its own."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

import inlay
from inlay.core.param import Param, normal
from inlay.prompts import PromptMethod


@dataclass
class Tasks(PromptMethod):
    """One prompt, and one gain for each task; the file has the prompts of all tasks, made."""

    peft_type: str | None = "TASKS"
    options = ("task_ids",)

    def params(self):
        shape = (self.num_virtual_tokens, self.token_dim)
        return {"embedding.weight": Param(shape, normal()), "gains": Param((3, 1, 1), normal())}

    def vectors(self, p, options):
        return p.embedding.weight * p.gains[options["task_ids"]]

    def in_file(self, p):
        return {"prompt_embeddings": p.embedding.weight * p.gains}

    def forward(self, base, inputs, vectors, options):
        outputs = super().forward(base, inputs, vectors, options)
        outputs["of"] = sorted((*inputs, *options))
        return outputs


@pytest.fixture
def model(bases):
    return inlay.get_peft_model(bases["llama"][1](), Tasks(task_type="CAUSAL_LM", num_virtual_tokens=4), "a").eval()


def test_vectors_that_differ_by_row(model, ids):
    tasks = torch.tensor([2, 0, 1])
    together = model(input_ids=ids, task_ids=tasks, labels=ids)
    assert together.logits.shape == (3, 11, 64)
    assert together["of"] == ["input_ids", "labels", "task_ids"]
    for row in range(3):
        alone = model(input_ids=ids[row : row + 1], task_ids=tasks[row : row + 1]).logits[0]
        assert (together.logits[row] - alone).abs().max() < 1e-5
    together.loss.backward()
    prompt = model.prompt_encoder["a"]
    assert all(q.grad.abs().min() > 0 for q in prompt.parameters())
    options = {"do_sample": False, "max_new_tokens": 4, "min_new_tokens": 4}
    generated = model.generate(input_ids=ids, task_ids=tasks, **options)
    assert torch.equal(generated[1:2], model.generate(input_ids=ids[1:2], task_ids=tasks[1:2], **options))


def test_what_goes_to_its_file(model):
    found = inlay.get_peft_model_state_dict(model, adapter_name="a")
    assert {k: tuple(t.shape) for k, t in found.items()} == {"prompt_embeddings": (3, 4, 32)}
    halved = {k: t / 2 for k, t in model.state_dict().items()}
    assert torch.equal(inlay.get_peft_model_state_dict(model, halved, "a")["prompt_embeddings"], found["prompt_embeddings"] / 4)


def test_two_methods_do_not_act_together(model, ids):
    model.add_adapter("b", inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    model.set_adapter(["a", "b"])
    with pytest.raises(ValueError, match=r"several methods cannot act together \(a is TASKS, b is PROMPT_TUNING\)"):
        model(input_ids=ids, task_ids=torch.tensor([0, 1, 2]))
