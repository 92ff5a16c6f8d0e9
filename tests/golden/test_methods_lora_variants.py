"""Variants of LoRA against the real library: files both ways, steps of training, and generation."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import inlay
from inlay.core.inlaid import adapters_of

from .models import MODELS
from .support import WEIGHTS, both_ways, close, jitter, outputs, same_steps

LLAMA = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj"]}
LINEAR: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "bert": {"r": 4, "lora_alpha": 6, "target_modules": ["query", "dense"], "task_type": "SEQ_CLS"},
    "attention": {"r": 2, "target_modules": ["mixed"]},
}
BLOCKS = {"target_modules_bd_a": ["down_proj", "dense", "mixed"], "target_modules_bd_b": ["q_proj", "query"], "nblocks": 2}
VARIANTS: dict[str, dict[str, Any]] = {
    "bdlora": {"use_bdlora": BLOCKS},
    "velora": {"velora_config": {"num_groups": 4, "scale": 0.7}},
    "velora-uneven": {"velora_config": {"num_groups": 5, "init_type": "batch_average_once"}},
    "monteclora": {"monteclora_config": {"num_samples": 3}},
    "kasa": {"kasa_config": {}},
    "rslora-kasa": {"kasa_config": {"beta": 0.1}, "use_rslora": True},
}
# HF peft's KaSA and BD-LoRA take no transposed weight.
PAIRS = [(v, m) for v in VARIANTS for m in LINEAR if not (m == "attention" and ("kasa" in v or v == "bdlora"))]


@pytest.mark.parametrize(("variant", "model"), PAIRS)
def test_files_both_ways(variant: str, model: str, tmp_path: Path) -> None:
    # Either library takes a dictionary, which is what a file has.
    both_ways(model, "LoraConfig", tmp_path, **LINEAR[model], **VARIANTS[variant])


@pytest.mark.parametrize("variant", ["bdlora", "velora", "velora-uneven", "kasa"])
def test_the_same_steps(variant: str, tmp_path: Path) -> None:
    same_steps("llama", "LoraConfig", tmp_path, rate=0.3, **LLAMA, **VARIANTS[variant])


def test_the_same_steps_without_noise(tmp_path: Path) -> None:
    config = {"num_samples": 3, "sample_scaler": 0.0}
    same_steps("llama", "LoraConfig", tmp_path, rate=0.3, **LLAMA, monteclora_config=config)


def pair(folder: Path, **options: Any) -> tuple[Any, Any]:
    """The real library's model with an adapter, and ours from its file."""
    build, _ = MODELS["llama"]
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**LLAMA, **options))
    jitter(theirs)
    theirs.save_pretrained(folder)
    return theirs, inlay.PeftModel.from_pretrained(build(), folder, is_trainable=True)


def test_what_kasa_adds_to_the_loss(tmp_path: Path) -> None:
    theirs, ours = pair(tmp_path, kasa_config={"beta": 0.3, "gamma": 0.2})
    expected = theirs.base_model._get_kasa_loss()
    example = MODELS["llama"][1]()
    with torch.no_grad():
        plain = ours.eval()(**example, labels=example["input_ids"]).loss
        assert (ours.train()(**example, labels=example["input_ids"]).loss - plain).item() == pytest.approx(expected.item(), rel=1e-5)


def test_kasa_s_term_added_by_hand_counts_once(tmp_path: Path) -> None:
    """Code for the real library adds the term to the task's loss. The model's loss in training has it already; one that is computed
    from the logits does not, nor does that of an evaluation."""
    theirs, ours = pair(tmp_path, kasa_config={"beta": 0.3, "gamma": 0.2})
    example = MODELS["llama"][1]()
    labelled = {**example, "labels": example["input_ids"]}
    expected = theirs.base_model._get_kasa_loss()
    assert type(ours.base_model).__name__ == "LoraModel"
    torch.testing.assert_close(ours.base_model._get_kasa_loss(), expected)
    for model in (theirs.train(), ours.train()):
        model.zero_grad()
        (model(**labelled).loss + model.base_model._get_kasa_loss()).backward()
    assert ours._get_kasa_loss() == 0.0
    its = dict(theirs.named_parameters())
    gradients = {name: q.grad for name, q in ours.named_parameters() if q.grad is not None}
    assert gradients
    for p in adapters_of(ours.get_base_model(), "default"):
        for mine, name in ((p.lora_A, "lora_A.default.weight"), (p.lora_B, "lora_B.default.weight"), (p.lora_diag, "lora_diag.default")):
            torch.testing.assert_close(mine.grad, its[f"base_model.model.{p.path}.{name}"].grad, rtol=1e-4, atol=1e-6)
    ours(**example)
    torch.testing.assert_close(ours._get_kasa_loss(), expected)
    ours(**labelled)
    ours.eval()(**labelled)
    torch.testing.assert_close(ours._get_kasa_loss("default"), expected)
    assert ours._get_kasa_loss([]) == ours._get_monteclora_loss() == 0.0


