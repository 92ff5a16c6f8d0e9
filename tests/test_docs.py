"""Generated pages are current, and examples run."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_page_of_methods_is_current() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "make_methods_page.py"))["page"]()
    assert (ROOT / "docs" / "methods.md").read_text(encoding="utf-8") == page, "run `python tools/make_methods_page.py`"


def test_the_table_of_combinations_is_current() -> None:
    page = runpy.run_path(str(ROOT / "tools" / "make_combining_page.py"))["page"]()
    assert (ROOT / "docs" / "combining.md").read_text(encoding="utf-8") == page, "run `python tools/make_combining_page.py`"


def test_the_examples_of_combining_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "combining.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": "example"}
    for block in re.finditer(r"```python\n(.*?)```", text, re.DOTALL):
        # Lines of the page, for whoever reads the error.
        exec(compile("\n" * text[: block.start(1)].count("\n") + block[1], "docs/combining.md", "exec"), names)
    assert (tmp_path / "turned-as-lora" / "README.md").is_file()
