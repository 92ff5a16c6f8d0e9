"""Starting LoRA from the weight or from data, and training it from there: HF peft and Inlay.

The model is a stack of square linear layers with weights whose singular values fall as those of trained ones do, and inputs with a
few strong directions. HF peft's LoftQ is written for an accelerator; what it moves there stays on the CPU here.
"""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from statistics import median
from typing import Any
from unittest.mock import patch

import peft
import torch
from _harness import arguments, interleave, ratio, report, torch_arguments
from bitsandbytes.nn.modules import Params4bit
from torch import Tensor, nn

import inlay

LIBRARIES = {"HF": peft, "Inlay": inlay}
STARTS = ("pissa", "pissa_niter_16", "olora", "mica", "loftq", "eva", "corda", "lora_ga")
# HF peft's CorDA takes its `dataclass` from a package that it does not require.
sys.modules.setdefault("attr", dataclasses)
# What HF peft does not have at its top.
corda = {peft: import_module("peft.tuners.lora.corda"), inlay: inlay}
loraga = {peft: import_module("peft.tuners.lora.loraga"), inlay: inlay}


class Stack(nn.Module):
    """Layers in a row; the first three have one input, as the projections of an attention."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*w.shape, bias=False) for w in weights)
        for layer, w in zip(self.layers, weights, strict=True):
            layer.weight = nn.Parameter(w.clone())

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, *rest = self.layers
        x = torch.tanh(q(x) + k(x) + v(x))
        for layer in rest:
            x = torch.tanh(layer(x))
        return x


def falling(width: int, seed: int) -> Tensor:
    """A random matrix with singular values ``1 / sqrt(1 + i / 8)``."""
    generator = torch.Generator().manual_seed(seed)
    u, v = (torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(2))
    return u * (1 + torch.arange(width) / 8).rsqrt() @ v


def config(library: Any, start: str | bool, r: int) -> Any:
    options: dict[str | bool, dict[str, Any]] = {
        "eva": {"eva_config": library.EvaConfig()},
        "corda": {"corda_config": (import_module("peft.tuners.lora.config") if library is peft else inlay).CordaConfig()},
        "lora_ga": {"lora_ga_config": library.LoraGAConfig()},
        "loftq": {"loftq_config": library.LoftQConfig(loftq_bits=4)},
    }
    extra = options.get(start, {})
    return library.LoraConfig(r=r, lora_alpha=r, init_lora_weights=start, target_modules=r"layers\.\d+", **extra)


def started(library: Any, model: nn.Module, start: str, r: int, data: list[dict[str, Tensor]]) -> nn.Module:
    chosen = config(library, start, r)

    def read() -> None:
        for batch in data:
            model(**batch)

    def learn() -> None:
        for batch in data:
            model(**batch).square().mean().backward()

    if start == "corda":
        corda[library].preprocess_corda(model, chosen, read)
    if start == "lora_ga":
        loraga[library].preprocess_loraga(model, chosen, learn)
    with on_cpu():
        adapted = library.get_peft_model(model, chosen)
    if start == "eva":
        library.initialize_lora_eva_weights(
            adapted, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
        )
    return adapted


@contextmanager
def on_cpu() -> Iterator[None]:
    """What is sent to an accelerator by name stays."""

    def staying(move: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            here = {k: "cpu" if v == "cuda" else v for k, v in kwargs.items()}
            return move(self, *("cpu" if isinstance(a, str) and a == "cuda" else a for a in args), **here)

        return to

    quantised: Any = Params4bit
    with patch.object(Tensor, "to", staying(Tensor.to)), patch.object(quantised, "to", staying(quantised.to)):
        yield


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    def run() -> None:
        model(x=x).square().mean().backward()
        for q in model.parameters():
            q.grad = None

    return run


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--width", type=int, default=1024, help="of the layers")
    parser.add_argument("--layers", type=int, default=4, help="how many")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--rows", type=int, default=1024, help="of a batch")
    parser.add_argument("--only", action="append", choices=STARTS, help="a start; several times for several")
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if options.cpu_time else time.perf_counter
    weights = [falling(options.width, i) for i in range(options.layers)]
    mixing = falling(options.width, 99)
    data = [{"x": torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(i)) @ mixing} for i in range(4)]
    rows = []
    for start in options.only or STARTS:
        found: dict[str, list[float]] = {name: [] for name in LIBRARIES}
        for i in range(options.rounds + 1):
            for name, library in LIBRARIES.items() if i % 2 else reversed(LIBRARIES.items()):
                model = Stack(weights)
                begin = clock()
                started(library, model, start, options.rank, data)
                if i:
                    # The first round is for warming up.
                    found[name].append(clock() - begin)
        rows.append(row(start, *(median(found[name]) for name in LIBRARIES)))
    models = {name: started(library, Stack(weights), "pissa", options.rank, data) for name, library in LIBRARIES.items()}
    steps = {name: step(model, data[0]["x"].requires_grad_()) for name, model in models.items()}
    times = interleave(steps, 4 * options.rounds, options.cpu_time)
    last = row("a training step from pissa", *(median(times[name]) for name in LIBRARIES))
    rows.append(last | {"HF / Inlay": f"{1 / ratio(times, 'Inlay', 'HF'):.1f}"})
    title = f"Starts of LoRA of rank {options.rank} on {options.layers} layers of {options.width} x {options.width}"
    report(title, rows, options.json)


def row(name: str, hf: float, ours: float) -> dict[str, str]:
    return {"start": name, "HF ms": f"{1e3 * hf:.0f}", "Inlay ms": f"{1e3 * ours:.0f}", "HF / Inlay": f"{hf / ours:.1f}"}


if __name__ == "__main__":
    main()
