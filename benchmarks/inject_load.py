"""Setting adapters into a model, saving, loading and switching them: HF peft and Inlay.

The model has the modules of a 32-layer Llama and tensors of hardly any size, so what is measured is the work per module.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import torch
from _harness import arguments, report, torch_arguments
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

LIBRARIES = {"HF": peft, "Inlay": inlay}


def base() -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=32, num_attention_heads=4, vocab_size=64, initializer_range=0.1
    )
    return LlamaForCausalLM(config)


def lora(library: Any) -> Any:
    return library.LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")


def life(library: Any, adapters: int, clock: Callable[[], float]) -> dict[str, float]:
    """Seconds of each stage in the life of one model."""
    found: dict[str, float] = {}
    model = base()

    def stage(name: str, run: Callable[[], Any]) -> Any:
        start = clock()
        result = run()
        found[name] = clock() - start
        return result

    wrapped = stage("inject", lambda: library.get_peft_model(model, lora(library)))
    with tempfile.TemporaryDirectory() as folder:
        stage("save", lambda: wrapped.save_pretrained(folder))
        fresh = base()
        loaded = stage("load adapter 1", lambda: library.PeftModel.from_pretrained(fresh, folder, adapter_name="a1"))
        for i in range(2, adapters + 1):
            stage(f"load adapter {i}", lambda i=i: loaded.load_adapter(folder, adapter_name=f"a{i}"))
    stage("switch", lambda: loaded.set_adapter("a2"))
    stage("merge", lambda: loaded.merge_adapter())
    stage("unmerge", lambda: loaded.unmerge_adapter())
    stage("delete", lambda: loaded.delete_adapter("a1"))
    stage("unload", lambda: loaded.unload())
    return found


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--adapters", type=int, default=50, help="how many to load into one model")
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.process_time if options.cpu_time else time.perf_counter
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in LIBRARIES}
    for i in range(options.rounds + 1):
        for name, library in LIBRARIES.items() if i % 2 else reversed(LIBRARIES.items()):
            found = life(library, options.adapters if i else 2, clock)
            if i:
                # The first, short round is for warming up.
                runs[name].append(found)
    last = options.adapters
    stages = [s for s in runs["HF"][0] if not s.startswith("load") or int(s.split()[-1]) in (1, 2, last)]
    rows = []
    for stage in stages:
        hf, ours = (median(run[stage] for run in runs[name]) for name in ("HF", "Inlay"))
        rows.append({"stage": stage, "HF ms": f"{1e3 * hf:.1f}", "Inlay ms": f"{1e3 * ours:.1f}", "HF / Inlay": f"{hf / ours:.1f}"})
    report("A 32-layer Llama of tiny tensors, LoRA on its 224 linear layers", rows, options.json)


if __name__ == "__main__":
    main()
