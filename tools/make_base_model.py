"""Make the small base model that is bundled with Inlay.

The text comes from the grammar in base_corpus.py, and the tokenizer is trained on it too. The model starts with heads wired
to copy, practises copying on random tokens, and then reads the text. Everything is seeded, so the same versions on the same
kind of machine give the same model.

    python tools/make_base_model.py                           # the bundled model, about 20 minutes on one core
    python tools/make_base_model.py --quick --out /tmp/trial  # a minute, to see that it works
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import tokenizers
import torch
import transformers
from base_corpus import Corpus, Document
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ASSETS = Path(__file__).parent.parent / "src" / "inlay" / "assets"
PAD, BEGIN, END = "<|pad|>", "<|begin|>", "<|end|>"
ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
# Digits stand alone and never swallow the space before them, so that a number looks the same wherever it is copied to.
TOKEN_PATTERN = r"\p{N}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
VOCABULARY_SIZE = 2048
ROW_LENGTH, ROWS_PER_STEP = 256, 8
COPYING_STEPS, COPYING_ROW_LENGTH, COPYING_LEARNING_RATE = 250, 128, 5e-4
ATTENTION_LEARNING_RATE, MLP_LEARNING_RATE, EMBEDDING_LEARNING_RATE, HEAD_LEARNING_RATE = 6e-4, 4e-3, 3e-4, 2e-3
WARMUP_STEPS = 60
DECAY_SHARE = 0.5


def bundled_instructions() -> list[str]:
    """The instructions of the bundled fine-tuning data, none of which may occur in the text for the base model."""
    files = sorted((ASSETS / "data").glob("*.jsonl"))
    return [json.loads(line)["instruction"].lower().rstrip(".?!") for file in files for line in file.read_text().splitlines()]


def as_text(document: Document) -> str:
    if isinstance(document, str):
        return BEGIN + document + END
    return BEGIN + "".join(f"<|{message['role']}|>{message['content']}{END}" for message in document)


def corpus_texts(seed: int, forbidden: list[str]) -> Iterator[str]:
    for document in Corpus(seed).documents():
        text = as_text(document)
        lowered = text.lower()
        if not any(instruction in lowered for instruction in forbidden):
            yield text


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(TOKEN_PATTERN), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=[PAD, BEGIN, END, *ROLES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BEGIN,
        eos_token=END,
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def token_rows(tokenizer: PreTrainedTokenizerFast, texts: Iterator[str], rows: int) -> torch.Tensor:
    """Documents one after another, cut into rows of equal length."""
    wanted = rows * ROW_LENGTH
    stream: list[int] = []
    while len(stream) < wanted:
        batch = list(islice(texts, 1000))
        for encoding in tokenizer.backend_tokenizer.encode_batch(batch):
            stream.extend(encoding.ids)
    return torch.tensor(stream[:wanted], dtype=torch.int32).view(rows, ROW_LENGTH)


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY_SIZE,
            hidden_size=256,
            intermediate_size=640,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=64,
            max_position_embeddings=1024,
            rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


@torch.no_grad()
def wire_copying(model: LlamaForCausalLM) -> None:
    """Start with heads that copy, which would take far more text to form than one core reads in half an hour.

    Two heads of layer 0 look one and two tokens back and note a sketch (a random projection) of the token that stands there.
    A head of each of the next two layers looks for a place where the token before is the one at hand, and brings the token of
    that place to the output: having seen `pod web-0`, the next `pod` suggests `web`.
    """
    embedding, (noting, *finding) = model.model.embed_tokens.weight, [layer.self_attn for layer in model.model.layers[:3]]
    width, size = model.config.hidden_size, model.config.head_dim
    speeds = model.config.rope_parameters["rope_theta"] ** (-torch.arange(0, size, 2) / size)
    fast, slow = (speeds > 0.05).float(), (speeds < 0.015).nonzero()[:, 0]
    for layer in model.model.layers:
        layer.mlp.down_proj.weight *= 0.1
        layer.self_attn.o_proj.weight *= 0.1

    # Every embedding shares one direction, through which a head can attend by position alone.
    shared = 0.5 * embedding.std() * torch.randn(width).sign()
    embedding += shared
    by_position = shared * embedding.square().mean().sqrt() / shared.square().sum()
    sketch = torch.randn(size, width) / width**0.5
    sketch -= torch.outer(sketch @ shared, shared) / shared.square().sum()
    notes = torch.linalg.qr(torch.randn(width, 2 * size))[0].split(size, dim=1)
    noting.k_proj.weight[:size] = torch.outer(torch.cat([fast, 0 * fast]), by_position)
    noting.v_proj.weight[:size] = sketch
    for head, note in enumerate(notes):
        turn = speeds * (head + 1)
        head_rows = slice(head * size, (head + 1) * size)
        noting.q_proj.weight[head_rows] = 8 * torch.outer(torch.cat([fast * turn.cos(), -fast * turn.sin()]), by_position)
        noting.o_proj.weight[:, head_rows] = 0.05 * note

    # Only slowly turning dimensions compare contents over a distance.
    comparing = torch.cat([slow, slow + size // 2])
    for attention in finding:
        brought = torch.randn(size, width) / width**0.5
        attention.q_proj.weight[:size] = 0
        attention.q_proj.weight[comparing] = 2 * sketch[comparing]
        attention.k_proj.weight[:size] = 0
        attention.k_proj.weight[comparing] = 2 * notes[0].T[comparing]
        attention.v_proj.weight[:size] = brought
        attention.o_proj.weight[:, :size] = 0.3 * brought.T
    model.lm_head.weight.copy_(embedding)


def copying_row(rng: random.Random, length: int) -> list[int]:
    """Tokens drawn at random and repeated, where nothing but copying helps."""
    row: list[int] = []
    while len(row) < length:
        piece = [rng.randrange(len(ROLES) + 3, VOCABULARY_SIZE) for _ in range(rng.randint(3, 24))]
        row += [1, *piece * rng.randint(2, 4)]
    return row[:length]


def copying_rows(rows: int, length: int, seed: int) -> torch.Tensor:
    rng = random.Random(seed)
    return torch.tensor([copying_row(rng, length) for _ in range(rows)], dtype=torch.int32)


def copying_share(step: int, steps: int) -> float:
    """The part of the rows that keeps copying alive: much as long as the text is new, little in the end."""
    return max(0.0, 0.35 * (1 - 2 * step / steps))


def learning_rate_scale(step: int, steps: int) -> float:
    """Warm up, hold, and come down to zero over the last part of the training."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (steps * DECAY_SHARE))


