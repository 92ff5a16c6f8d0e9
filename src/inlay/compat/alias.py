"""``peft`` and ``peft.*`` as modules that hold Inlay's own objects, found by Python's import system and by its package metadata."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from ..core.config import PEFT_VERSION
from . import names

NAME = "peft"

# What looks for peft while it is imported, and remembers the answer.
LOOKED_FOR_IT = ("transformers", "accelerate", "diffusers", "trl", "sentence_transformers")

REMEDY = (
    "Put `import inlay.compat.peft` before the first import of these libraries, "
    "or run the script with `python -m inlay.compat.peft script.py`."
)


class AliasDistribution(importlib.metadata.Distribution):
    """What ``importlib.metadata`` is told about the package ``peft``."""

    def read_text(self, filename: str) -> str | None:
        texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {NAME}\nVersion: {PEFT_VERSION}\nSummary: Served by Inlay\n",
            "top_level.txt": f"{NAME}\n",
        }
        return texts.get(filename)

    def locate_file(self, path: Any) -> Path:
        return Path(names.__file__).parent / path


class AliasFinder(MetaPathFinder, Loader):
    """Finds and makes the modules; what they hold is looked up by `names.resolve` when it is first asked for."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != NAME and not fullname.startswith(f"{NAME}."):
            return None
        if not names.is_module(fullname):
            raise ModuleNotFoundError(f"No module named {fullname!r}; Inlay does not have it yet.", name=fullname)
        return ModuleSpec(fullname, self, origin=names.__file__, is_package=True)

    def exec_module(self, module: ModuleType) -> None:
        # A failing `from peft import X` shows this file, where the names are.
        module.__file__ = names.__file__
        module.__doc__ = f"{module.__name__}, served by Inlay."
        module.__dict__["__getattr__"] = partial(names.resolve, module)
        module.__dict__["__dir__"] = partial(names.listing, module)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        wanted = getattr(context, "name", None)
        if wanted is None or wanted.lower() == NAME:
            yield AliasDistribution()


def installed() -> bool:
    return any(isinstance(finder, AliasFinder) for finder in sys.meta_path)


def install() -> None:
    """Serve ``peft`` from Inlay from now on; a second call does nothing.

    Raises:
        RuntimeError: the real library, or one that has looked for it, is imported already.
    """
    if installed():
        return
    real = sys.modules.get(NAME)
    if real is not None:
        raise RuntimeError(f"peft is imported already, from {getattr(real, '__file__', None)}, and cannot be replaced any more. {REMEDY}")
    late = [name for name in LOOKED_FOR_IT if name in sys.modules]
    if late:
        raise RuntimeError(f"{', '.join(late)} looked for peft on import, before the alias was there. {REMEDY}")
    sys.meta_path.insert(0, AliasFinder())
