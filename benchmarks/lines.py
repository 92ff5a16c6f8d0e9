"""How long the methods are, in Inlay and in HF peft: a file here, a folder there.

Code is what is left of a file without comments, docstrings, blank lines and imports; its mathematics is what is left of that without
the declarations of a class: its options with their help, and what is said about it.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import peft
from _harness import arguments, report
from methods import names

from inlay.core.config import config_class


def code(tree: ast.Module, declarations: bool = True) -> int:
    """How many lines hold code; without ``declarations`` those of a class body's fields are left out, too."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr)):
            lines |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1)) if not getattr(node, "body", None) else {node.lineno}
    for node in _left_out(tree, declarations):
        lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def _left_out(tree: ast.Module, declarations: bool) -> Iterator[ast.stmt]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node, clean=False) is not None:
            yield node.body[0]
        if isinstance(node, ast.ClassDef) and not declarations:
            yield from (s for s in node.body if isinstance(s, (ast.Assign, ast.AnnAssign)))


def of_files(files: list[Path]) -> tuple[int, int, int]:
    """Lines, lines of code, and those of the mathematics."""
    texts = [f.read_text() for f in files]
    trees = [ast.parse(text) for text in texts]
    return sum(len(t.splitlines()) for t in texts), sum(map(code, trees)), sum(code(t, False) for t in trees)


def main() -> None:
    options = arguments(__doc__, rounds=1).parse_args()
    rows = []
    for name in names():
        ours = of_files([Path(inspect.getfile(config_class(name)))])
        folder = Path(inspect.getfile(peft.PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)])).parent
        theirs = of_files(sorted(folder.rglob("*.py")))
        rows.append(
            {
                "method": name,
                "lines: Inlay": ours[0],
                "HF": theirs[0],
                "code: Inlay": ours[1],
                "HF ": theirs[1],
                "mathematics: Inlay": ours[2],
            }
        )
    lengths = {key: [row[key] for row in rows] for key in rows[0] if key != "method"}
    notes = [f"{key}: median {median(found):.0f}, sum {sum(found)}" for key, found in lengths.items()]
    report("Lines of each method", rows, options.json, ["\n".join(notes)])


if __name__ == "__main__":
    main()
