"""Prompt tuning: what it starts from, seeds, its configuration."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import inlay
from inlay.core.config import CONFIGS


def prompt(library, base, task="CAUSAL_LM", **options):
    model = library.get_peft_model(base, library.PromptTuningConfig(task_type=task, **({"num_virtual_tokens": 4} | options)))
    return library.get_peft_model_state_dict(model)["prompt_embeddings"]


@pytest.fixture
def base(bases):
    return bases["llama"][1]


@pytest.fixture
def tokenizer(tmp_path):
    """A folder with a tokenizer of ten words."""
    words = {w: i for i, w in enumerate(["[UNK]", "is", "this", "review", "good", "or", "bad", "?", "yes", "no"])}
    plain = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="[UNK]").save_pretrained(tmp_path / "words")
    return tmp_path / "words"


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("count", [3, 8, 20])
def test_a_text_starts_as_in_hf(bases, tokenizer, name, count):
    task, base = bases[name]
    options = {
        "prompt_tuning_init": "TEXT",
        "prompt_tuning_init_text": "is this review good or bad ?",
        "tokenizer_name_or_path": str(tokenizer),
        "num_virtual_tokens": count,
    }
    ours, theirs = prompt(inlay, base(), task, **options), prompt(peft, base(), task, **options)
    assert ours.shape == (count * (2 if name == "t5" else 1), 32)
    assert torch.equal(ours, theirs)
    assert torch.equal(ours[:3], base().get_input_embeddings().weight[1:4])


def test_words_of_the_vocabulary(base):
    vocabulary = base().get_input_embeddings().weight
    found = prompt(inlay, base(), prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=12)
    rows = [(vocabulary == v).all(1).nonzero().flatten().tolist() for v in found]
    assert all(len(r) == 1 for r in rows)
    assert len({r[0] for r in rows}) > 6
    assert torch.equal(found, prompt(inlay, base(), prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=12))
    assert not torch.equal(found, prompt(inlay, base(), prompt_tuning_init="SAMPLE_VOCAB", num_virtual_tokens=12, seed=1))


def test_random_values_are_as_spread_as_in_hf(base):
    ours, theirs = (prompt(library, base(), num_virtual_tokens=200) for library in (inlay, peft))
    assert abs(ours.mean().item()) < 0.05
    assert abs(ours.std().item() - theirs.std().item()) < 0.05
    assert ours.dtype == torch.float32


def test_a_seed_decides_and_nothing_else_does(base):
    first = prompt(inlay, base(), seed=7)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    model = base()
    torch.set_rng_state(before)
    again = prompt(inlay, model, seed=7)
    assert torch.equal(torch.get_rng_state(), before), "the global generator was used"
    assert torch.equal(first, again)
    assert not torch.equal(first, prompt(inlay, base(), seed=8))
    assert torch.equal(prompt(inlay, base()), prompt(inlay, base()))


def test_the_dtype_policy(base):
    half = base().bfloat16()
    config = inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = inlay.get_peft_model(half, config)
    assert inlay.get_peft_model_state_dict(model)["prompt_embeddings"].dtype == torch.float32
    assert model(torch.tensor([[3, 4]])).logits.dtype == torch.bfloat16
    model = inlay.get_peft_model(base().bfloat16(), inlay.PromptTuningConfig(num_virtual_tokens=4), autocast_adapter_dtype=False)
    assert inlay.get_peft_model_state_dict(model)["prompt_embeddings"].dtype == torch.bfloat16


def test_the_configuration_goes_round(tmp_path):
    config = inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, prompt_tuning_init="SAMPLE_VOCAB")
    assert inlay.PromptTuningConfig(**config.to_dict()) == config
    config.save_pretrained(tmp_path)
    assert inlay.PeftConfig.from_pretrained(tmp_path) == config
    plain = json.loads((tmp_path / "adapter_config.json").read_text())
    assert plain["prompt_tuning_init"] == "SAMPLE_VOCAB"
    assert "seed" not in plain
    assert type(peft.PeftConfig.from_pretrained(tmp_path)).__name__ == "PromptTuningConfig"
    config.seed = 3
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["seed"] == 3
    assert config.is_prompt_learning
    assert CONFIGS["PROMPT_TUNING"] is inlay.PromptTuningConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompt_tuning_init": "TXT"}, "prompt_tuning_init='TXT' is unknown. Did you mean 'TEXT'"),
        ({"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x"}, "needs `tokenizer_name_or_path`"),
        ({"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": "x"}, "needs `prompt_tuning_init_text`"),
        ({"tokenizer_kwargs": {"use_fast": True}}, "`tokenizer_kwargs` are for prompt_tuning_init='TEXT'"),
        ({"task_type": "CAUSAL"}, "Did you mean 'CAUSAL_LM'"),
    ],
)
def test_wrong_configurations(options, message):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        inlay.PromptTuningConfig(num_virtual_tokens=4, **options)


def test_configurations_that_do_not_fit_a_base(base, tokenizer):
    model = base()
    names, trainable = [n for n, _ in model.named_modules()], [q.requires_grad for q in model.parameters()]
    text = {"prompt_tuning_init": "TEXT", "tokenizer_name_or_path": str(tokenizer)}
    for options, message in [
        ({"num_virtual_tokens": None}, "num_virtual_tokens=None: say how many"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens=0: say how many"),
        ({"token_dim": 48}, "token_dim=48, but the base asks for 32"),
        ({"modules_to_save": ["lm_haed"]}, "no module 'lm_haed'.*Did you mean 'lm_head'"),
        ({"prompt_tuning_init_text": " ", **text}, "makes no token of prompt_tuning_init_text"),
    ]:
        with pytest.raises(ValueError, match=message):
            inlay.get_peft_model(model, inlay.PromptTuningConfig(**({"num_virtual_tokens": 4} | options)))
    with pytest.raises(ValueError, match="no embedding of input tokens"):
        inlay.get_peft_model(torch.nn.Linear(2, 2), inlay.PromptTuningConfig(num_virtual_tokens=4))
    assert [n for n, _ in model.named_modules()] == names
    assert [q.requires_grad for q in model.parameters()] == trainable
    assert "_inlay_session" not in vars(model)


def test_a_tokenizer_with_more_words_than_the_base(bases, tokenizer):
    small = bases["llama"][1]()
    small.resize_token_embeddings(6)
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "yes no", "tokenizer_name_or_path": str(tokenizer)}
    with pytest.raises(ValueError, match="makes token 9 of prompt_tuning_init_text, and the base knows 6"):
        prompt(inlay, small, **options)


def test_code_of_a_repository_is_run_for_its_user_alone(base, tokenizer, tmp_path, monkeypatch):
    """Neither a tokenizer's folder nor an adapter's file can have code run; the user's own word can."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "code ran"
    code = ["from transformers import PreTrainedTokenizerFast as Base", f"open({str(marker)!r}, 'w').close()", "class Own(Base): pass"]
    (tokenizer / "own.py").write_text("\n".join(code))
    settings = tokenizer / "tokenizer_config.json"
    plain = json.loads(settings.read_text()) | {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", "own.Own"]}}
    settings.write_text(json.dumps(plain))
    options = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "yes no", "tokenizer_name_or_path": str(tokenizer)}
    with pytest.raises(ValueError, match="trust_remote_code"):
        prompt(inlay, base(), **options)
    assert not marker.exists()

    config = inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, tokenizer_kwargs={"trust_remote_code": True}, **options)
    model = inlay.get_peft_model(base(), config)
    assert marker.exists()
    marker.unlink()
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["tokenizer_kwargs"] == {}
    assert config.tokenizer_kwargs == {"trust_remote_code": True}

    hostile = json.loads((tmp_path / "adapter/adapter_config.json").read_text()) | {"tokenizer_kwargs": {"trust_remote_code": True}}
    (tmp_path / "adapter/adapter_config.json").write_text(json.dumps(hostile))
    inlay.PeftModel.from_pretrained(base(), tmp_path / "adapter")
    inlay.PeftModel.from_pretrained(base(), tmp_path / "adapter", is_trainable=True)
    inlay.get_peft_model(base(), inlay.PeftConfig.from_pretrained(tmp_path / "adapter"))
    assert not marker.exists()
