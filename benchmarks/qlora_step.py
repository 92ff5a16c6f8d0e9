"""One QLoRA step on the CPU over bitsandbytes' NF4: Inlay against HF peft, on the same layers with the same numbers.

    python benchmarks/qlora_step.py [inlay | peft] [--tokens 1024] [--width 1024] [--layers 4]

Without a library it runs both, each in a process of its own, and prints seconds a step, the ratio, and the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time

import torch
from torch import Tensor, nn


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        import bitsandbytes as bnb

        def linear(inputs: int, outputs: int) -> nn.Module:
            return bnb.nn.Linear4bit(inputs, outputs, False, compute_dtype=torch.float32, quant_type="nf4")

        self.up, self.down = linear(width, 4 * width), linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(x)))


def run(library: str, tokens: int, width: int, layers: int) -> None:
    torch.manual_seed(0)
    module = __import__(library)
    base = nn.Sequential(*(Block(width) for _ in range(layers))).to("cpu")
    config = module.LoraConfig(r=16, target_modules=["up", "down"])
    model = module.get_peft_model(base, config).train()
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad], lr=1e-3)
    x, times, losses = torch.randn(1, tokens, width), [], []
    for _ in range(6):
        start = time.perf_counter()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"seconds": sorted(times[1:])[len(times) // 2 - 1], "first_loss": losses[0], "peak_MiB": round(peak)}))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("package", nargs="?", choices=["inlay", "peft"])
    for name, default in (("tokens", 1024), ("width", 1024), ("layers", 4)):
        options.add_argument(f"--{name}", type=int, default=default)
    given = options.parse_args()
    sizes = [f"--{name}={getattr(given, name)}" for name in ("tokens", "width", "layers")]
    if given.package:
        run(given.package, given.tokens, given.width, given.layers)
        return
    found = {}
    for library in ("peft", "inlay"):
        done = subprocess.run([sys.executable, __file__, library, *sizes], capture_output=True, text=True, check=True)
        found[library] = json.loads(done.stdout.splitlines()[-1])
        print(library, found[library])
    print(f"HF peft / Inlay: {found['peft']['seconds'] / found['inlay']['seconds']:.2f}")


if __name__ == "__main__":
    main()
