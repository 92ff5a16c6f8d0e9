"""From one adapter to a thousand in one model: loading the next, switching between two and a forward pass, HF peft and Inlay.

The adapters are LoRA (r=4) on the query and value projections of a small Llama and are loaded from folders. HF peft tests every
module's name against every adapter, so that its own column ends where it would take minutes. All models are there at once and
take turns, so that what else the machine does meets all of them.
"""

from __future__ import annotations

import tempfile
import time
import warnings
from collections import defaultdict
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


def loaded(library: Any, folder: Path, count: int) -> Any:
    """A model with so many adapters."""
    model = library.PeftModel.from_pretrained(base(), folder, adapter_name="a0")
    for i in range(1, count):
        model.load_adapter(folder, f"a{i}")
    return model


def load(model: Any, folder: Path, clock: Callable[[], float]) -> float:
    """Seconds to load one more, which is taken out again."""
    start = clock()
    model.load_adapter(folder, "next")
    found = clock() - start
    model.delete_adapter("next")
    return found


def switch(model: Any, count: int, clock: Callable[[], float]) -> float:
    """Seconds to go over to the newest and back."""
    start = clock()
    model.set_adapter(f"a{count - 1}")
    model.set_adapter("a0")
    return (clock() - start) / 2


@torch.no_grad()
def forward(model: Any, ids: torch.Tensor, clock: Callable[[], float]) -> float:
    start = clock()
    model(input_ids=ids)
    return clock() - start


def main() -> None:
    parser = arguments(__doc__, rounds=15)
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    clock = time.process_time if options.cpu_time else time.perf_counter
    ids = torch.randint(0, 512, (1, 16), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        inlay.get_peft_model(base(), config).save_pretrained(folder)
        models = {("Inlay", n): loaded(inlay, folder, n) for n in STEPS} | {("HF", n): loaded(peft, folder, n) for n in HF_STEPS}
        times: dict[Any, list[float]] = defaultdict(list)
        for i in range(options.rounds + 1):
            # The first round warms up.
            for (library, n), model in list(models.items())[:: -1 if i % 2 else 1]:
                found = load(model, folder, clock), switch(model, n, clock), forward(model, ids, clock)
                for what, seconds in zip(("load", "switch", "forward"), found, strict=True):
                    if i:
                        times[library, n, what].append(seconds)
    rows = []
    for n in STEPS:
        row: dict[str, Any] = {"loaded": n}
        for what in ("load", "switch", "forward"):
            for library in ("Inlay", "HF"):
                known = times.get((library, n, what))
                row[f"{what} ms: {library}"] = f"{1e3 * median(known):.2f}" if known else "-"
        rows.append(row)
    report("Adapters loaded in one model (Llama, hidden 256, 12 layers, LoRA r=4 on q_proj and v_proj)", rows, options.json)


if __name__ == "__main__":
    main()
