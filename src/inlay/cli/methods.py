"""``inlay methods``: which methods there are, and what one of them is, takes and can do."""

from __future__ import annotations

from dataclasses import asdict, is_dataclass
from typing import Annotated, Any

import typer

from .output import Json, console, emit, short, table


def methods(
    name: Annotated[str | None, typer.Argument(help="A method, such as lora.", show_default=False)] = None,
    as_json: Json = False,
) -> None:
    """List the methods, or show the equation, the options, the size and the abilities of one."""
    from inlay.capabilities import capabilities, method_names
    from inlay.training.errors import InputError, near_miss

    if name is None:
        found = [capabilities(each) for each in method_names()]
        if as_json:
            emit({"methods": [asdict(each) for each in found]})
        else:
            _show_all(found, console())
        return
    known = method_names()
    if name.upper().replace("-", "_") not in known:
        words = [each.lower() for each in known]
        raise InputError(f"{name}: no such method.{near_miss(name.lower(), words) or ' `inlay methods` lists them.'}")
    found = capabilities(name)
    if as_json:
        emit(asdict(found))
    else:
        _show_one(found, console())


def yes(value: object) -> str:
    return "yes" if value else "-"


def _show_all(found: list[Any], screen: Any) -> None:
    made = table("method", "what it does", "merges", "to LoRA", "paper")
    for each in found:
        made.add_row(each.name.lower(), short(each.equation or each.title, 64), yes(each.merges), each.to_lora or "-", _paper(each))
    screen.print(made)
    screen.print(f"[dim]{len(found)} methods; `inlay methods NAME` shows one[/]")


def _paper(each: Any) -> str:
    """A number at arXiv, or the place where the paper is."""
    return each.paper if each.paper in each.paper_link.split("/") else each.paper.split("/")[2]


def _show_one(each: Any, screen: Any) -> None:
    screen.print(f"[bold]{each.name.lower()}[/]  {short(each.title, 200)}")
    facts = table("", "")
    facts.show_header = False
    facts.add_row("equation", short(each.equation))
    facts.add_row("paper", each.paper_link or "-")
    facts.add_row("class", f"inlay.{each.config}")
    facts.add_row("trains", " ".join(filter(None, [each.parameters or "see the paper", _size(each)])))
    if each.starts:
        facts.add_row("starts from", short(", ".join(each.starts)))
    if each.no_starts:
        facts.add_row("" if each.starts else "starts from", f"[dim]{short(each.no_starts, 400)}[/]")
    facts.add_row("merges", "yes, and back to the bit" if each.merges else f"no: {each.why_not}")
    if each.merges:
        facts.add_row("on disk", f"takes more memory: {each.heavy}" if each.heavy else "with little more than some rows in memory")
    facts.add_row("to LoRA", {"exact": "exactly", "svd": "by SVD of what it adds", "": "no"}[each.to_lora])
    facts.add_row("rows of a batch", "each may have its own adapter" if each.mixes else "no")
    facts.add_row("reads the weight", "yes" if each.reads_weight else "no")
    facts.add_row("acts on", ", ".join(each.layouts))
    for layout, why in each.refused.items():
        facts.add_row("", f"[dim]not on {layout}: {short(why)}[/]")
    screen.print(facts)
    made = table("flag", "default", "meaning", title="\noptions")
    for field in each.fields:
        default = "-" if is_dataclass(field.default) else repr(field.default)
        made.add_row(f"--{field.name.replace('_', '-')}", short(default, 24), short(field.help))
    screen.print(made)
    if each.common:
        screen.print(f"[dim]and those of all methods: {', '.join('--' + f.replace('_', '-') for f in each.common)}[/]")


def _size(each: Any) -> str:
    if each.count is None:
        return ""
    shared = f", {each.shared:,} for all layers together" if each.shared else ""
    return f"numbers at a layer: {each.count:,} at 4096 x 4096{shared}"
