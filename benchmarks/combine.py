"""Combining two LoRA adapters of layers 2048 wide: HF peft and Inlay."""

from __future__ import annotations

import time
import warnings
from typing import Any

import peft
import torch
from _harness import arguments, report, torch_arguments
from torch import nn

import inlay

KINDS = ("linear", "cat", "svd", "ties", "ties_svd", "knots", "core_ties", "slerp")


class Layers(nn.Module):
    """Projections of one width, as a language model has them."""

    def __init__(self, width: int, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"proj": nn.Linear(width, width, bias=False)}) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer["proj"](x)  # type: ignore[index]
        return x


def adapted(library: Any, width: int, count: int, rank: int) -> Any:
    torch.manual_seed(0)
    model = library.get_peft_model(Layers(width, count), library.LoraConfig(r=rank, target_modules=["proj"]), "one")
    model.add_adapter("two", library.LoraConfig(r=rank, target_modules=["proj"]))
    with torch.no_grad():
        for name, q in sorted(model.named_parameters(), key=lambda named: named[0]):
            if "lora" in name or "adapters" in name:
                q.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(len(name))) / width**0.5)
    return model


def seconds(model: Any, kind: str, rounds: int, clock: Any) -> float:
    """The least of some rounds; deleting the adapter again does not count."""
    found = []
    for _ in range(rounds):
        start = clock()
        model.add_weighted_adapter(["one", "two"], [0.7, 0.3], "both", kind, density=0.5)
        found.append(clock() - start)
        model.delete_adapter("both")
    return min(found)


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    torch_arguments(parser)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    clock = time.process_time if options.cpu_time else time.perf_counter
    models = {"HF": adapted(peft, options.width, options.layers, options.rank)}
    models["Inlay"] = adapted(inlay, options.width, options.layers, options.rank)
    rows = []
    for kind in KINDS:
        ours = seconds(models["Inlay"], kind, options.rounds, clock)
        in_hf = kind in ("linear", "cat", "svd", "ties", "ties_svd")
        theirs = seconds(models["HF"], kind, min(options.rounds, 1 if "svd" in kind else options.rounds), clock) if in_hf else None
        shown = (
            {"HF, ms": "-", "HF / Inlay": "-"}
            if theirs is None
            else {"HF, ms": f"{1e3 * theirs:.0f}", "HF / Inlay": f"{theirs / ours:.1f}"}
        )
        rows.append({"combination": kind, "Inlay, ms": f"{1e3 * ours:.1f}", **shown})
    title = f"Two adapters of rank {options.rank} become one: {options.layers} layers of {options.width} x {options.width}"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
