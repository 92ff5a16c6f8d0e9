"""Runs one of `programs` under one of the two libraries and writes what it returns: child.py (inlay | peft) PROGRAM FOLDER."""

from __future__ import annotations

import importlib
import json
import logging
import sys
import warnings
from pathlib import Path


class Refuse:
    """Stands behind the alias and before everything else: whoever gets here was about to reach the real peft."""

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        assert name.partition(".")[0] != "peft", f"the real peft was asked for {name}"


def main() -> None:
    library, program, folder = sys.argv[1:]
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if library == "inlay":
        sys.meta_path.insert(0, Refuse())
        import inlay.compat.peft
    import torch

    torch.set_num_threads(1)
    result = importlib.import_module(f"programs.{program}").main(Path(folder))
    if library == "inlay":
        import peft

        import inlay

        assert peft.LoraConfig is inlay.LoraConfig
    Path(folder, "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
