"""What each method can do, found out from its class: for ``inlay methods``, the docs and whoever wants to choose one.

Nothing is written down twice. A method is asked what it declares, what it refuses and whether it folds, on small hosts of every
layout.
"""

from __future__ import annotations

import inspect
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from .core.adapter import Adapter
from .core.additive import Additive, LowRank
from .core.config import CONFIGS, PeftConfig, config_class
from .core.families import Rotation
from .core.inner import Inner
from .core.method import Method
from .core.site import Read, Site, Stack, site_of
from .initializers import NAMES
from .initializers.started import Started, no_factors

# One host of each layout, with sizes that differ.
HOSTS: dict[str, Callable[[], Site]] = {
    "Linear": lambda: _site(nn.Linear(8, 6)),
    "Embedding": lambda: _site(nn.Embedding(10, 8)),
    "Conv": lambda: _site(nn.Conv2d(4, 6, 3)),
    "grouped Conv": lambda: _site(nn.Conv2d(4, 8, 3, groups=2)),
    "ConvTranspose": lambda: _site(nn.ConvTranspose2d(4, 6, 3)),
    "norms": lambda: _site(nn.LayerNorm(8)),
    "MultiheadAttention": lambda: Read(nn.MultiheadAttention(8, 2), "in_proj_weight", "in_proj_bias"),
    "raw parameters, experts": lambda: Stack(_experts(), "stack"),
}
# The layer for which numbers of parameters are given.
WIDE = 4096
# Fields that say nothing about the mathematics.
COMMON = {f.name for f in fields(Method)}


def _site(module: nn.Module) -> Site:
    found = site_of(module)
    assert found is not None
    return found


def _experts() -> nn.Module:
    module = nn.Module()
    module.stack = nn.Parameter(torch.randn(2, 8, 6))
    return module


@dataclass
class Field:
    """One field of a method's configuration."""

    name: str
    default: Any
    help: str


@dataclass
class Capabilities:
    """What one method is and can do.

    Attributes:
        name: as in a file; ``config`` is the class.
        title: the first line of its file.
        paper: the number at arXiv, or the address of a paper that is not there; ``paper_link`` is its address.
        equation: what becomes of the weight.
        kind: low-rank, additive, rotation, a map on the weight, on modules, or on inputs.
        merges: it is a function of the weight, and merging undoes itself to the bit; else ``why_not`` says why it is none.
        heavy: why merging on disk takes more memory than a few times the weight, with default options; empty where it does not.
        to_lora: ``"exact"``, ``"svd"`` (the best rank-r approximation of what it adds) or ``""``.
        reads_weight: its forward needs the values of the weight, which a quantised host restores for it.
        mixes: each row of a batch may have its own adapter of this method.
        layouts: where it acts; ``refused`` gives the reason where it does not.
        parameters: how many numbers it trains at a layer, as a formula in the layer's sizes and the options.
        count: the same as a number, with default options for a layer of 4096 x 4096; None where the defaults do not fit it.
        shared: how many numbers all layers have in common, with default options and one such layer.
        fields: its own options; ``common`` are those of all methods.
        starts: what its tensors can start from, beside true and false.
        no_starts: why those that are functions of the weight or of data are not among them; empty where they are.
        lines: of its file.
    """

    name: str
    config: str
    title: str
    paper: str
    equation: str
    kind: str
    merges: bool
    why_not: str
    heavy: str
    to_lora: str
    reads_weight: bool
    mixes: bool
    layouts: list[str]
    refused: dict[str, str]
    parameters: str
    count: int | None
    shared: int
    fields: list[Field] = field(default_factory=list)
    common: list[str] = field(default_factory=list)
    starts: list[str] = field(default_factory=list)
    no_starts: str = ""
    lines: int = 0

    @property
    def paper_link(self) -> str:
        return f"https://arxiv.org/abs/{self.paper}" if re.fullmatch(r"[\d.]+", self.paper) else self.paper


def method_names() -> list[str]:
    """The names of all registered methods, sorted."""
    config_class("LORA")
    return sorted(CONFIGS)


def capabilities(name: str) -> Capabilities:
    """What a method can do.

    Args:
        name: as in a file, in any case.

    Raises:
        ValueError: there is no such method; with a near miss.
    """
    cls = config_class(name.upper().replace("-", "_"))
    module = inspect.getmodule(cls)
    source = inspect.getsource(module) if module is not None else ""
    text = (module.__doc__ if module is not None else None) or cls.__doc__ or ""
    own = [Field(f.name, _default(f), str(f.metadata.get("help", ""))) for f in fields(cls) if f.name not in COMMON and f.init]
    own = [f for f in own if f.name not in _of_every_config()]
    common = sorted(f.name for f in fields(cls) if f.name in COMMON and f.name not in _of_every_config())
    found = _on_weights(cls) if issubclass(cls, Method) else _on_inputs(cls)
    return Capabilities(
        name=str(cls.__dataclass_fields__["peft_type"].default),
        config=cls.__name__,
        title=_first_sentence(text),
        paper=getattr(cls, "paper", ""),
        fields=own,
        common=common,
        starts=_starts(cls, module),
        no_starts=no_factors(cls) if issubclass(cls, Method) else "",
        lines=len(source.splitlines()),
        **found,
    )


def _starts(cls: type[PeftConfig], module: Any) -> list[str]:
    if issubclass(cls, Started) and isinstance(method := example(cls), Started):
        return [name for name in (*NAMES, *cls.own_inits) if not method.unfit(name.partition("_niter_")[0])]
    return list(getattr(module, "INITS", ()))


