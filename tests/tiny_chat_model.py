"""A random Llama of 20,000 parameters with a byte-level tokenizer, for tests that need a model rather than a good one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from .tiny import llama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Shows the thoughts of the last answer only, as reasoning models' templates do: the rendering of a longer conversation does not
# begin with the one of a shorter.
FORGETFUL = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FORGETFUL_WITH_MARKS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{% if loop.last %}<think></think>{% endif %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(template: str | None = CHATML, merges: tuple[tuple[str, str], ...] = ()) -> Any:
    """One token a byte (plus ``merges``), three special tokens; so a test can count tokens as characters."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<|pad|>", "<|im_start|>", "<|im_end|>", *alphabet, *(first + second for first, second in merges)]
    bpe = models.BPE(vocab={word: number for number, word in enumerate(words)}, merges=list(merges))
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|pad|>", additional_special_tokens=["<|im_start|>"]
    )
    made.chat_template = template
    return made


def make_model(vocabulary: int, tied: bool = True) -> Any:
    """Random, in eval mode. With tied embeddings it repeats itself."""
    special = {"bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0}
    return llama(seed=0, vocab_size=vocabulary, max_position_embeddings=256, tie_word_embeddings=tied, **special)


def save(folder: Path) -> Path:
    """A model folder."""
    tokenizer = make_tokenizer()
    make_model(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    """For a process of its own: offline, one thread, a terminal of 120 columns."""
    return {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120", "OMP_NUM_THREADS": "1"}


def rows(count: int, first: int = 0) -> str:
    """JSON lines of questions and answers."""
    pairs = ({"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(first, first + count))
    return "".join(json.dumps(pair) + "\n" for pair in pairs)
