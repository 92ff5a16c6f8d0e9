"""Every method: a training step, what it keeps for the backward pass and a merge, in HF peft and in Inlay over the frozen model.

The methods are all that HF peft has; the model and the floor are those of ``step.py``. Options are HF's defaults where they are no
burden to compare, and written below where they are not.
"""

from __future__ import annotations

import gc
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import cache
from math import exp, log
from pathlib import Path
from statistics import median
from typing import Any

import peft
import torch
from _harness import Saved, Times, arguments, interleave, ratio, report, torch_arguments
from step import BATCH, HIDDEN, LAYERS, LENGTH, VOCABULARY, base

import inlay
from inlay.core.config import CONFIGS, config_class

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Sizes that HF peft documents or uses in its own comparison of methods, where its defaults are for another size of model.
OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 1000, "init_r": 12, "target_r": 8},
    "BOFT": {"boft_block_size": 4, "boft_n_butterfly_factor": 2},
    "C3A": {"block_size": 32},
    "IA3": {"feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm", "post_attention_layernorm"]},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2, 3], "target_modules": ["embed_tokens"]},
    "ROAD": {"group_size": 32},
    "VBLORA": {"vector_length": 16, "num_vectors": 90},
    "PROMPT_TUNING": {"num_virtual_tokens": 20},
    "P_TUNING": {"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    "PREFIX_TUNING": {"num_virtual_tokens": 20},
    "CARTRIDGE": {"num_virtual_tokens": 20},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 20, "num_tasks": 2},
    "CPT": {"cpt_token_ids": list(range(20)), "cpt_tokens_type_mask": [1, 2, 3, 4] * 5},
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": LAYERS - 1},
    "POLY": {"n_tasks": 2, "n_skills": 4},
    "XLORA": {"hidden_size": HIDDEN},
}
# Those that are given token ids, and not embeddings that require gradients.
BY_IDS = {"TRAINABLE_TOKENS", "CPT"}
# A merge is the median of so many.
MERGES = 5

Loss = Callable[[], torch.Tensor]


# ---- what is measured -----------------------------------------------------------------------------------------------------------
def names() -> list[str]:
    config_class("LORA")  # registers all
    return sorted(n for n in CONFIGS if n in list(peft.PeftType))


@cache
def experts() -> dict[str, str]:
    """Two trained LoRA adapters on disk, for a method that mixes them."""
    folder = Path(tempfile.mkdtemp())
    for name in ("0", "1"):
        adapted(peft, "LORA").save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("0", "1")}


def config_of(library: Any, name: str) -> Any:
    known = set(config_class(name).field_names())
    options: dict[str, Any] = {"target_modules": list(LINEARS)} if "target_modules" in known else {}
    options |= OPTIONS.get(name, {})
    if name in ("ADAPTION_PROMPT", "SHADOW", "XLORA"):
        options.pop("target_modules", None)
    if name == "XLORA":
        options["adapters"] = experts()
    cls = library.PEFT_TYPE_TO_CONFIG_MAPPING[name] if library is inlay else peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return cls(task_type="CAUSAL_LM", **options)


def adapted(library: Any, name: str) -> Any:
    model = library.get_peft_model(base(torch.float32), config_of(library, name))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Where an update starts at zero some of the work could be skipped.
            parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.train()


def loss_of(model: torch.nn.Module, name: str) -> Loss:
    """The loss on one batch; the name of a method says what it is given beside the usual."""
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    inputs = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator).requires_grad_()
    given: dict[str, Any] = {"input_ids": ids} if name in BY_IDS else {"inputs_embeds": inputs}
    if name in ("MULTITASK_PROMPT_TUNING", "POLY"):
        given["task_ids"] = torch.arange(BATCH) % 2
    if name == "CPT":
        given["input_type_mask"] = torch.full_like(ids, 4)

    def loss() -> torch.Tensor:
        inputs.grad = None
        return model(labels=ids, **given).loss

    return loss


def step(model: torch.nn.Module, loss: Loss) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        loss().backward()

    return run


def saved_bytes(model: torch.nn.Module, loss: Loss) -> int:
    with Saved(model) as saved:
        loss()
    return saved.nbytes


