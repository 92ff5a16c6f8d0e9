"""Weights in 4 bits: their bytes, quantising and dequantising against bitsandbytes, and a QLoRA step against HF peft with it.

The model is a small Llama with random weights, every linear layer of its blocks adapted, one step of 1024 tokens: forward, backward
and AdamW. The floor of the step is Inlay's own LoRA on the dense model. Peak memory is that of a fresh process that loads the dense
folder quantised and makes a step. Last, the bundled base is trained on the quickstart's data, dense and in NF4 with LoRA started in
each way.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Any

import bitsandbytes.functional as bnb
import torch
from _harness import arguments, in_fresh_process, interleave, ratio, report, torch_arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.kernels.quantised_tensor import QuantizedTensor
from inlay.training.data import read
from inlay.training.evaluate import perplexity, score
from inlay.training.masking import Encoded, Encoder
from inlay.training.models import bundled_base, bundled_data, load_model, load_tokenizer

HIDDEN, LAYERS, TOKENS, VOCABULARY = 512, 4, 1024, 2048
SHAPE = (4096, 2048)

MEMORY = """
import json, sys, torch
library, folder = sys.argv[1:]

def peak():  # of this program; getrusage would tell that of its parent, if that was larger
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1e3

torch.set_num_threads(1)
if library == "inlay":
    import inlay as peft
    base = peft.from_pretrained_quantized(folder, "nf4", dtype=torch.float32)
else:
    import peft
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig
    options = {} if library == "dense" else {"quantization_config": BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32)}
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
loaded = peak()
model = peft.get_peft_model(base, peft.LoraConfig(r=8, target_modules="all-linear")).train()
optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad])
ids = torch.randint(0, 2048, (1, 1024))
model(input_ids=ids, labels=ids).loss.backward()
optimizer.step()
print(json.dumps({"loaded": loaded, "peak": peak()}))
"""


def save_base(folder: str) -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=1408,
        num_hidden_layers=LAYERS,
        num_attention_heads=8,
        vocab_size=VOCABULARY,
        use_cache=False,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def stepper(library: Any, base: Any) -> Callable[[], object]:
    model = library.get_peft_model(base, library.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")).train()
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-4)
    ids = torch.randint(0, VOCABULARY, (1, TOKENS), generator=torch.Generator().manual_seed(1))

    def step() -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def codes(rounds: int, cpu_time: bool) -> list[dict[str, Any]]:
    """Quantising and dequantising one matrix."""
    w = torch.randn(SHAPE) * 0.02
    ours = QuantizedTensor.of(w, "nf4")
    theirs = bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)
    if not torch.equal(ours.dequantize(), bnb.dequantize_4bit(*theirs)):
        raise RuntimeError("the two give different numbers")
    variants = {
        "quantise": (lambda: QuantizedTensor.of(w, "nf4"), lambda: bnb.quantize_4bit(w, quant_type="nf4", compress_statistics=True)),
        "dequantise": (ours.dequantize, lambda: bnb.dequantize_4bit(*theirs)),
    }
    rows = []
    for name, (mine, other) in variants.items():
        times = interleave({"inlay": mine, "bitsandbytes": other}, rounds, cpu_time)
        size = w.numel() * w.element_size() / 1e9
        rows.append(
            {"what": name}
            | {f"{who} GB/s": round(size / median(times[who]), 2) for who in times}
            | {"times faster": round(ratio(times, "bitsandbytes", "inlay"), 2)}
        )
    return rows


# ---- what is learned ------------------------------------------------------------------------------------------------------
def encoded(name: str) -> list[Encoded]:
    return Encoder(load_tokenizer("bundled")).encode_all(read(bundled_data(name)).samples, 256).rows


def together(rows: list[Encoded]) -> dict[str, torch.Tensor]:
    """One batch, padded at the end."""
    longest = max(len(row.input_ids) for row in rows)
    pads = {"input_ids": 0, "labels": -100}
    batch = {key: torch.tensor([getattr(r, key) + [pad] * (longest - len(r.input_ids)) for r in rows]) for key, pad in pads.items()}
    return batch | {"attention_mask": (torch.arange(longest) < torch.tensor([[len(r.input_ids)] for r in rows])).long()}


def held_out_loss(model: Any, rows: list[Encoded]) -> float:
    """A token, over all answers."""
    return math.log(perplexity(score(model, rows)))


def apart(model: Any, dense: Any, rows: list[Encoded]) -> float:
    """The mean divergence of the next-token distributions, over all tokens of the answers."""
    batch = together(rows)
    with torch.no_grad():
        logs = [torch.log_softmax(m.eval()(**batch).logits[:, :-1][batch["labels"][:, 1:] != -100].double(), -1) for m in (dense, model)]
    return float(torch.nn.functional.kl_div(logs[1], logs[0], log_target=True, reduction="batchmean"))


def started(start: str, seed: int, rows: list[Encoded]) -> Any:
    base = load_model("bundled", "float32", "cpu", quantization="none" if start == "dense" else "nf4")
    model = inlay.get_peft_model(base, inlay.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", seed=seed))
    if start == "LoftQ":
        inlay.replace_lora_weights_loftq(model, bundled_base())
    elif start.startswith("CLoQ"):
        data = [together(rows[i : i + 16]) for i in range(0, 256, 16)] if start == "CLoQ, data" else None
        inlay.initialize_lora_cloq_weights(model, bundled_base(), data)
    return model


def train(model: Any, seed: int, steps: int, rows: list[Encoded]) -> None:
    """With the quickstart's settings."""
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=3e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        chosen = torch.randperm(len(rows), generator=order)[:16].tolist()
        model(**together([rows[i] for i in chosen])).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        schedule.step()