def _first_sentence(text: str) -> str:
    """Without the authors in brackets, and without the signs of a docstring."""
    line = " ".join(text.split("\n\n")[0].split())
    line = re.sub(r"\s\((?:[A-Z][^()]*\d{4}|arXiv)[^()]*\)", "", line)
    return re.split(r"(?<!\.)\.(?:\s+(?=[A-Z])|$)", line)[0].replace("``", "`")


def _of_every_config() -> set[str]:
    return {f.name for f in fields(PeftConfig)}


def _default(f: Any) -> Any:
    return f.default_factory() if f.default_factory is not MISSING else f.default


def _on_inputs(cls: type[PeftConfig]) -> dict[str, Any]:
    return {
        "equation": getattr(cls, "equation", "") or "virtual tokens before the input",
        "kind": "on inputs",
        "merges": False,
        "why_not": "it acts on inputs and changes no weight",
        "heavy": "",
        "to_lora": "",
        "reads_weight": False,
        "mixes": True,
        "layouts": ["whole model"],
        "refused": {},
        "parameters": getattr(cls, "count_formula", "") or "num_virtual_tokens·hidden",
        "count": None,
        "shared": 0,
    }


def _on_weights(cls: type[Method]) -> dict[str, Any]:
    method = example(cls)
    modules = cls.site_of is not Method.site_of
    merges = not method.unmergeable and cls.fold is not Method.fold
    refused = {} if modules else {name: why for name, build in HOSTS.items() if (why := method.refuses(build())) is not None}
    count, shared = (None, 0) if modules else _counts(cls)
    return {
        "equation": cls.equation,
        "kind": _kind(cls, modules),
        "merges": merges,
        "why_not": method.unmergeable if not merges else "",
        "heavy": method.heavy if merges else "",
        "to_lora": "exact" if issubclass(cls, LowRank) and merges else "svd" if merges else "",
        "reads_weight": not modules and _reads_weight(method, refused),
        "mixes": True,
        "layouts": ["whole modules"] if modules else [name for name in HOSTS if name not in refused],
        "refused": refused,
        "parameters": cls.count_formula if modules else _formula(cls),
        "count": count,
        "shared": shared,
    }


def _kind(cls: type[Method], modules: bool) -> str:
    if modules:
        return "on modules"
    kinds = ((LowRank, "low-rank"), (Additive, "additive"), (Rotation, "rotation"))
    return next((kind for family, kind in kinds if issubclass(cls, family)), "on the weight")


def example(cls: type[Method], **more: Any) -> Method:
    """A configuration for small hosts: the first of those that the law runs on."""
    return cls(**{"target_modules": ["host"], **next(iter(cls.examples.values())), **more})  # type: ignore[return-value]


def _adapter(method: Method, site: Site, device: str = "cpu") -> Adapter:
    bank = method.shared({"host": site})
    made = Adapter(method.at("host"), site, "host", dtype=torch.float32, device=torch.device(device), shared=bank)
    if device == "cpu":
        made.method.derive(made)
        made.method.start(made)
    return made


class _Read(Exception):
    pass


def _reads_weight(method: Method, refused: dict[str, str]) -> bool:
    """Whether the forward of an adapter on a linear layer asks for the layer's weight."""
    if "Linear" in refused:
        return True
    site = HOSTS["Linear"]()
    p = _adapter(method, site).eval()

    def params() -> tuple[Tensor, Tensor | None]:
        raise _Read

    inner = Inner(site, lambda x: site.apply(x, *site.read()), params, bias=site.bias)
    try:
        with torch.no_grad():
            p.method.around(p, inner, torch.randn(2, 8))
    except _Read:
        return True
    return False


def _counts(cls: type[Method]) -> tuple[int | None, int]:
    """Numbers trained at one wide layer and in the bank, with default options."""
    site = _site(nn.Linear(WIDE, WIDE, device="meta"))
    try:
        method = cls(target_modules=["host"], **_needed(cls))  # type: ignore[call-arg]
        if method.refuses(site) is not None:
            return None, 0
        bank = method.shared({"host": site})
        declared = method.at("host").params(site)
    except (ValueError, TypeError, RuntimeError):
        return None, 0
    trained = sum(prod(q.shape(site)) for q in declared.values() if q.trainable)
    return trained or None, sum(q.numel() for q in bank.parameters()) if bank is not None else 0


def _needed(cls: type[Method]) -> dict[str, Any]:
    """Options without which a configuration cannot be made at all."""
    example = next(iter(cls.examples.values()))
    for needed in ({}, *({name: value} for name, value in example.items())):
        try:
            cls(target_modules=["host"], **needed)
        except (ValueError, TypeError):
            continue
        return needed
    return example


def _formula(cls: type[Method]) -> str:
    """Sizes of the trained tensors at a layer, in its sizes and the method's options: ``r·in + out·r``."""
    if cls.count_formula:
        return cls.count_formula
    site, method = _site(nn.Linear(17, 19)), example(cls).at("host")
    if method.refuses(site) is not None:
        return ""
    names = {value: name for f in reversed(fields(cls)) if type(value := getattr(method, name := f.name)) is int and value > 1}
    names |= {1: "1"} | ({method.r: "r"} if "r" in method.field_names() else {})  # type: ignore[attr-defined]

    def axis(size: str | int) -> str:
        return names.get(size, "") if isinstance(size, int) else {"channel": "out", "feature": "in"}.get(size, size)

    terms = Counter()
    for q in method.params(site).values():
        if q.trainable:
            sizes = [name for name in map(axis, q.axes) if name != "1"]
            if "" in sizes:
                return ""
            terms["·".join(sizes) or "1"] += 1
    return " + ".join(f"{n}·{term}" if n > 1 else term for term, n in terms.items())
