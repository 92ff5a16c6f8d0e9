"""Running a script, and the processes that it starts, under the alias."""

from __future__ import annotations

import os
import runpy
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

# Set to 1 for processes that are to serve peft from Inlay as soon as they start.
SWITCH = "INLAY_AS_PEFT"

USAGE = "usage: python -m inlay.compat.peft (SCRIPT | -m MODULE) [ARGUMENT ...]\n\nRun a program for which `import peft` means Inlay."


def serve_children(environ: MutableMapping[str, str] = os.environ) -> None:
    """Let Python processes that are started with this environment serve peft from Inlay, however they are started.

    Python runs a module ``sitecustomize`` at its start; ours goes first on their ``PYTHONPATH``, hands over to any other one, and
    does something only where `SWITCH` is set.
    """
    startup = str(Path(__file__).parent / "startup")
    paths = [p for p in environ.get("PYTHONPATH", "").split(os.pathsep) if p and p != startup]
    environ["PYTHONPATH"] = os.pathsep.join([startup, *paths])
    environ[SWITCH] = "1"


def main(arguments: Sequence[str]) -> int | str | None:
    """``python`` with the alias: the first argument is a script, or ``-m`` and a module.

    Returns:
        The exit status where nothing could be run; what the program raises goes through.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        return 0 if arguments else 2
    serve_children()
    if arguments[0] == "-m":
        if len(arguments) < 2:
            return f"{USAGE}\n\n-m: name a module."
        sys.argv = list(arguments[1:])
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        return None
    script = Path(arguments[0])
    if not script.exists():
        return f"{USAGE}\n\n{script}: no such file."
    sys.argv = list(arguments)
    # As for `python script.py`: its own folder is where it imports from.
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")
    return None
