"""What an adapter consists of, found out and built beside the model, which is not touched.

A configuration means more than its targets: modules to retrain as a whole, single tokens, biases, and the other end of tied
weights. Each becomes a `Part`; `attach` sets the parts in.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .adapter import Adapter
from .config import PeftConfig, nearest
from .inlaid import Inlaid
from .inner import Inner
from .method import METHODS, Method
from .parallel import unwrap, whole_parameters
from .param import Param
from .site import Read, Site
from .targets import NO_TARGETS, Target, base_modules, end_of, find_targets, resolved_targets, site_at, tied_paths
from .tied import Tied

# The classes for classification name both of these, of which a model has one.
HEADS = ("classifier", "score")


@dataclass
class Part:
    """One adapter at one place, built and not yet in the model.

    Attributes:
        path: the host's name in the model.
        site: None where the whole module is retrained.
        in_file: what a file calls the host.
        shares_weight_of: the retrained module that this one is tied to.
    """

    path: str
    module: nn.Module
    site: Site | None
    adapter: nn.Module
    in_file: str
    shares_weight_of: Part | None = None

    @property
    def key(self) -> str:
        """The name of its place in the host."""
        return "" if self.site is None else self.site.name


class Biases(Method):
    """Retrains a bias and leaves the weight alone; what ``bias="all"`` puts on layers that are not adapted."""

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w, b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return inner(x)


def adapter_dtype(base: torch.dtype, autocast_adapter_dtype: bool) -> torch.dtype:
    """The policy: the base's dtype; float32 in place of half precision (unless told otherwise) and of what cannot be trained."""
    trainable = base.is_floating_point and base.itemsize > 1
    half = base in (torch.float16, torch.bfloat16)
    return torch.float32 if not trainable or (half and autocast_adapter_dtype) else base


