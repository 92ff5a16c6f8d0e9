"""What `inlay plan` says a training step needs, against the peak of a real one on the CPU.

    python benchmarks/plan.py [--cases LoRA DoRA] [--threads 1] [--json]

A case is planned here, and run in a process of its own: two steps on random tokens with the real optimiser. Measured is the most
memory that the process had in them, less what it had before there was a model. glibc is told to give every large block back when it
is freed, so that the figure is of what is in use and not of what the allocator keeps.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _harness import report

LLAMA = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 4, "num_attention_heads": 8}
SMALL_HEAD, LARGE_HEAD = {"vocab_size": 8192}, {"vocab_size": 32000}
LORA = {"r": 16, "target_modules": "all-linear"}
GPT2 = {"n_embd": 512, "n_layer": 4, "n_head": 8, "vocab_size": 8192}
BERT = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "intermediate_size": 2048}
NO_DROPOUT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}

# Name: class of the model's config and its fields, class of the adapter's and its fields, the setting.
CASES: dict[str, tuple[str, dict[str, Any], str | None, dict[str, Any], dict[str, Any]]] = {
    "LoRA": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {}),
    "LoRA, SGD": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA | {"r": 256}, {"optimizer": "sgd"}),
    "LoRA r=256": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA | {"r": 256}, {}),
    "LoRA, dropout": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA | {"lora_dropout": 0.1}, {}),
    "LoRA, checkpointing": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"gradient_checkpointing": True}),
    "LoRA, padded rows": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"padding": True}),
    "LoRA, bfloat16": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"dtype": "bfloat16", "autocast": False}),
    "LoRA, 32,000 tokens": ("Llama", LLAMA | LARGE_HEAD, "Lora", LORA, {}),
    "LoRA, nf4": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"quantization": "nf4"}),
    "LoRA, nf4, checkpointing": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"quantization": "nf4", "gradient_checkpointing": True}),
    "LoRA, int8": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA, {"quantization": "int8"}),
    "DoRA": ("Llama", LLAMA | SMALL_HEAD, "Lora", LORA | {"use_dora": True}, {}),
    "BOFT": ("Llama", LLAMA | SMALL_HEAD, "BOFT", {"boft_block_size": 4, "target_modules": "all-linear"}, {}),
    "IA3": ("Llama", LLAMA | SMALL_HEAD, "IA3", {}, {}),
    "prompt tuning, 32,000 tokens": ("Llama", LLAMA | LARGE_HEAD, "PromptTuning", {"num_virtual_tokens": 20}, {}),
    "whole model, AdamW": ("Llama", LLAMA | SMALL_HEAD, None, {}, {}),
    "whole model, SGD": ("Llama", LLAMA | SMALL_HEAD, None, {}, {"optimizer": "sgd"}),
    "GPT-2, LoRA": ("GPT2", GPT2, "Lora", {"r": 16, "target_modules": ["c_attn", "c_proj", "c_fc"]}, {}),
    "BERT, LoRA": ("Bert", BERT | NO_DROPOUT, "Lora", {"r": 16, "target_modules": "all-linear", "task_type": "SEQ_CLS"}, {"batch_size": 8}),
}
COMMON = {"batch_size": 4, "dtype": "float32", "device": "cpu", "padding": False}


def made(case: str, seq_length: int) -> tuple[Any, Any, dict[str, Any]]:
    """The model's config, the adapter's config and the setting of a case."""
    import transformers

    import inlay

    model, its, method, fields, setting = CASES[case]
    config = None if method is None else getattr(inlay, f"{method}Config")(**{"task_type": "CAUSAL_LM", **fields})
    return getattr(transformers, f"{model}Config")(**its), config, COMMON | setting | {"seq_length": seq_length}


# ---- the real step ------------------------------------------------------------------------------------------------------------------
def memory(what: str) -> int:
    """``VmRSS`` or ``VmHWM`` of this process, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(what))
    return int(line.split()[1]) * 1024