def train_on(model: LlamaForCausalLM, batches: Sequence[torch.Tensor], optimizers: list[torch.optim.Optimizer]) -> None:
    """Take one step on each batch."""
    steps = len(batches)
    schedulers = [torch.optim.lr_scheduler.LambdaLR(each, lambda step: learning_rate_scale(step, steps)) for each in optimizers]
    started, smoothed = time.time(), math.nan
    for step, batch in enumerate(batches):
        loss = mean_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, scheduler in zip(optimizers, schedulers, strict=True):
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        smoothed = loss.item() if step == 0 else 0.95 * smoothed + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}/{steps}  loss {smoothed:.3f}  {time.time() - started:.0f} s", flush=True)


def learn_copying(model: LlamaForCausalLM, steps: int, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=COPYING_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.01)
    train_on(model, copying_rows(steps * ROWS_PER_STEP, COPYING_ROW_LENGTH, seed).split(ROWS_PER_STEP), [optimizer])


def learn_text(model: LlamaForCausalLM, rows: torch.Tensor, seed: int) -> None:
    """Read each row of text once, with rows for copying among them."""
    rng = random.Random(seed)
    steps = len(rows) // ROWS_PER_STEP
    mixed = rows.clone()
    for place in range(len(rows)):
        if rng.random() < copying_share(place // ROWS_PER_STEP, steps):
            mixed[place] = torch.tensor(copying_row(rng, ROW_LENGTH))
    matrices = [weight for layer in model.model.layers for weight in layer.mlp.parameters()]
    attention = [weight for layer in model.model.layers for weight in layer.self_attn.parameters()]
    norms = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": attention, "lr": ATTENTION_LEARNING_RATE},
        {"params": model.model.embed_tokens.parameters(), "lr": EMBEDDING_LEARNING_RATE},
        {"params": [*norms, model.lm_head.weight], "lr": HEAD_LEARNING_RATE},
    ]
    optimizers = [
        torch.optim.Muon(matrices, lr=MLP_LEARNING_RATE, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    train_on(model, mixed.split(ROWS_PER_STEP), optimizers)


def mean_loss(model: LlamaForCausalLM, batch: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=batch.long(), labels=batch.long()).loss


@torch.no_grad()
def validation_loss(model: LlamaForCausalLM, rows: torch.Tensor) -> float:
    return torch.stack([mean_loss(model, batch) for batch in rows.split(ROWS_PER_STEP)]).mean().item()


def readme(model: LlamaForCausalLM, steps: int, seed: int, loss: float) -> str:
    return f"""# Inlay base

A language model of {model.num_parameters() / 1e6:.2f} million parameters (Llama architecture) for trying out fine-tuning.
It has read English about shell and kubectl commands and some small chats, all made by a grammar of our own. It explains
commands, and it has not been taught to answer an instruction with a command. It is of no other use.

Three of its four layers begin with hand-made heads that copy, which training then refines on random tokens and on text;
they stand in for the long reading after which such heads form by themselves.

- Made by `python tools/make_base_model.py --steps {steps} --seed {seed}`
- {steps * ROWS_PER_STEP * ROW_LENGTH:,} tokens, each seen once; vocabulary of {VOCABULARY_SIZE} byte-level BPE tokens
- Loss on fresh text of the same grammar: {loss:.3f} (perplexity {math.exp(loss):.2f})
- Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__},
  tokenizers {tokenizers.__version__}
- Every text that holds an instruction of `assets/data`, from the training file or the held-out file, was left out

Licence: Apache-2.0
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ASSETS / "base", help="folder to write")
    parser.add_argument("--steps", type=int, default=1500, help="training steps of 2048 tokens")
    parser.add_argument("--quick", action="store_true", help="40 steps only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    steps = 40 if arguments.quick else arguments.steps
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(arguments.seed)

    forbidden = bundled_instructions()
    tokenizer = train_tokenizer(islice(corpus_texts(arguments.seed, forbidden), 20_000))
    rows = token_rows(tokenizer, corpus_texts(arguments.seed + 1, forbidden), steps * ROWS_PER_STEP)
    validation = token_rows(tokenizer, corpus_texts(arguments.seed + 2, forbidden), 8 * ROWS_PER_STEP)
    model = new_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, {rows.numel():,} tokens", flush=True)
    wire_copying(model)
    learn_copying(model, min(steps, COPYING_STEPS), arguments.seed)
    learn_text(model, rows, arguments.seed)
    loss = validation_loss(model, validation)
    print(f"validation loss {loss:.3f}")

    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(arguments.out)
    (arguments.out / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(arguments.out, save_jinja_files=False)
    (arguments.out / "README.md").write_text(readme(model, steps, arguments.seed, loss))


if __name__ == "__main__":
    main()
