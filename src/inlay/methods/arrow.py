"""Arrow: each token goes to the adapters whose updates it moves most (Ostapenko et al. 2024, arXiv 2405.11157), a variant of LoRA.

The prototype of an adapter at a layer is the input that its update ``D`` stretches most: the first right singular vector, by power
iteration on ``D'D``. A token's score is the size of its component along it.

GenKnowSub subtracts from the factors of each task's adapter the mean factors of general ones, when they are used; the adapters
themselves stay as they are.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import add
from ..core.method import folded, full
from ..core.param import generator_for
from ..core.site import Site
from .lora import LoraConfig, is_linear

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner
    from ..model import PeftModel

ROUNDS = 15
TASK, GENERAL, ROUTER = "task_", "gks_", "arrow_router"


@dataclass
class ArrowConfig:
    """Options of Arrow.

    Args:
        top_k: how many adapters a token goes to.
        router_temperature: of the softmax over their scores.
        use_gks: subtract what general adapters know (GenKnowSub) from those of the tasks.
        task_adapter_names, gks_adapter_names: set by `create_arrow_model`. Adapters that join later are routed to as well.
        rng_seed: of the start of the power iteration.

    Raises:
        ValueError: a number is not positive.
    """

    top_k: int = field(default=3, metadata={"help": "How many adapters a token goes to."})
    router_temperature: float = field(default=1.0, metadata={"help": "Temperature of the softmax over the scores."})
    use_gks: bool = field(default=False, metadata={"help": "Subtract what general adapters know."})
    task_adapter_names: list[str] | None = field(default=None, init=False, metadata={"help": "Set by create_arrow_model."})
    gks_adapter_names: list[str] | None = field(default=None, init=False, metadata={"help": "Set by create_arrow_model."})
    rng_seed: int | None = field(default=None, metadata={"help": "Seed of the start of the power iteration."})

    def __post_init__(self) -> None:
        for name in ("top_k", "router_temperature"):
            if getattr(self, name) <= 0:
                raise ValueError(f"`{name}` should be positive, not {getattr(self, name)!r}.")

    def is_general(self, name: str) -> bool:
        return name in (self.gks_adapter_names or ()) or re.fullmatch(rf"{GENERAL}\d+", name) is not None


class Arrow(LoraConfig):
    """LoRA with an ``arrow_config``: a router. As in HF's files, it has factors of its own, which do nothing."""

    unmergeable: ClassVar[str] = "Arrow gives each token adapters of its own, and a weight acts on all tokens."

    def refuses(self, site: Site) -> str | None:
        return super().refuses(site) if is_linear(site) else "Arrow compares the features of its tokens, which it has not"

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        from ..operations.route import place_of, routed

        options: ArrowConfig = self.arrow_config
        others = {n: e for n, e in place_of(p).adapters.items() if not isinstance(e.method, Arrow)}
        experts = [e for n, e in others.items() if not options.is_general(n)]
        y = inner(x)
        if not experts:
            return y
        factors = self._purified(experts, [e for n, e in others.items() if options.is_general(n)]) if options.use_gks else None
        towards = self._prototypes(p, inner, experts, factors)
        scores = (x.to(towards.dtype) @ towards.mT).abs()
        best, which = scores.topk(min(options.top_k, len(experts)), -1)
        gates = torch.zeros_like(scores).scatter(-1, which, torch.softmax(best / options.router_temperature, -1))
        added = F.dropout(routed(inner, x, y, experts, gates, factors), self.dropout, p.training)
        return add(y, added, p.strength)

    def _purified(self, experts: list[Adapter], general: list[Adapter]) -> list[tuple[Tensor, Tensor]]:
        """The experts' factors without the mean of those of general adapters."""
        found = [(e.name, e.method.factors(e)) for e in (*experts, *general) if isinstance(e.method, LoraConfig)]
        shapes = {tuple(t.shape for t in pair) for _, pair in found}
        if not general or len(found) < len(experts) + len(general) or len(shapes) > 1:
            raise ValueError("GenKnowSub (`use_gks`) subtracts factors: it needs general adapters, and all to be LoRA of one rank.")
        mean_a, mean_b = (torch.stack([pair[i] for _, pair in found[len(experts) :]]).mean(0) for i in (0, 1))
        scales = [e.method.scaling * e.strength for e in experts]  # type: ignore[attr-defined]
        return [(a - mean_a, s * (b - mean_b)) for (_, (a, b)), s in zip(found, scales, strict=False)]

    @torch.no_grad()
    def _prototypes(self, p: Adapter, inner: Inner, experts: list[Adapter], factors: list[tuple[Tensor, Tensor]] | None) -> Tensor:
        """A direction for each expert ``(experts, in)``; computed again when an expert has changed."""
        from ..operations.route import factors_of, place_of

        known = p.__dict__.get("_known")
        if known is not None and torch.compiler.is_compiling():
            return known[1]
        key = tuple((n, id(t), t._version, t.device) for n, e in place_of(p).adapters.items() if e is not p for t in e.parameters())
        if known is None or known[0] != key:
            pairs = [factors_of(e) for e in experts] if factors is None else factors
            found = [self._prototype(inner, e, pair) for e, pair in zip(experts, pairs, strict=True)]
            known = p.__dict__["_known"] = key, torch.stack(found)
        return known[1]

    def _prototype(self, inner: Inner, expert: Adapter, factors: tuple[Tensor, Tensor] | None) -> Tensor:
        if factors is None:
            w, b = inner.params()
            change = folded(expert, w, b)[0] - full(w)
            factors = change, torch.eye(len(change), device=change.device, dtype=change.dtype)
        a, b = map(full, factors)
        gram = b.mT @ b
        seed = self.arrow_config.rng_seed
        draw = generator_for(None, "arrow") if seed is None else torch.Generator(a.device).manual_seed(seed)
        v = torch.randn(a.shape[1], generator=draw, dtype=a.dtype, device=draw.device).to(a.device)
        for _ in range(ROUNDS):
            v = F.normalize(a.mT @ (gram @ (a @ v)), dim=0, eps=1e-8)
        return v

    def __getstate__(self) -> dict[str, Any]:
        return dict(self.__dict__)


