"""Weights in 4 bits: their bytes, quantising and dequantising against bitsandbytes, and a QLoRA step against HF peft with it.

The model is a small Llama with random weights, every linear layer of its blocks adapted, one step of 1024 tokens: forward, backward
and AdamW. The floor of the step is Inlay's own LoRA on the dense model. Peak memory is that of a fresh process that loads the dense
folder quantised and makes a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import bitsandbytes.functional as bnb
import torch
from _harness import arguments, in_fresh_process, interleave, ratio, report, torch_arguments
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import inlay
from inlay.kernels.quantised_tensor import QuantizedTensor

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


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
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
