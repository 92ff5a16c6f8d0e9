"""Importing Inlay: seconds and memory over torch alone, beside HF peft.

Each import runs in a fresh interpreter, and counts with the names that every user touches, since Inlay loads names when they
are first used.
"""

from __future__ import annotations

from statistics import median

from _harness import arguments, in_fresh_process, report

IMPORTS = {
    "torch": "import torch",
    "Inlay": "from inlay import LoraConfig, get_peft_model",
    "HF": "from peft import LoraConfig, get_peft_model",
    "transformers": "from transformers import AutoModelForCausalLM",
}
# torch is there first, so that what the others import of it is not theirs.
SCRIPT = """
import json, resource, sys, time
import torch
before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - start
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print(json.dumps({"s": seconds, "MB": grown * 1024 / 1e6, "modules": len(sys.modules)}))
"""


def main() -> None:
    options = arguments(__doc__, rounds=9).parse_args()
    found: dict[str, list[dict[str, float]]] = {name: [] for name in IMPORTS}
    for i in range(options.rounds + 1):
        for name in IMPORTS if i % 2 else reversed(IMPORTS):
            measured = in_fresh_process(SCRIPT, IMPORTS[name])
            if i:
                # The first round brings the files into the system's cache.
                found[name].append(measured)

    def over_torch(name: str, what: str) -> float:
        return median(run[what] - alone[what] for run, alone in zip(found[name], found["torch"], strict=True))

    rows = [
        {
            "import": IMPORTS[name],
            "seconds": f"{over_torch(name, 's'):.3f}",
            "MB": f"{over_torch(name, 'MB'):.0f}",
            "modules": f"{over_torch(name, 'modules'):.0f}",
        }
        for name in ("Inlay", "HF", "transformers")
    ]
    report("Importing, over torch alone", rows, options.json)


if __name__ == "__main__":
    main()
