"""Importing this module lets ``import peft`` mean Inlay, in this process and for every library that is imported after it.

    import inlay.compat.peft          # first, before transformers, accelerate, diffusers, trl

    from peft import LoraConfig       # is inlay.LoraConfig
    from trl import SFTTrainer        # works on Inlay

A script that is not to be touched runs under the alias with ``python -m inlay.compat.peft script.py ...`` (or ``-m module ...``),
and so do the processes that it starts: ``python -m inlay.compat.peft -m accelerate.commands.launch train.py``.
``torchrun -m inlay.compat.peft train.py`` and ``accelerate launch -m inlay.compat.peft train.py`` come to the same.

Raises:
    RuntimeError: on import, where it comes too late to be consistent; the message says why and what to do.
"""

from __future__ import annotations

import sys

from .alias import install
from .launch import main, serve_children

install()

__all__ = ["install", "main", "serve_children"]

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
