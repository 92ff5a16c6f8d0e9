"""What the benchmarks share: interleaved timing, ratios, saved bytes, fresh processes, and tables.

Times on a shared machine drift by more than the differences that matter. So the variants of a comparison run in turn, in one
process, in an order that is reversed every other round, and what is reported is the median of the ratios within a round.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

Times = dict[str, list[float]]


def arguments(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="how often each variant is measured")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    return parser


def torch_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of benchmarks that compute."""
    import torch

    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch")
    parser.add_argument("--cpu-time", action="store_true", help="processor time, not wall time: for a busy machine, with --threads 1")


# ---- time -----------------------------------------------------------------------------------------------------------------
def interleave(variants: Mapping[str, Callable[[], object]], rounds: int, cpu_time: bool = False, warmup: int = 3) -> Times:
    """Seconds of every variant in every round."""
    clock = time.process_time if cpu_time else time.perf_counter
    for _ in range(warmup):
        for run in variants.values():
            run()
    names = list(variants)
    times: Times = {name: [] for name in names}
    for i in range(rounds):
        for name in names if i % 2 == 0 else reversed(names):
            start = clock()
            variants[name]()
            times[name].append(clock() - start)
    return times


def ratio(times: Times, name: str, to: str) -> float:
    """The median over rounds of one variant's time in another's."""
    return median(a / b for a, b in zip(times[name], times[to], strict=True))


def in_fresh_process(code: str, *args: str) -> dict[str, float]:
    """What a script prints as JSON in its last line."""
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.strip().splitlines()[-1])


# ---- memory ---------------------------------------------------------------------------------------------------------------
class Saved:
    """The storages that autograd keeps for the backward pass while the block runs, parameters' own left out.

    A storage counts once and as a whole, however many views of it are saved.
    """

    def __init__(self, model: Any) -> None:
        self.storages: dict[int, Any] = {}
        self.nbytes = 0
        self._parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def add(self, tensor: Any) -> None:
        if tensor.is_sparse:
            for part in (tensor._indices(), tensor._values()):
                self.add(part)
            return
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters:
            # The reference keeps the address from being used again.
            self.storages[storage.data_ptr()] = storage

    def __enter__(self) -> Saved:
        from torch.autograd.graph import saved_tensors_hooks

        def pack(tensor: Any) -> Any:
            self.add(tensor)
            # Not the tensor: an output that its own function saves would hold itself for ever.
            return tensor.detach()

        self._hooks = saved_tensors_hooks(pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._hooks.__exit__(*error)
        self.nbytes = sum(s.nbytes() for s in self.storages.values())
        # Hooks and this hold each other.
        self.storages.clear()
        del self._hooks


# ---- what it ran on, and how it is shown ----------------------------------------------------------------------------------
def machine() -> dict[str, str]:
    import torch

    flags = torch.backends.cpu.get_cpu_capability()
    versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "peft", "inlay")}
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {flags}, {torch.get_num_threads()} threads",
        "versions": ", ".join(f"{name} {version}" for name, version in {"python": platform.python_version(), **versions}.items()),
    }


def report(title: str, rows: Sequence[Mapping[str, Any]], as_json: bool, notes: Sequence[str] = ()) -> None:
    """A table in Markdown, or one JSON object."""
    if as_json:
        print(json.dumps({"title": title, **machine(), "rows": list(rows), "notes": list(notes)}))
        return
    names = list(rows[0])
    cells = [names, *[[str(row[n]) for n in names] for row in rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(names))]
    lines = [f"| {' | '.join(c.ljust(w) for c, w in zip(row, widths, strict=True))} |" for row in cells]
    lines.insert(1, f"|{'|'.join('-' * (w + 2) for w in widths)}|")
    print(f"{title}\n{'; '.join(machine().values())}\n", *lines, *(f"\n{note}" for note in notes), sep="\n")