def step(case: str, seq_length: int) -> int:
    """The most memory that this process has in two steps, less what it had before."""
    import torch
    import transformers

    import inlay
    from inlay import planning

    torch.manual_seed(0)
    config, adapter, setting = made(case, seq_length)
    planning.plan(_tiny(config), _copy(adapter), **setting)  # imports what will be imported
    optimizer_class = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[setting.get("optimizer", "adamw")]
    for dtype in (torch.float32, torch.bfloat16):
        w = torch.randn(256, 256, dtype=dtype, requires_grad=True)
        (w @ w).sum().backward()
        optimizer_class([w], lr=1e-3).step()
    gc.collect()
    before = memory("VmRSS")
    kind = "AutoModelForSequenceClassification" if adapter and adapter.task_type == "SEQ_CLS" else "AutoModelForCausalLM"
    base = getattr(transformers, kind).from_config(config, dtype=planning.DTYPES[setting["dtype"]])
    if setting.get("quantization"):
        inlay.quantize_(base, setting["quantization"])
    if setting.get("gradient_checkpointing"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = base if adapter is None else inlay.get_peft_model(base, adapter)
    model.train()
    trained = [q for q in model.parameters() if q.requires_grad]
    optimizer = optimizer_class(trained, lr=1e-4)
    shape = setting["batch_size"], seq_length
    batch = {"input_ids": torch.randint(0, config.vocab_size, shape)}
    batch["labels"] = batch["input_ids"] if kind == "AutoModelForCausalLM" else torch.zeros(shape[0], dtype=torch.long)
    if setting["padding"]:
        batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        batch["attention_mask"][0, shape[1] // 2 :] = 0
    options = {"use_cache": False} if kind == "AutoModelForCausalLM" else {}
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    for _ in range(2):
        output = model(**batch, **options)
        output.loss.backward()
        del output
        optimizer.step()
        optimizer.zero_grad()
    return memory("VmHWM") - before


def _tiny(config: Any) -> Any:
    small = {"hidden_size": 48, "num_hidden_layers": 1, "n_layer": 1, "intermediate_size": 64, "vocab_size": 64}
    return type(config).from_dict(config.to_dict() | {k: v for k, v in small.items() if hasattr(config, k)})


def _copy(config: Any) -> Any:
    import copy

    return copy.deepcopy(config)


# ---- side by side -------------------------------------------------------------------------------------------------------------------
def measured(cases: list[str], seq_length: int, threads: int) -> list[int]:
    """The peaks of one process that runs these cases one after the other."""
    own = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(threads)}
    words = [sys.executable, __file__, "--run", "--seq-length", str(seq_length), "--threads", str(threads), "--cases", *cases]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, **own})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="which ones")
    parser.add_argument("--seq-length", type=int, default=512, help="tokens of a row")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--one-process", action="store_true", help="for all cases: quicker, and less exact")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--run", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        import torch

        torch.set_num_threads(given.threads)
        print(json.dumps([step(case, given.seq_length) for case in given.cases]))
        return
    from inlay.planning import plan

    together = measured(given.cases, given.seq_length, given.threads) if given.one_process else []
    rows = []
    for number, case in enumerate(given.cases):
        model, config, setting = made(case, given.seq_length)
        planned = plan(model, config, **setting)
        real = together[number] if together else measured([case], given.seq_length, given.threads)[0]
        largest = sorted(planned.items.items(), key=lambda item: -item[1])[:3]
        rows.append(
            {
                "case": case,
                "planned": f"{planned.bytes / 1e6:,.0f} MB",
                "measured": f"{real / 1e6:,.0f} MB",
                "off by": f"{100 * (planned.bytes / real - 1):+.1f} %",
                "peak in the": planned.during,
                "of it": ", ".join(f"{name} {size / 1e6:,.0f}" for name, size in largest),
            }
        )
        print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
    report(f"A training step of 4 x {given.seq_length} tokens: planned, and measured on the CPU", rows, given.json)


if __name__ == "__main__":
    main()
