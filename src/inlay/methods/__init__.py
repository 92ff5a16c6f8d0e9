"""One file a method. Importing this package registers them all; packages of others register theirs by entry point."""

from __future__ import annotations

import importlib
import pkgutil
from importlib.metadata import entry_points

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")
for _entry in entry_points(group="inlay.methods"):
    _entry.load()
