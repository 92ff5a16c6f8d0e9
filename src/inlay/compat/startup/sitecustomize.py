"""Run by Python at its start in processes whose environment `inlay.compat.launch.serve_children` prepared."""

import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))

sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or os.curdir) != HERE]
if os.environ.get("INLAY_AS_PEFT") == "1":
    import inlay.compat.peft  # noqa: F401

# Python runs one module of this name; another one that this stood in front of has its turn now.
this = sys.modules.pop(__name__)
try:
    import sitecustomize  # noqa: F401  # pyright: ignore[reportMissingImports]
except ModuleNotFoundError as missing:
    if missing.name != __name__:
        raise
    sys.modules[__name__] = this