def losses(steps: int, seeds: int) -> list[dict[str, Any]]:
    rows, held_out = encoded("commands"), encoded("commands_heldout")
    dense = load_model("bundled", "float32", "cpu")
    found = []
    for start in ("dense", "plain", "LoftQ", "CLoQ, own samples", "CLoQ, data"):
        before, after, divergence = 0.0, [], 0.0
        for seed in range(seeds):
            model = started(start, seed, rows)
            before, divergence = held_out_loss(model, held_out), apart(model, dense, held_out)
            train(model, seed, steps, rows)
            after.append(held_out_loss(model, held_out))
        found.append(
            {
                "base": "dense" if start == "dense" else "nf4",
                "start": "plain" if start == "dense" else start,
                "divergence from dense at the start": round(divergence, 5),
                "loss at the start": round(before, 4),
                "after": round(mean(after), 4),
                "smallest to largest": f"{min(after):.4f} to {max(after):.4f}",
            }
        )
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    torch_arguments(parser)
    parser.add_argument("--steps", type=int, default=190, help="of training, for the losses")
    parser.add_argument("--seeds", type=int, default=1, help="of training, for the losses")
    parser.add_argument("--only", choices=["speed", "losses"], help="one part of it")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.only != "losses":
        speed(options)
    if options.only != "speed":
        rows = losses(options.steps, options.seeds)
        notes = [f"Means over {options.seeds} seeds of the adapter's start and of the order of rows; 16 rows a step."]
        title = f"Loss a token on the quickstart's held-out rows, before and after {options.steps} steps of LoRA (r=16, all linear layers)"
        report(title, rows, options.json, notes)


def speed(options: Any) -> None:
    rows = codes(options.rounds, options.cpu_time)
    report("One matrix (4096 x 2048) to NF4 with double quantisation and back", rows, options.json)

    import peft

    with tempfile.TemporaryDirectory() as folder:
        save_base(folder)
        dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        own = inlay.from_pretrained_quantized(folder, "nf4", dtype=torch.float32)
        quantised = [q for q in own.parameters() if isinstance(q, QuantizedTensor)]
        per_parameter = sum(q.stored_bytes for q in quantised) / sum(q.numel() for q in quantised)
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
        )
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, quantization_config=config)
        steps = {"dense": stepper(inlay, dense), "inlay": stepper(inlay, own), "hf": stepper(peft, theirs)}
        times = interleave(steps, options.rounds, options.cpu_time, warmup=1)
        memory = {who: in_fresh_process(MEMORY, who, str(Path(folder))) for who in ("dense", "bitsandbytes", "inlay")}
    step = {f"{one} / {other}": round(ratio(times, one, other), 3) for one, other in (("inlay", "dense"), ("hf", "dense"), ("hf", "inlay"))}
    notes = [
        "dense: Inlay's LoRA on the model in float32; hf: HF peft on bitsandbytes' layers.",
        f"Quantised weights take {per_parameter:.4f} bytes per parameter.",
    ]
    report("A training step of 1024 tokens", [step], options.json, notes)
    found = [{"base": who} | {f"{k}, MB": round(v) for k, v in each.items()} for who, each in memory.items()]
    report("Peak resident memory of a process that loads the dense folder and makes a step", found, options.json)


if __name__ == "__main__":
    main()
