"""Every method: a training step, what it keeps for the backward pass and a merge, in HF peft and in Inlay over the frozen model.

The methods are those that are registered; the model and the floor are those of ``step.py``. Options are HF's defaults where they
are no burden to compare, and written below where they are not.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable
from math import exp, log
from statistics import median
from typing import Any

import peft
import torch
from _harness import Saved, arguments, interleave, ratio, report, torch_arguments
from step import BATCH, HIDDEN, LAYERS, LENGTH, Case, base, loss_of

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
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 20, "num_tasks": 2},
}
# Methods that need more than a configuration and a model: they are measured elsewhere or not by steps of this kind.
NOT_HERE = {"XLORA", "POLY", "CPT", "SHADOW"}


def config_of(library: Any, name: str) -> Any:
    known = set(config_class(name).field_names())
    options: dict[str, Any] = {"target_modules": list(LINEARS)} if "target_modules" in known else {}
    options |= OPTIONS.get(name, {})
    if name == "ADAPTION_PROMPT":
        options = {"adapter_len": 10, "adapter_layers": LAYERS - 1}
    cls = library.PEFT_TYPE_TO_CONFIG_MAPPING[name] if library is inlay else peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return cls(task_type="CAUSAL_LM", **options)


def adapted(library: Any, name: str) -> torch.nn.Module:
    model = library.get_peft_model(base(torch.float32), config_of(library, name))
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            # Where an update starts at zero some of the work could be skipped.
            parameter.data += 0.003 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    return model.train()


def step(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> Callable[[], None]:
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        loss().backward()

    return run


def saved_bytes(model: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> int:
    with Saved(model) as saved:
        loss()
    return saved.nbytes


def merge_seconds(model: Any) -> float | None:
    """One merge, the second of two; None where the method is no function of the weight."""
    found = None
    for _ in range(2):
        try:
            start = time.perf_counter()
            with torch.no_grad():
                model.merge_adapter()
            found = time.perf_counter() - start
            model.unmerge_adapter()
        except (AttributeError, NotImplementedError, TypeError, ValueError):
            return None
    return found


def measure(name: str, rounds: int, cpu_time: bool) -> dict[str, Any]:
    case = Case(name, {})
    found: dict[str, torch.nn.Module] = {"floor": base(torch.float32).requires_grad_(False), "Inlay": adapted(inlay, name)}
    try:
        found["HF"] = adapted(peft, name)
        loss_of(found["HF"], case)().backward()
    except Exception as error:  # whatever HF peft raises is part of the result
        found.pop("HF", None)
        print(f"{name}: HF peft: {type(error).__name__}: {error}".split("\n")[0])
    losses = {key: loss_of(model, case) for key, model in found.items()}
    times = interleave({key: step(model, losses[key]) for key, model in found.items()}, rounds, cpu_time, warmup=1)
    saved = {key: saved_bytes(model, losses[key]) for key, model in found.items()}
    merged = {key: merge_seconds(model) for key, model in found.items() if key != "floor"}
    hf = "HF" in found

    def shown(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return {
        "method": name,
        "floor ms": round(1e3 * median(times["floor"])),
        "Inlay / floor": f"{ratio(times, 'Inlay', 'floor'):.2f}",
        "HF / floor": f"{ratio(times, 'HF', 'floor'):.2f}" if hf else "-",
        "HF / Inlay": f"{ratio(times, 'HF', 'Inlay'):.2f}" if hf else "-",
        "saved MB: floor": f"{saved['floor'] / 1e6:.0f}",
        "Inlay": f"{saved['Inlay'] / 1e6:.0f}",
        "HF": f"{saved['HF'] / 1e6:.0f}" if hf else "-",
        "merge ms: Inlay": shown(None if merged["Inlay"] is None else 1e3 * merged["Inlay"], ".0f"),
        "HF ": shown(None if merged.get("HF") is None else 1e3 * merged["HF"], ".0f"),  # type: ignore[operator]
    }


def main() -> None:
    config_class("LORA")  # registers all
    names = sorted(n for n in CONFIGS if n in list(peft.PeftType) and n not in NOT_HERE)
    parser = arguments(__doc__, rounds=9)
    parser.add_argument("--only", action="append", choices=names, help="measure this method only (may be repeated)")
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    rows = []
    for name in options.only or names:
        rows.append(measure(name, options.rounds, options.cpu_time))
        gc.collect()
    found = [float(row["HF / Inlay"]) for row in rows if row["HF / Inlay"] != "-"]
    notes = [f"HF / Inlay: geometric mean {exp(sum(map(log, found)) / len(found)):.2f}, least {min(found):.2f}"] if found else []
    title = f"Training step of every method, Llama (hidden {HIDDEN}, {LAYERS} layers, {BATCH} x {LENGTH} tokens, float32)"
    report(title, rows, options.json, notes)


if __name__ == "__main__":
    main()
