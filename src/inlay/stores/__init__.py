"""The layers of other people's quantisation backends, one file each. They are known by their classes' names; none is imported."""

from __future__ import annotations

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
