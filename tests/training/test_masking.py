"""Only the answers carry the loss: counted by hand with a tokenizer of one token a byte, and refused when it cannot be proved."""

from __future__ import annotations

from typing import Any

import pytest

from inlay.training.data import Sample
from inlay.training.errors import InputError
from inlay.training.masking import IGNORED, Encoded, Encoder, MaskError, apply_template_choice

from ..tiny_chat_model import FORGETFUL, FORGETFUL_WITH_MARKS, make_tokenizer

END, START = 2, 1


def dialogue(*turns: str, where: str = "rows.jsonl:7") -> Sample:
    """User and assistant in turn."""
    return Sample(where, [{"role": ("user", "assistant")[number % 2], "content": text} for number, text in enumerate(turns)])


def trained_text(tokenizer: Any, row: Encoded) -> str:
    return tokenizer.decode([label for label in row.labels if label != IGNORED])


def test_the_answer_and_its_end_token_are_trained_and_nothing_else(tokenizer: Any) -> None:
    row, way = Encoder(tokenizer).encode(dialogue("Hi", "Yes."))
    # <|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n
    assert len(row.input_ids) == (1 + 5 + 2 + 1 + 1) + (1 + 10) + (4 + 1) + 1
    assert row.trained == 4 + 1
    assert row.labels[21:26] == row.input_ids[21:26]
    assert row.labels[:21] == [IGNORED] * 21
    assert row.labels[26] == IGNORED  # the line break behind the end token
    assert row.input_ids[25] == END
    assert way == "prefixes"


def test_all_answers_of_a_conversation_are_trained(tokenizer: Any) -> None:
    row, _ = Encoder(tokenizer).encode(dialogue("a", "first", "b", "second"))
    assert trained_text(tokenizer, row) == "first<|im_end|>second<|im_end|>"
    assert row.trained == (5 + 1) + (6 + 1)


def test_train_on_all_masks_nothing(tokenizer: Any) -> None:
    row, _ = Encoder(tokenizer, "all").encode(dialogue("Hi", "Yes."))
    assert row.labels == row.input_ids


def test_text_is_trained_through_an_end_token(tokenizer: Any) -> None:
    row, way = Encoder(tokenizer).encode(Sample("rows.jsonl:1", text="abc"))
    assert way == "text"
    assert row.labels == row.input_ids == [*tokenizer("abc")["input_ids"], END]


@pytest.mark.parametrize(("choice", "prompt"), [("auto", "### Instruction:\nHi\n\n### Response:\n"), ("none", "Hi")])
def test_without_a_template_prompt_and_answer_still_part(choice: str, prompt: str) -> None:
    tokenizer = make_tokenizer(template=None)
    apply_template_choice(tokenizer, choice)
    row, _ = Encoder(tokenizer).encode(dialogue("Hi", "Yes."))
    assert tokenizer.decode(row.input_ids) == f"{prompt}Yes.<|im_end|>"
    assert trained_text(tokenizer, row) == "Yes.<|im_end|>"
    assert len(row.input_ids) - row.trained == len(prompt)


def test_a_token_across_the_border_is_split_there() -> None:
    tokenizer = make_tokenizer(merges=(("Ċ", "Ċ"),))  # two line breaks are one token
    row, _ = Encoder(tokenizer).encode(dialogue("Hi", "\nYes."))
    assert trained_text(tokenizer, row) == "\nYes.<|im_end|>"
    assert row.trained == 6
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert row.input_ids[:21] == tokenizer(prompt, add_special_tokens=False)["input_ids"]  # as a server would encode the prompt


def test_tokenizers_that_mark_spaces_or_change_letters_are_masked_the_same() -> None:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    template = (
        "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }} </s>{% endif %}{% endfor %}"
    )
    corpus = ["Say 1. It is 1. [INST] [/INST] the quick brown Fox </s>"]
    spaces = Tokenizer(models.BPE(unk_token="<unk>"))
    spaces.pre_tokenizer, spaces.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spaces.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=100, special_tokens=["<unk>", "</s>"], show_progress=False))
    pieces = Tokenizer(models.WordPiece(unk_token="<unk>"))
    pieces.normalizer, pieces.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    pieces.decoder = decoders.WordPiece()
    pieces.train_from_iterator(corpus, trainers.WordPieceTrainer(vocab_size=100, special_tokens=["<unk>", "</s>"], show_progress=False))
    for raw, wanted in ((spaces, "It is 1 ? </s>Fox</s>"), (pieces, "it is 1 ? </s>fox</s>")):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>", unk_token="<unk>", pad_token="</s>")
        tokenizer.chat_template = template
        row, _ = Encoder(tokenizer).encode(dialogue("Say 1.", "It is 1 漢", "The quick?", "Fox"))  # one character is unknown
        assert "".join(trained_text(tokenizer, row).replace("<unk>", "?").split()) == "".join(wanted.split())
        assert row.labels[-1] == tokenizer.eos_token_id


