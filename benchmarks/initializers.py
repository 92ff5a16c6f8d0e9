"""Starting LoRA from the weight or from data, and training it from there: HF peft and Inlay.

The model is a stack of square linear layers with weights whose singular values fall as those of trained ones do, and inputs with a
few strong directions.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import torch
from _harness import arguments, interleave, ratio, report, torch_arguments
from torch import Tensor, nn

import inlay

LIBRARIES = {"HF": peft, "Inlay": inlay}
STARTS = ("pissa", "pissa_niter_16", "olora", "mica", "eva")


class Stack(nn.Module):
    """Layers in a row; the first three have one input, as the projections of an attention."""

    def __init__(self, weights: list[Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(*w.shape, bias=False) for w in weights)
        for layer, w in zip(self.layers, weights, strict=True):
            layer.weight.data.copy_(w)

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
    extra = {"eva_config": library.EvaConfig()} if start == "eva" else {}
    return library.LoraConfig(r=r, lora_alpha=r, init_lora_weights=start, target_modules=r"layers\.\d+", **extra)


def started(library: Any, model: nn.Module, start: str, r: int, data: list[dict[str, Tensor]]) -> nn.Module:
    adapted = library.get_peft_model(model, config(library, start, r))
    if start == "eva":
        library.initialize_lora_eva_weights(
            adapted, data, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False
        )
    return adapted


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
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if options.cpu_time else time.perf_counter
    weights = [falling(options.width, i) for i in range(options.layers)]
    mixing = falling(options.width, 99)
    data = [{"x": torch.randn(options.rows, options.width, generator=torch.Generator().manual_seed(i)) @ mixing} for i in range(4)]
    rows = []
    for start in STARTS:
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
