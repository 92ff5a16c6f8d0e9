"""The options with which each method is tested: those that its class names (`Method.examples`).

``METHODS=BOFT,ROAD`` in the environment restricts the law to some methods while one works on them.
"""

from __future__ import annotations

import os
from typing import Any

import inlay.methods  # noqa: F401  registers them
from inlay.core.method import METHODS, Method

ONLY = {name for name in os.environ.get("METHODS", "").split(",") if name}
# Methods on whole modules have no weight that the law could speak of, and those that are no function of it obey none; they are
# tested on models.
TESTED = {name: cls for name, cls in METHODS.items() if cls.site_of is Method.site_of and not cls.unmergeable}

# Every method with every set of options, and every method once.
CASES: dict[str, tuple[type[Method], dict[str, Any]]] = {
    f"{name}-{variant}".rstrip("-"): (cls, options) for name, cls in TESTED.items() for variant, options in cls.examples.items()
}
SELECTED = [case for case, (cls, _) in CASES.items() if not ONLY or cls.__dataclass_fields__["peft_type"].default in ONLY]
METHOD_CASES = [case for name, cls in TESTED.items() if (case := f"{name}-{next(iter(cls.examples))}".rstrip("-")) in SELECTED]
