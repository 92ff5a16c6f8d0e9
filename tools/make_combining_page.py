"""Writes the table of docs/combining.md from the registered ways to combine."""

from __future__ import annotations

from pathlib import Path

from inlay.operations.arithmetic import COMBINATIONS, DENSITY, Combination, Options

PAGE = Path(__file__).parents[1] / "docs" / "combining.md"
START, END = "<!-- types: written by `python tools/make_combining_page.py` -->\n", "<!-- end -->"
SPACES = {
    "sum": "changes of the weight; factors stay factors",
    "factors": "A and B one by one, where all are LoRA; else changes of the weight",
    "delta": "changes of the weight",
    "invariant": "changes of the weight, from the factors where there are such",
    "aligned": "what the adapters have along common singular vectors",
    "core": "small matrices between common bases",
}
HEAD = """`D_i` is what adapter i changes in the weight, `w_i` its weight, and `t_i` what the rule acts on; d is the `density`.

- `trim` keeps the share d of the numbers, the largest ones; `drop` keeps each with chance d and divides it by d.
- `magprune` keeps a number with a chance within `epsilon` of d, the larger of its row the likelier, and divides it by that.
- `crumbs` keeps the share d of the numbers below the share `gamma` of the largest.
- `soup`, `slerp` and `karcher` take the weights as shares of their sum, which must be positive; `sce` takes an adapter of negative
  weight the other way round.
- The sign of a number is that of the sum over the adapters (`majority_sign_method="total"`), or the more frequent one (`"frequency"`).
"""


def row(way: Combination) -> str:
    options = []
    if way.prunes:
        options.append(f"`density` ({DENSITY})")
    if way.elects:
        options.append('`majority_sign_method` ("total")')
    if "crumbs" in way.formula:
        options.append(f"`gamma` ({Options.gamma})")
    if "magprune" in way.formula:
        options.append(f"`epsilon` ({Options.epsilon})")
    if "drop" in way.formula or "magprune" in way.formula:
        options.append("`seed`")
    if way.fixed_rank:
        options.append("`svd_rank` (the largest that comes in)")
    paper = f"[{way.paper}](https://arxiv.org/abs/{way.paper})" if way.paper else ""
    formula = f"`{way.formula.replace('|', chr(92) + '|')}`"
    return f"| `{way.name}` | {formula} | {SPACES[way.space]} | {', '.join(options)} | {paper} |"


def page() -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    after = rest.partition(END)[2]
    lines = [HEAD, "| type | result | acts on | options (default) | paper |", "|---|---|---|---|---|", *map(row, COMBINATIONS.values())]
    return f"{before}{START}{chr(10).join(lines)}\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
