"""Merging a LoRA into a base on disk: peak memory of a fresh process, and time over that of a plain copy of the files.

The base is made here: random bfloat16 weights of a Llama in shards. ``--gb`` says how large; the disk needs twice that and some.
Both the copy and the merge end with their bytes on the disk (fsync), and both begin with a cache that the other left, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 64000}


def make_base(folder: Path, gigabytes: float, shard: float) -> int:
    """Write the base; the bytes of its weights."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from inlay.formats.streaming import Planned, Shard, write_index

    in_a_layer = 4096 * (4096 * 2 + 1024 * 2) + 3 * 4096 * 14336
    layers = max(1, round((gigabytes * 1e9 / 2 - 2 * 64000 * 4096) / in_a_layer))
    config = LlamaConfig(**SIZES, num_hidden_layers=layers, dtype="bfloat16", tie_word_embeddings=False)  # type: ignore[arg-type]
    config.architectures = ["LlamaForCausalLM"]
    folder.mkdir(parents=True)
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    groups: list[list[Planned]] = [[]]
    for key, t in model.state_dict().items():
        nbytes = t.numel() * 2
        if groups[-1] and sum(p[3] for p in groups[-1]) + nbytes > shard * 1e9:
            groups.append([])
        groups[-1].append((key, "BF16", tuple(t.shape), nbytes))
    # Random numbers of one block, again and again: a disk does not care, and drawing them all takes minutes.
    block = (torch.randn(2**24) * 0.02).bfloat16()
    where, sizes = {}, []
    for i, group in enumerate(groups, 1):
        name = f"model-{i:05d}-of-{len(groups):05d}.safetensors"
        written = Shard(folder / name, group, {"format": "pt"})
        for key, _, _, nbytes in group:
            for done in range(0, nbytes, block.nbytes):
                written.put(key, block[: (min(block.nbytes, nbytes - done)) // 2], skipped=done)
        written.close()
        where |= {planned[0]: name for planned in group}
        sizes.append(sum(p[3] for p in group))
    write_index(folder, where, sizes, {})
    return sum(sizes)


def make_adapter(base: Path, folder: Path, r: int, targets: str) -> None:
    """A LoRA with numbers in both factors."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from inlay import LoraConfig
    from inlay.core.attach import attach
    from inlay.formats.folder import write_adapter
    from inlay.formats.slots import key_in_file, slots_of_model

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    config = LoraConfig(r=r, target_modules=targets if targets == "all-linear" else targets.split(","))
    attach(model, config, low_cpu_mem_usage=True)
    tensors = {key_in_file(s): 0.01 * torch.randn(s.shape) for s in slots_of_model(model, "default")}
    write_adapter(folder, tensors, config.to_file() | {"inference_mode": True})


def copy(base: Path, out: Path) -> float:
    """Seconds of a plain copy, to the disk."""
    start = time.perf_counter()
    out.mkdir()
    for file in sorted(base.iterdir()):
        shutil.copyfile(file, out / file.name)
        with (out / file.name).open("rb") as written:
            os.fsync(written.fileno())
    return time.perf_counter() - start


def peak() -> int:
    """Bytes of memory that this process has held at most; `resource` would count the one that started it, too."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) * 1024


def merge(base: Path, adapter: Path, out: Path) -> None:
    """Runs in a process of its own; prints what it took."""
    from inlay.operations.stream_merge import StreamMerge

    imported = peak()
    start = time.perf_counter()
    planned = StreamMerge(base, [adapter])
    ready, known = time.perf_counter(), peak()
    planned.run(out)
    done = time.perf_counter()
    print(json.dumps({"plan": ready - start, "run": done - ready, "peak": peak(), "planned": known, "imported": imported}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=8.0, help="size of the base")
    parser.add_argument("--shard-gb", type=float, default=2.0, help="size of a shard")
    parser.add_argument("--r", type=int, default=16)
    parser.add_argument("--targets", default="all-linear", help="all-linear, or names with commas")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("/tmp/inlay-stream-merge"))
    parser.add_argument("--one", nargs=3, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        merge(*options.one)
        return
    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    free = shutil.disk_usage(folder).free
    if free < 2.2e9 * options.gb:
        parser.error(
            f"{folder} has {free / 1e9:.1f} GB free and {2.2 * options.gb:.1f} are needed; give a smaller --gb or another --folder."
        )
    try:
        size = make_base(folder / "base", options.gb, options.shard_gb)
        make_adapter(folder / "base", folder / "adapter", options.r, options.targets)
        from inlay.formats.streaming import Checkpoint

        largest = max(e.nbytes for e in Checkpoint.open(folder / "base").tensors.values())
        copies, merges = [], []
        for _ in range(options.rounds):
            copies.append(copy(folder / "base", folder / "copy"))
            shutil.rmtree(folder / "copy")
            words = [sys.executable, __file__, "--one", *(str(folder / name) for name in ("base", "adapter", "out"))]
            merges.append(json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()[-1]))
            shutil.rmtree(folder / "out")
        best, copied = min(merges, key=lambda m: m["plan"] + m["run"]), min(copies)
        seconds = best["plan"] + best["run"]
        print(f"base {size / 1e9:.2f} GB, largest tensor {largest / 1e6:,.0f} MB, LoRA of rank {options.r} on {options.targets}")
        print(f"plain copy  {copied:6.1f} s  {size / copied / 1e9:5.2f} GB/s")
        speed = f"{size / seconds / 1e9:5.2f} GB/s  ({best['plan']:.1f} s of it planning)"
        print(f"merge       {seconds:6.1f} s  {speed}  {seconds / copied:.2f}x the copy")
        bound = 3 * largest + 300e6
        print(
            f"peak memory {best['peak'] / 1e6:,.0f} MB, of which {best['imported'] / 1e6:,.0f} MB after imports and "
            f"{best['planned'] / 1e6:,.0f} MB once planned; the bound is {bound / 1e6:,.0f} MB"
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
