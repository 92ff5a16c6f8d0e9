"""Generated pages are current."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_page_of_methods_is_current() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "make_methods_page.py"))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page, "run `python tools/make_methods_page.py`"