class Plan:
    """Builds the parts of one adapter.

    Args:
        model: the model that the parts are for.
        config: the adapter's configuration.
        on_meta: allocate nothing.
        autocast_adapter_dtype: see `adapter_dtype`.
        only_folds: see `Method.to_fold` and `Method.shared_to_fold`.
    """

    def __init__(self, model: nn.Module, config: PeftConfig, on_meta: bool, autocast_adapter_dtype: bool, only_folds: bool = False) -> None:
        self.only_folds = only_folds
        self.model, self.config, self.on_meta, self.autocast = model, config, on_meta, autocast_adapter_dtype
        self.modules = dict(base_modules(model))
        self.tied = tied_paths(model)
        # The configuration's, resolved to names.
        self.target_modules: Collection[str] | None = getattr(config, "target_modules", None)
        self.follows_ties = isinstance(config, Method) and config.follows_ties

    def parts(self, only: Collection[str] | None = None) -> list[Part]:
        """All parts; those on weights only at the modules named in ``only``, if it is given.

        Raises:
            ValueError: the configuration asks for something that is not there or cannot be.
        """
        retrained = self._retrained()
        if not isinstance(self.config, Method):
            return retrained
        adapted = self._adapted(self.config, only)
        if self.follows_ties:
            adapted += self._other_ends(adapted)
        adapted += self._tokens(self.config, adapted)
        biases = self._biases(self.config, [*adapted, *retrained]) if self.config.bias == "all" else []
        return [*adapted, *biases, *retrained]

    def _site(self, path: str) -> Site | None:
        return site_at(self.modules[path])

    def _adapter(
        self,
        method: Method,
        site: Site,
        path: str,
        *,
        bank: nn.Module | None = None,
        bank_at: tuple[str, str] | None = None,
        bias: bool = False,
    ) -> Adapter:
        device = torch.device("meta") if self.on_meta else site.device
        dtype = adapter_dtype(site.dtype, self.autocast)
        adapter = Adapter(method, site, path, dtype=dtype, device=device, shared=bank, bank_at=bank_at, train_bias=bias)
        if not self.on_meta:
            method.derive(adapter)
            method.start(adapter)
        return adapter

    # -- the method at its targets --
    def _targets(self, config: Method, only: Collection[str] | None) -> list[Target]:
        if only is None:
            return find_targets(self.model, config)
        return [Target(p, s) for p in self.modules if p in only and (s := self._site(p)) is not None]

    def _adapted(self, config: Method, only: Collection[str] | None) -> list[Part]:
        config.prepare(self.model)
        targets = self._targets(config, only)
        if self.follows_ties:
            targets = self._sources_of_ties(targets)
        if only is None and config.target_modules != NO_TARGETS:
            self.target_modules = resolved_targets(self.model, config, targets)
        bank, bank_at = self._bank(config, targets), None
        parts = []
        for target in targets:
            method, site = config.at(target.name), target.site
            method = method.to_fold(site) if self.only_folds else method
            adapter = self._adapter(method, site, target.name, bank=bank, bank_at=bank_at, bias=config.bias != "none")
            bank_at = bank_at or (target.path, site.name)
            parts.append(Part(target.path, site.module, site, adapter, target.in_file or target.path))
        return parts

    def _bank(self, config: Method, targets: list[Target]) -> nn.Module | None:
        """What the layers share, where the first of them is."""
        shared = config.shared_to_fold if self.only_folds else config.shared
        bank = shared({t.name: t.site for t in targets}) if targets else None
        if bank is None:
            return None
        first = targets[0].site
        dtype = adapter_dtype(first.dtype, self.autocast)
        for q in bank.parameters():
            q.data = q.data.to(dtype)
        return bank.to(first.device)

    def _sources_of_ties(self, targets: list[Target]) -> list[Target]:
        """Targets at either end of a tie become one at the source."""
        meant = {t.path for t in targets}
        missing = {source for end, source in self.tied.items() if end in meant} - meant
        kept = [t for t in targets if t.path not in self.tied]
        return kept + [Target(p, s) for p in sorted(missing) if (s := self._site(p)) is not None]

    def _other_ends(self, parts: list[Part]) -> list[Part]:
        """The heads that share the weight of an adapted embedding."""
        by_path = {part.path: part.adapter for part in parts}
        found = []
        for path, source in self.tied.items():
            site = self._site(path)
            if source in by_path and path not in by_path and site is not None:
                tie = Tied(source=by_path[source])  # type: ignore[arg-type]
                found.append(Part(path, self.modules[path], site, self._adapter(tie, site, path), path))
        return found

    # -- what stands beside the method --
    def _tokens(self, config: Method, adapted: list[Part]) -> list[Part]:
        """Rows of embeddings that are retrained (``trainable_token_indices``)."""
        wanted = config.trainable_token_indices
        if not wanted:
            return []
        if not isinstance(wanted, dict):
            embedding = end_of(self.model, "get_input_embeddings")
            wanted = {next((p for p, m in self.modules.items() if m is embedding), "embed_tokens"): wanted}
        taken = {part.path for part in adapted}
        found: list[Part] = []
        for pattern, indices in wanted.items():
            for path in self._named(pattern, "trainable_token_indices"):
                site = self._site(path)
                if site is None or path in taken:
                    why = "is no embedding" if site is None else "is adapted already; choose one of the two"
                    raise ValueError(f"trainable_token_indices: {path!r} {why}.")
                if self.tied.get(path) in {part.path for part in found}:
                    continue
                options: dict[str, Any] = {"token_indices": list(indices), "strength": config.patterned(path).strength}
                method = METHODS["TRAINABLE_TOKENS"](as_part=True, **options)  # type: ignore[call-arg]
                reason = site.unfit or method.refuses(site)
                if reason:
                    raise ValueError(f"trainable_token_indices: {path!r}: {reason}.")
                found.append(Part(path, self.modules[path], site, self._adapter(method, site, path), f"{path}.token_adapter"))
        return found + self._other_ends(found)

    def _biases(self, config: Method, taken: list[Part]) -> list[Part]:
        """The biases of all layers that no other part has (``bias="all"``)."""
        hosts = {id(m) for part in taken for m in (part.module.modules() if part.site is None else (part.module,))}
        found = []
        for path, module in self.modules.items():
            own = module._parameters
            if id(module) not in hosts and own.get("bias") is not None and own.get("weight") is not None:
                site = self._site(path) or Read(module)
                method = Biases(strength=config.patterned(path).strength)
                found.append(Part(path, module, site, self._adapter(method, site, path, bias=True), path))
        return found

    def _retrained(self) -> list[Part]:
        """Copies of whole modules (``modules_to_save``). Tied ones stay one weight, if that was asked for."""
        wanted = getattr(self.config, "modules_to_save", None) or ()
        paths = [p for w in wanted for p in self._named(w, "modules_to_save", required=w not in HEADS)]
        if self.follows_ties:
            paths += [end for end, source in self.tied.items() if source in paths]
            paths += [source for end, source in self.tied.items() if end in paths]
        found: dict[str, Part] = {}
        for path in dict.fromkeys(paths):
            if any(path.startswith(f"{other}.") for other in paths):
                continue
            copied = pristine_copy(self.modules[path], torch.device("meta") if self.on_meta else None)
            for q in copied.parameters():
                if q.is_floating_point():
                    q.data = q.data.to(adapter_dtype(q.dtype, self.autocast))
                q.requires_grad_(q.is_floating_point())
            found[path] = Part(path, self.modules[path], None, copied, path)
        if self.follows_ties:
            for end, source in self.tied.items():
                if end in found and source in found:
                    found[end].shares_weight_of = found[source]
        return list(found.values())

    def _named(self, name: str, option: str, required: bool = True) -> list[str]:
        """The modules that a suffix means.

        Raises:
            ValueError: there are none, and there should be.
        """
        found = [p for p in self.modules if p and (p == name or p.endswith(f".{name}"))]
        if required and not found:
            raise ValueError(f"{option}: no module {name!r}.{nearest(name, {p.rpartition('.')[2] for p in self.modules})}")
        return found