def test_a_template_that_rewrites_earlier_turns_is_refused_with_the_sample_named() -> None:
    encoder = Encoder(make_tokenizer(FORGETFUL))
    assert encoder.encode(dialogue("a", "one"))[0].trained == len("<think></think>one") + 1
    with pytest.raises(InputError, match=r"rows\.jsonl:7: the chat template renders turn 2 differently .* \(--chat-template FILE"):
        encoder.encode(dialogue("a", "one", "b", "two"))


def test_its_generation_marks_help_where_it_has_them() -> None:
    tokenizer = make_tokenizer(FORGETFUL_WITH_MARKS)
    row, way = Encoder(tokenizer).encode(dialogue("a", "one", "b", "two"))
    assert way == "generation marks"
    assert trained_text(tokenizer, row) == "one<|im_end|>two<|im_end|>"
    assert row.trained == 8


def test_a_template_that_drops_the_answer_is_refused() -> None:
    template = "{% for m in messages %}{{ m.role }}:{{ m.content if m.role == 'user' else '...' }}\n{% endfor %}"
    with pytest.raises(InputError, match=r"rows\.jsonl:7: the unmasked tokens do not contain the answer 'Yes\.'"):
        Encoder(make_tokenizer(template)).encode(dialogue("Hi", "Yes."))


def test_a_template_that_refuses_the_roles_is_named() -> None:
    template = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}"
    sample = Sample("rows.jsonl:3", [{"role": "system", "content": "s"}, *dialogue("a", "b").messages])
    with pytest.raises(InputError, match=r"rows\.jsonl:3: the chat template refuses this conversation \(no system turns here\)"):
        Encoder(make_tokenizer(template)).encode(sample)


def test_verification_notices_a_label_too_few_and_one_too_many(tokenizer: Any) -> None:
    encoder, sample = Encoder(tokenizer), dialogue("Hi", "Yes.")
    row, _ = encoder.encode(sample)
    pieces = ["Yes.<|im_end|>"]
    encoder.verify(row, sample, pieces)
    without_first = [*row.labels[:21], IGNORED, *row.labels[22:]]
    with pytest.raises(MaskError, match="do not contain the answer"):
        encoder.verify(Encoded(row.input_ids, without_first), sample, pieces)
    with_prompt = [*row.labels[:6], *row.input_ids[6:8], *row.labels[8:]]
    with pytest.raises(MaskError, match="the unmasked tokens read 'HiYes"):
        encoder.verify(Encoded(row.input_ids, with_prompt), sample, pieces)


def test_long_rows_are_cut_and_counted_and_those_without_an_answer_left_out(tokenizer: Any) -> None:
    samples = [dialogue("Hi", "Yes."), dialogue("Hi", "y" * 30), dialogue("q" * 40, "Yes.", where="rows.jsonl:9")]
    result = Encoder(tokenizer).encode_all(samples, max_length=30)
    assert [len(row.input_ids) for row in result.rows] == [27, 30]
    assert [row.trained for row in result.rows] == [5, 9]
    assert result.rows[1].cut == 27 - 5 + 31 - 30
    assert result.dropped == ["rows.jsonl:9"]
    assert result.summary() == {
        "rows": 2,
        "tokens": 57,
        "trained_tokens": 14,
        "masked_tokens": 43,
        "cut_rows": 1,
        "dropped_rows": 1,
    }


def test_generation_stops_where_the_answers_end(tokenizer: Any) -> None:
    encoder = Encoder(tokenizer)
    row, _ = encoder.encode(dialogue("Hi", "Yes."))
    assert encoder.stop_tokens([row]) == [END]
    ended_by_start = Encoded([5, START], [IGNORED, START])  # a family whose turns end in another special token than eos
    assert encoder.stop_tokens([row, ended_by_start]) == [START, END]
