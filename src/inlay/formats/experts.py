"""LoRA on experts that were modules of their own, as transformers 4 had them, for a base that keeps them in stacks, as 5 does.

Transformers' own table says which tensors became which: ``experts.*.w1`` and ``experts.*.w3`` are the halves of ``gate_up_proj``. The
factors of the halves become one pair of their common rank, ``[B1 0; 0 B3] [A1; A3]``, which is the same update.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.method import matches
from ..core.site import site_of
from ..core.targets import ALL_LINEAR, base_modules, is_meant, left_out

if TYPE_CHECKING:
    from ..methods.lora import LoraConfig
    from .slots import Slot


class Stack(NamedTuple):
    """A stack of experts, and what it was.

    Attributes:
        host: the name of the module that has it. leaf: its name there.
        halves: what one expert had in its place, in the order in which the outputs follow each other.
        formerly: names under which transformers 4 had the host.
        count: of the experts.
    """

    host: str
    leaf: str
    halves: tuple[str, ...]
    formerly: tuple[str, ...]
    count: int

    def old(self, half: str) -> list[str]:
        """The names that the module of a half may have had, for each expert."""
        return [f"{host}.{e}.{half}" for host in self.formerly for e in range(self.count)]

    @property
    def router(self) -> str:
        return f"{self.host.rpartition('.')[0]}.gate"


def stacks_of(base: nn.Module) -> list[Stack]:
    """The stacks of a model whose experts were modules in transformers 4."""
    model_type = getattr(getattr(base, "config", None), "model_type", None)
    hosts = [(p, n, t) for p, m in base_modules(base) for n, t in m._parameters.items() if t is not None and t.ndim == 3]
    if not hosts or model_type is None or "transformers" not in sys.modules:
        return []
    from transformers.conversion_mapping import get_model_conversion_mapping

    halves, renamed = {}, [("", "")]
    for known in get_model_conversion_mapping(base):  # type: ignore[arg-type]
        steps = [type(step).__name__ for step in getattr(known, "operations", ())]
        if not steps and not re.search(r"[\\^$()*]", known.source_patterns[0] + known.target_patterns[0]):
            renamed.append((known.target_patterns[0], known.source_patterns[0]))
        elif steps and set(steps) <= {"MergeModulelist", "Concatenate"}:
            halves[known.target_patterns[0].rpartition(".")[2]] = tuple(p.split(".")[-2] for p in known.source_patterns)
    found = []
    for host, leaf, stack in hosts:
        if leaf in halves:
            formerly = {host: None} | {f"{host}.".replace(new, old).rstrip("."): None for new, old in renamed if new}
            found.append(Stack(host, leaf, halves[leaf], tuple(formerly), len(stack)))
    return found


# ---- the configuration ---------------------------------------------------------------------------------------------------
def mean_stacks(config: LoraConfig, base: nn.Module) -> None:
    """Where a configuration means experts, or the router before them, by the names of their modules, let it mean the parameters.

    The ranks of the halves of one stack add up there, and their scaling stays.

    Raises:
        ValueError: it means one half of a stack alone, or gives the parts of one stack different ranks or scalings.
    """
    stacks = stacks_of(base)
    wanted = config.target_modules
    if not stacks or not wanted:
        return
    everything = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR

    def means(names: Iterable[str]) -> bool:
        return any((everything or is_meant(wanted, n)) and left_out(config, n) is None for n in names)

    meant = [stack for stack in stacks if _whole(stack, means)]
    parameters = {s.leaf if all(t in meant for t in stacks if t.leaf == s.leaf) else f"{s.host}.{s.leaf}" for s in meant}
    by_name = dict(base_modules(base))
    routers = {s.router for s in stacks if isinstance(getattr(by_name.get(s.router), "_parameters", {}).get("weight"), Tensor)}
    routers = {r for r in routers if site_of(by_name[r]) is None and means([r, *_formerly(r, stacks)])}
    if routers:
        parameters.add("gate.weight")
    if not parameters:
        return
    old = {n for s in stacks for half in s.halves for n in s.old(half)} | {n for r in routers for n in (r, *_formerly(r, stacks))}
    sizes = {s: _size(config, s) for s in meant}
    for attribute in ("rank_pattern", "alpha_pattern"):
        patterns = getattr(config, attribute) or {}
        setattr(config, attribute, {k: v for k, v in patterns.items() if k in _ours(meant) or not any(matches(k, n) for n in old)})
    for stack, (rank, alpha) in sizes.items():
        if (rank, alpha) == (config.r, config.lora_alpha):
            continue
        alike = all(size == (rank, alpha) for other, size in sizes.items() if other.leaf == stack.leaf)
        pattern = rf".*\.{re.escape(stack.leaf)}" if alike else rf"^{re.escape(stack.host)}\.{re.escape(stack.leaf)}"
        for attribute, value in (("rank_pattern", rank), ("alpha_pattern", alpha)):
            getattr(config, attribute).setdefault(pattern, value)
    config.target_parameters = sorted({*(config.target_parameters or ()), *parameters})
    if not everything:
        modules = [p for p, m in by_name.items() if p not in routers and site_of(m) is not None]
        if not isinstance(wanted, str):
            config.target_modules = {w for w in wanted if any(is_meant([w], n) for n in modules) or not any(is_meant([w], n) for n in old)}
        elif routers or not any(is_meant(wanted, n) for n in modules):
            config.target_modules = {n for n in modules if is_meant(wanted, n)}


def _whole(stack: Stack, means: Any) -> bool:
    meant = [half for half in stack.halves if means(stack.old(half))]
    if 0 < len(meant) < len(stack.halves):
        missing = ", ".join(repr(half) for half in stack.halves if half not in meant)
        raise ValueError(
            f"{meant[0]!r} and {missing} are halves of {stack.host}.{stack.leaf} in this model: target {missing} as well, or none."
        )
    return bool(meant)


def _formerly(router: str, stacks: Sequence[Stack]) -> list[str]:
    return [f"{host.rpartition('.')[0]}.gate" for s in stacks if s.router == router for host in s.formerly]


def _ours(stacks: Iterable[Stack]) -> set[str]:
    return {rf".*\.{re.escape(s.leaf)}" for s in stacks}


def _size(config: LoraConfig, stack: Stack) -> tuple[int, float]:
    """Rank and alpha of a stack whose parts have those that the configuration says."""
    common, parts = (config.r, config.lora_alpha), set()
    for e, half in product(range(stack.count), stack.halves) if config.rank_pattern or config.alpha_pattern else ():
        # A pattern may name the host as it was or as it is.
        found = [(m.r, m.lora_alpha) for m in (config.at(f"{host}.{e}.{half}") for host in stack.formerly)]  # type: ignore[attr-defined]
        parts.add(next((size for size in found if size != common), common))
    parts = parts or {common}
    if len(parts) > 1:
        raise ValueError(
            f"`rank_pattern` or `alpha_pattern` gives the parts of {stack.host}.{stack.leaf} different ranks or scalings, and they are "
            "one parameter in this model: give all of them the same."
        )
    (rank, alpha), count = next(iter(parts)), len(stack.halves)
    return rank * count, alpha * (count**0.5 if config.use_rslora else count)


# ---- the tensors ---------------------------------------------------------------------------------------------------------
def in_stacks(found: Sequence[Slot], model: nn.Module, tensors: Mapping[str, Tensor], prefix: str) -> Mapping[str, Tensor]:
    """A file's tensors, those of single experts, and of the router before them, under the names and in the shapes of the stacks.

    Args:
        found: the tensors of the adapter.
        prefix: of all keys.

    Raises:
        ValueError: some of a stack's tensors are missing.
    """
    if not any(re.search(r"\.experts\.\d+\.|\.block_sparse_moe\.", key) for key in tensors):
        return tensors
    given, stacks = dict(tensors), {f"{s.host}.{s.leaf}": s for s in stacks_of(model)}
    routers = {s.router: _formerly(s.router, [s]) for s in stacks.values()}
    for slot in found:
        path = slot.holder.path if isinstance(slot.holder, Adapter) else ""
        for host in routers.get(path, ()):
            _renamed(given, f"{prefix}{host}.{slot.name}.weight", prefix + slot.key)
        if path in stacks:
            for host in stacks[path].formerly:
                _joined(given, stacks[path], f"{prefix}{host}", slot, prefix + slot.key)
    return given


def _renamed(given: dict[str, Tensor], old: str, new: str) -> None:
    if old != new and old in given:
        given[new] = given.pop(old)


def _joined(given: dict[str, Tensor], stack: Stack, host: str, slot: Slot, key: str) -> None:
    leaf = slot.name
    names = [[_key(host, e, half, leaf, given) for half in stack.halves] for e in range(stack.count)]
    missing = [f"{host}.{e}.{half}" for e, row in enumerate(names) for half, n in zip(stack.halves, row, strict=True) if n is None]
    if len(missing) == stack.count * len(stack.halves):
        return
    if missing:
        raise ValueError(f"The file has {leaf} for some of the experts of {host!r}, and none for {missing[0]!r}.")
    experts = [list(_taken(given, row)) for row in names]
    join = torch.block_diag if leaf == "lora_B" else lambda *halves: torch.cat(halves)
    given[key] = slot.to_file(torch.stack([join(*halves) for halves in experts]))


def _key(host: str, expert: int, half: str, leaf: str, given: Mapping[str, Tensor]) -> str | None:
    names = (f"{host}.{expert}.{half}.{leaf}.weight", f"{host}.{expert}.{half}.{leaf}")
    return next((name for name in names if name in given), None)


def _taken(given: dict[str, Tensor], names: Iterable[str | None]) -> Iterator[Tensor]:
    for name in names:
        assert name is not None
        yield given.pop(name)