def create_arrow_model(
    base_model: nn.Module,
    task_specific_adapter_paths: list[str],
    arrow_config: ArrowConfig,
    general_adapter_paths: list[str] | None = None,
    **adapter_kwargs: Any,
) -> PeftModel:
    """A model whose tokens are routed to trained adapters.

    Args:
        base_model: the base; changed in place.
        task_specific_adapter_paths: folders or repositories of the adapters; a repository's path may go on into a subfolder.
        arrow_config: the router's options.
        general_adapter_paths: the adapters that ``use_gks`` subtracts.
        adapter_kwargs: for loading them.

    Raises:
        ValueError: there are no adapters, or they do not fit the base or each other.
    """
    from ..core.inlaid import places
    from ..core.place import Place
    from ..model import PeftModel

    if not task_specific_adapter_paths:
        raise ValueError("`task_specific_adapter_paths` should contain at least one adapter path.")
    if arrow_config.use_gks and not general_adapter_paths:
        raise ValueError("`use_gks` needs `general_adapter_paths`: the adapters whose knowledge is subtracted.")
    sources = {f"{TASK}{i}": path for i, path in enumerate(task_specific_adapter_paths)}
    arrow_config.task_adapter_names = list(sources)
    general = {f"{GENERAL}{i}": path for i, path in enumerate(general_adapter_paths or ())} if arrow_config.use_gks else {}
    arrow_config.gks_adapter_names = list(general)
    model: PeftModel | None = None
    for name, source in (sources | general).items():
        path, subfolder = _resolved(source)
        options = {"subfolder": subfolder, **adapter_kwargs} if subfolder else adapter_kwargs
        if model is None:
            model = PeftModel.from_pretrained(base_model, path, adapter_name=name, **options)
        else:
            model.load_adapter(path, adapter_name=name, **options)
    assert model is not None
    names = sorted({p.path.rpartition(".")[2] for p in places(model.get_base_model()) if isinstance(p, Place)})
    first = model.peft_config[f"{TASK}0"]
    model.add_adapter(ROUTER, LoraConfig(arrow_config=arrow_config, target_modules=names, r=getattr(first, "r", 8)))
    model.set_adapter(ROUTER)
    return model


def _resolved(source: str) -> tuple[str, str | None]:
    """A local folder, or a repository ``owner/name`` and what lies below it."""
    parts = str(source).strip("/").split("/")
    if Path(source).exists() or len(parts) <= 2:
        return str(source), None
    return "/".join(parts[:2]), "/".join(parts[2:])