def pristine_copy(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of a module as it was before any adapter.

    Args:
        device: leave the copy's tensors there without values (the meta device).

    Raises:
        ValueError: something inside it has adapters of its own.
    """
    own = [(n, m) for n, m in module.named_modules() if n != "adapters" and not n.startswith("adapters.")]
    adapted = next((n for n, m in own if isinstance(m, Inlaid) and m is not module), None)
    if adapted is not None:
        raise ValueError(f"modules_to_save would copy {adapted!r}, which has adapters itself; load them in one configuration.")
    memo: dict[int, object] = {**whole_parameters(module)}
    if isinstance(module, Inlaid):
        memo[id(module._inlay)] = {}
        memo[id(module._modules["adapters"])] = nn.ModuleDict()
    if device is not None:
        for t in [*module.parameters(), *module.buffers()]:
            empty = torch.empty_like(t, device=device)
            memo[id(t)] = nn.Parameter(empty) if isinstance(t, nn.Parameter) else empty
    copied = copy.deepcopy(module, memo)
    if isinstance(copied, Inlaid):
        copied.__class__ = type(module)._host  # type: ignore[attr-defined]
        del copied.__dict__["_inlay"], copied._modules["adapters"]
    unwrap(copied)
    return copied


def materialise(part: Part) -> None:
    """Memory and initial values for what no file had."""
    if isinstance(part.adapter, Adapter):
        part.adapter.materialise()
        return
    for path, copied in part.adapter.named_modules():
        host = part.module.get_submodule(path)
        for table, own in ((copied._parameters, host._parameters), (copied._buffers, host._buffers)):
            for key, tensor in table.items():
                if tensor is not None:
                    # A file's values came to the CPU, wherever the host is.
                    source = own[key].detach() if tensor.device.type == "meta" else tensor.detach()  # type: ignore[union-attr]
                    value = source.to(own[key].device, tensor.dtype, copy=tensor.device.type == "meta")  # type: ignore[union-attr]
                    table[key] = nn.Parameter(value, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else value  # type: ignore[assignment]
