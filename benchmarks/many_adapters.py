"""From one adapter to a thousand in one model: loading the next, switching between two and a forward pass, HF peft and Inlay.

The adapters are LoRA (r=4) on the query and value projections of a small Llama and are loaded from folders. HF peft tests every
module's name against every adapter, so that its own column ends where it would take minutes.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from _harness import arguments, report, torch_arguments
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

STEPS = (1, 100, 1000)
HF_STEPS = (1, 100)


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=256, intermediate_size=512, num_hidden_layers=12, num_attention_heads=4, vocab_size=512)
    return LlamaForCausalLM(config).eval()


def seconds(run: Callable[[], object], times: int) -> float:
    found = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return median(found)


def measure(library: Any, folder: Path, steps: tuple[int, ...], rounds: int) -> dict[int, dict[str, float]]:
    model = library.PeftModel.from_pretrained(base(), folder, adapter_name="a0")
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    found: dict[int, dict[str, float]] = {}
    loaded = 1
    for step in steps:
        while loaded < step:
            model.load_adapter(folder, f"a{loaded}")
            loaded += 1
        # The next one is loaded and taken out again.
        loads = []
        for i in range(3):
            start = time.perf_counter()
            model.load_adapter(folder, f"next{i}")
            loads.append(time.perf_counter() - start)
            model.delete_adapter(f"next{i}")
        names = [f"a{loaded - 1}", "a0"]

        def switch(names: list[str] = names) -> None:
            names.reverse()
            model.set_adapter(names[0])

        switches = seconds(switch, rounds)
        with torch.no_grad():
            forward = seconds(lambda: model(input_ids=ids), rounds)
        found[step] = {"load": median(loads), "switch": switches, "forward": forward}
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=21)
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as folder:
        config = inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inlay.get_peft_model(base(), config).save_pretrained(folder)
        mine = measure(inlay, Path(folder), STEPS, options.rounds)
        its = measure(peft, Path(folder), HF_STEPS, options.rounds)
    rows = []
    for step in STEPS:
        row: dict[str, Any] = {"loaded": step}
        for what in ("load", "switch", "forward"):
            row[f"{what} ms: Inlay"] = f"{1e3 * mine[step][what]:.2f}"
            row[f"{what} ms: HF"] = f"{1e3 * its[step][what]:.2f}" if step in its else "-"
        rows.append(row)
    report("Adapters loaded in one model (Llama, hidden 256, 12 layers, LoRA r=4 on q_proj and v_proj)", rows, options.json)


if __name__ == "__main__":
    main()
