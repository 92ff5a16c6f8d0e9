"""The one error that means "your input": it names the culprit and the remedy, and the command line prints it as one line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something the caller gave cannot be used. The message names it and says what to do."""


def near_miss(name: str, candidates: Iterable[str]) -> str:
    """``" Did you mean x?"`` when one of ``candidates`` is spelt almost like ``name``, else an empty string."""
    matches = difflib.get_close_matches(name, list(candidates), n=2, cutoff=0.6)
    return f" Did you mean {' or '.join(matches)}?" if matches else ""