def merge_seconds(model: Any, cpu_time: bool) -> float | None:
    """Merging into all layers; None where the method is no function of the weight."""
    clock, found = time.process_time if cpu_time else time.perf_counter, []
    for i in range(MERGES + 1):
        try:
            start = clock()
            with torch.no_grad():
                model.merge_adapter()
            found.append(clock() - start)
            model.unmerge_adapter()
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return None
        if i == 1 and found[-1] > 0.5:
            break
    return median(found[1:])


@cache
def floor() -> tuple[torch.nn.Module, Loss, int]:
    """The frozen model with its step done once, and what that keeps."""
    model = base(torch.float32).requires_grad_(False)
    loss = loss_of(model, "")
    loss().backward()
    return model, loss, saved_bytes(model, loss)


def measure(name: str, rounds: int, cpu_time: bool) -> dict[str, Any]:
    models: dict[str, Any] = {"floor": floor()[0]}
    losses = {"floor": floor()[1]}
    for key, library in (("Inlay", inlay), ("HF", peft)):
        try:
            models[key] = adapted(library, name)
            losses[key] = loss_of(models[key], name)
            losses[key]().backward()
        except Exception as error:  # whatever HF peft raises is part of the result
            if library is inlay:
                raise
            models.pop("HF", None)
            print(f"{name}: HF peft: {type(error).__name__}: {error}".split("\n")[0], file=sys.stderr)
    times = interleave({key: step(model, losses[key]) for key, model in models.items()}, rounds, cpu_time, warmup=0)
    saved = {key: saved_bytes(model, losses[key]) for key, model in models.items() if key != "floor"} | {"floor": floor()[2]}
    merged = {key: merge_seconds(model, cpu_time) for key, model in models.items() if key != "floor"}
    return {"method": name} | _shown(times, saved, merged)


def _shown(times: Times, saved: dict[str, int], merged: dict[str, float | None]) -> dict[str, str]:
    def relative(one: str, other: str) -> str:
        return f"{ratio(times, one, other):.2f}" if one in times else "-"

    def milliseconds(key: str) -> str:
        seconds = merged.get(key)
        return "-" if seconds is None else f"{1e3 * seconds:.{0 if seconds > 0.01 else 1}f}"

    return {
        "floor ms": f"{1e3 * median(times['floor']):.0f}",
        "Inlay / floor": relative("Inlay", "floor"),
        "HF / floor": relative("HF", "floor"),
        "HF / Inlay": relative("HF", "Inlay"),
        "saved MB: floor": f"{saved['floor'] / 1e6:.0f}",
        "Inlay": f"{saved['Inlay'] / 1e6:.0f}",
        "HF": f"{saved['HF'] / 1e6:.0f}" if "HF" in saved else "-",
        "merge ms: Inlay": milliseconds("Inlay"),
        "HF ": milliseconds("HF"),
    }


def mean(values: list[float]) -> float:
    """The geometric one."""
    return exp(sum(map(log, values)) / len(values))


def summary(rows: list[dict[str, Any]]) -> list[str]:
    found = {row["method"]: float(row["HF / Inlay"]) for row in rows if row["HF / Inlay"] != "-"}
    notes = []
    if found:
        slower = ", ".join(f"{name} {value:.2f}" for name, value in sorted(found.items(), key=lambda item: item[1]) if value < 1)
        notes.append(f"Step, HF / Inlay: geometric mean {mean(list(found.values())):.2f}; below 1: {slower or 'none'}")
    merges = [(float(row["HF "]), float(row["merge ms: Inlay"])) for row in rows if "-" not in (row["HF "], row["merge ms: Inlay"])]
    if merges:
        notes.append(f"Merge, HF / Inlay: geometric mean {mean([max(theirs, 0.1) / max(ours, 0.1) for theirs, ours in merges]):.2f}")
    return notes


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--only", action="append", choices=names(), help="measure this method only (may be repeated)")
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = []
    for name in options.only or names():
        rows.append(measure(name, options.rounds, options.cpu_time))
        print(*rows[-1].values(), sep="  ", file=sys.stderr, flush=True)
        gc.collect()
    title = f"Training step of every method, Llama (hidden {HIDDEN}, {LAYERS} layers, {BATCH} x {LENGTH} tokens, float32)"
    report(title, rows, options.json, summary(rows))


if __name__ == "__main__":
    main()