def test_terms_of_plain_lora_are_none() -> None:
    model = inlay.get_peft_model(MODELS["llama"][0](), inlay.LoraConfig(**LLAMA))
    assert model.base_model._get_kasa_loss() == model.base_model._get_monteclora_loss() == 0.0


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_the_trainer_s_mixin_counts_monteclora_s_term_once(training: bool, labelled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the trainer computes the loss from the logits, as it does to smooth labels."""
    config = {"num_samples": 4, "kl_loss_weight": 1.0, "sample_scaler": 0.0}
    model = inlay.get_peft_model(MODELS["llama"][0](), inlay.LoraConfig(**LLAMA, monteclora_config=config)).train(training)
    method = adapters_of(model.get_base_model(), "default")[0].method
    monkeypatch.setattr(type(method), "_variance", lambda self, p: p.std_prior.exp().square() * p.std_prior.numel())
    example = MODELS["llama"][1]()

    class Plain:
        def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, **kwargs: Any) -> Any:
            given = {**inputs, "labels": inputs["input_ids"]} if labelled else inputs
            outputs = model(**given)
            loss = outputs.loss if labelled else outputs.logits.square().mean()
            return (loss, outputs) if return_outputs else loss

    class Mixed(inlay.MontecloraTrainerMixin, Plain):
        pass

    with torch.no_grad():
        bare = model.base_model.model(**example, labels=example["input_ids"])
        task = bare.loss if labelled else bare.logits.square().mean()
        term = method.penalty(adapters_of(model.get_base_model(), "default"))
        loss, outputs = Mixed().compute_loss(model, example, return_outputs=True)
        torch.testing.assert_close(loss, task + term)
        torch.testing.assert_close(Mixed().compute_loss(model, example), loss)
        assert outputs.logits.shape == bare.logits.shape


def test_what_monteclora_adds_to_the_loss(tmp_path: Path) -> None:
    """Both are noisy, by the variances that are drawn: their means agree."""
    options = {"num_samples": 4, "kl_loss_weight": 1.0, "sample_scaler": 0.1, "use_entropy": True}
    theirs, ours = pair(tmp_path, monteclora_config=options)
    example = MODELS["llama"][1]()
    torch.manual_seed(0)
    theirs.train()
    adapters = adapters_of(ours.get_base_model(), "default")
    method = adapters[0].method
    its, mine = [], []
    for _ in range(150):
        with torch.no_grad():
            theirs(**example)
        its.append(float(theirs.base_model._get_monteclora_loss()))
        mine.append(float(method.penalty(adapters)))
    assert sum(mine) / len(mine) == pytest.approx(sum(its) / len(its), rel=0.05)


def test_the_noise_of_monteclora(tmp_path: Path) -> None:
    """One normal draw has the distribution of the mixture that the real library draws: mean zero, and this size a rank."""
    theirs, ours = pair(tmp_path, monteclora_config={"num_samples": 4, "sample_scaler": 0.5})
    p = adapters_of(ours.get_base_model(), "default")[0]
    sampler = next(m.lora_monteclora_sampler["default"] for m in theirs.modules() if hasattr(m, "lora_monteclora_sampler"))
    torch.manual_seed(0)
    with torch.no_grad():
        mine = torch.stack([p.method._drawn(p, p.lora_A) for _ in range(600)])
        drawn = [sampler() for _ in range(600)]
        its = torch.stack([torch.einsum("n,nij->ji", w, v) for v, w in drawn])
    assert mine.mean().abs() < 0.03 * mine.std()
    torch.testing.assert_close(mine.square().mean((0, 2)), its.square().mean((0, 2)), rtol=0.25, atol=0)


# ---- aLoRA ----------------------------------------------------------------------------------------------------------------
CALL = [7, 8]


def prompts() -> Tensor:
    """Rows that are invoked early, late, twice and never."""
    torch.manual_seed(1)
    ids = torch.randint(10, 40, (4, 7))
    ids[0, 1:3] = ids[1, 5:7] = ids[2, 0:2] = ids[2, 3:5] = torch.tensor(CALL)
    return ids


def alora(folder: Path, *targets: str) -> tuple[Any, Any]:
    build, _ = MODELS["llama"]
    config = {**LLAMA, "target_modules": list(targets), "alora_invocation_tokens": CALL, "task_type": "CAUSAL_LM"}
    theirs = peft.get_peft_model(build(), peft.LoraConfig(**config))
    jitter(theirs)
    theirs.save_pretrained(folder)
    return theirs.eval(), inlay.PeftModel.from_pretrained(build(), folder)


def test_alora_acts_from_its_invocation_on(tmp_path: Path) -> None:
    theirs, ours = alora(tmp_path, "q_proj", "v_proj", "down_proj")
    ids = prompts()
    base = MODELS["llama"][0]()(input_ids=ids).logits
    mine = ours(input_ids=ids).logits
    close(mine, theirs(input_ids=ids).logits)
    for row, start in enumerate((1, 5, 3, 7)):
        close(mine[row, :start], base[row, :start])
        assert start == 7 or not torch.allclose(mine[row, start:], base[row, start:], atol=1e-3)
    offsets = [3, None, 7, 1]
    close(ours(input_ids=ids, alora_offsets=offsets).logits, theirs(input_ids=ids, alora_offsets=offsets).logits)
    ours.save_pretrained(tmp_path / "ours")
    again = peft.PeftModel.from_pretrained(MODELS["llama"][0](), tmp_path / "ours")
    close(again(input_ids=ids).logits, mine)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("padded", [False, True])
def test_alora_generates(beams: int, padded: bool, tmp_path: Path) -> None:
    theirs, ours = alora(tmp_path, "q_proj", "v_proj", "down_proj")
    ids = prompts()
    mask = torch.ones_like(ids)
    if padded:
        ids[1, :2], mask[1, :2] = 0, 0
    asked = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 5, "num_beams": beams, "do_sample": False, "pad_token_id": 0}
    mine = ours.generate(**asked)
    if beams == 1:
        # The real library has offsets for rows alone, and its masks do not fit a batch of beams.
        assert torch.equal(mine, theirs.generate(**asked))
    # Without a cache all tokens go through the layers in each step; the beginning is the base's then as well.
    assert torch.equal(mine, ours.generate(**asked, use_cache=False))


def test_alora_in_a_mixed_batch(tmp_path: Path) -> None:
    _, ours = alora(tmp_path, "q_proj", "down_proj")
    ours.add_adapter("plain", inlay.LoraConfig(**LLAMA, init_lora_weights=False))
    ours.eval()
    ids = prompts()
    mixed = ours(input_ids=ids, adapter_names=["plain", "default", "default", "__base__"]).logits
    close(mixed[1:3], ours(input_ids=ids).logits[1:3])
    close(mixed[3], MODELS["llama"][0]()(input_ids=ids).logits[3])
    with ours.use_adapters("plain"):
        close(mixed[0], ours(input_ids=ids).logits[0])


# ---- replicated blocks ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("model", ["llama", "bert"])
def test_replicated_blocks(model: str, tmp_path: Path) -> None:
    build, example = MODELS[model]
    names = {"llama": ["q_proj"], "bert": ["query"]}[model]
    given = {"r": 4, "target_modules": names, "layer_replication": [[0, 2], [0, 1], [1, 2]]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), peft.LoraConfig(**given))
    jitter(theirs)
    theirs.save_pretrained(tmp_path)
    base = build()
    before = outputs(base, example())
    ours = inlay.PeftModel.from_pretrained(base, tmp_path)
    assert len(adapters_of(base, "default")) == 4
    expected = outputs(theirs, example())
    close(outputs(ours, example()), expected)
    ours.save_pretrained(tmp_path / "ours")
    mine, its = load_file(tmp_path / "ours" / WEIGHTS), load_file(tmp_path / WEIGHTS)
    assert mine.keys() == its.keys()
    assert all(torch.equal(mine[k], its[k]) for k in its)
    close(outputs(ours.unload(), example()), before)
    assert base.config.num_hidden_layers == 2
    # The real library cannot merge them; each place has a weight of its own here.
    merged = inlay.PeftModel.from_pretrained(build(), tmp_path).merge_and_unload()
    close(outputs(merged, example()), expected)
