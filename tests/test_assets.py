"""The bundled base model and data: what the quickstart stands on."""

import json
import math
import re
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent.parent / "src" / "inlay" / "assets"
BASE = ASSETS / "base"


def read_pairs(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (ASSETS / "data" / name).read_text().splitlines()]


TRAINING = read_pairs("commands.jsonl")
HELD_OUT = read_pairs("commands_heldout.jsonl")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32).eval()


def chat(pair: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": pair["instruction"]}, {"role": "assistant", "content": pair["output"]}]


def words_of(pair: dict[str, str]) -> set[str]:
    return set(re.findall(r"[\w./-]*\w", pair["instruction"].lower()))


def test_data_has_the_promised_number_of_well_formed_pairs() -> None:
    assert len(TRAINING) >= 400
    assert len(HELD_OUT) == 60
    for pair in TRAINING + HELD_OUT:
        assert set(pair) == {"instruction", "output"}
        assert all(text and text == text.strip() and "\n" not in text for text in pair.values())


def test_no_instruction_is_in_the_data_twice() -> None:
    instructions = [pair["instruction"].lower().rstrip(".?! ") for pair in TRAINING + HELD_OUT]
    assert len(set(instructions)) == len(instructions)


def test_held_out_instructions_have_other_wordings_than_the_training_ones() -> None:
    for held_out in HELD_OUT:
        for training in TRAINING:
            here, there = words_of(held_out), words_of(training)
            assert len(here & there) / len(here | there) < 0.8, (held_out, training)


def test_hardly_any_held_out_command_is_a_training_command() -> None:
    training_commands = {pair["output"] for pair in TRAINING}
    assert sum(pair["output"] in training_commands for pair in HELD_OUT) <= 5


@pytest.mark.parametrize("pairs", [TRAINING, HELD_OUT], ids=["training", "held-out"])
def test_every_command_is_valid_shell_syntax(pairs: list[dict[str, str]]) -> None:
    for pair in pairs:
        checked = subprocess.run(["bash", "-n", "-c", pair["output"]], capture_output=True, text=True, check=False)
        assert checked.returncode == 0, (pair["output"], checked.stderr)


def test_base_folder_is_small_and_complete() -> None:
    names = {path.name for path in BASE.iterdir()}
    assert names == {
        "README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert sum(path.stat().st_size for path in BASE.iterdir()) <= 12_000_000


def test_parameter_count(model: PreTrainedModel) -> None:
    assert 3_000_000 <= model.num_parameters() <= 5_000_000


@pytest.mark.parametrize(
    "text", ["kubectl get pods -n shop", "  two  spaces,\n\ta tab and 1234", "naïve café — 日本 🚀", *(pair["output"] for pair in HELD_OUT)]
)
def test_tokenizer_gives_the_text_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens_agree_with_the_model(tokenizer: PreTrainedTokenizerFast, model: PreTrainedModel) -> None:
    for config in (model.config, model.generation_config):
        assert config.bos_token_id == tokenizer.bos_token_id
        assert config.eos_token_id == tokenizer.eos_token_id
        assert config.pad_token_id == tokenizer.pad_token_id
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


def test_chat_template_writes_system_messages_and_the_generation_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "<|begin|><|system|>Be brief.<|end|><|user|>Hello<|end|><|assistant|>"


def test_chat_template_masks_exactly_the_answers_and_their_end(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [{"role": "system", "content": "Be brief."}, *chat(HELD_OUT[0]), *chat(HELD_OUT[1])]
    encoded = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    masked = [token for token, is_answer in zip(encoded["input_ids"], encoded["assistant_masks"], strict=True) if is_answer]
    assert tokenizer.decode(masked) == "".join(pair["output"] + tokenizer.eos_token for pair in HELD_OUT[:2])


def test_generation_prompt_is_a_prefix_of_the_whole_chat(tokenizer: PreTrainedTokenizerFast) -> None:
    for pair in HELD_OUT:
        prompt = tokenizer.apply_chat_template(chat(pair)[:1], add_generation_prompt=True, return_dict=True)["input_ids"]
        whole = tokenizer.apply_chat_template(chat(pair), return_dict=True)["input_ids"]
        assert whole[: len(prompt)] == prompt


def negative_log_likelihoods(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pair: dict[str, str]) -> torch.Tensor:
    encoded = tokenizer.apply_chat_template(chat(pair), return_assistant_tokens_mask=True, return_dict=True)
    tokens, is_answer = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["assistant_masks"]).bool()
    with torch.no_grad():
        scores = model(input_ids=tokens[None]).logits[0].log_softmax(-1)
    return -scores[:-1].gather(1, tokens[1:, None])[:, 0][is_answer[1:]]


def test_base_knows_something_of_the_held_out_commands_but_not_the_task(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    perplexity = math.exp(torch.cat([negative_log_likelihoods(model, tokenizer, pair) for pair in HELD_OUT]).mean())
    assert 2.0 < perplexity < 100.0


def test_base_explains_a_command_in_english(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    question = [{"role": "user", "content": "What does `kubectl get pods -n shop` do?"}]
    prompt = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_dict=True, return_tensors="pt")
    generated = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert generated[-1] == tokenizer.eos_token_id
    answer = tokenizer.decode(generated, skip_special_tokens=True)
    assert "pods" in answer
    assert "shop" in answer
