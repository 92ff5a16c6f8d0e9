"""Setting adapters into a model and taking them out again: all of it or nothing.

`attach` first finds out everything (targets, retrained modules, tokens, biases, ties), then builds every tensor, and only
then touches the model. What fails, fails before that.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .config import PeftConfig, nearest
from .inlaid import Adapter, Inlaid, Place, Retrained, host_of, inlaid_class, inlay, places, seat, session_of, unseat
from .method import Method, Param
from .session import BASE, Session
from .site import Read, Site, site_of
from .targets import Target, architecture, base_modules, find_targets, tied_paths
from .tied import Tied


@dataclass
class Part:
    """One adapter at one place, built and not yet in the model."""

    path: str
    module: nn.Module
    site: Site | None
    adapter: nn.Module
    in_file: str = ""


class Biases(Method):
    """Retrains a bias and leaves the weight alone; what ``bias="all"`` puts on layers that are not adapted."""

    def params(self, site: Site) -> dict[str, Param]:
        return {}

    def fold(self, p, w, b):  # noqa: ANN001, ANN201
        return w, b

    def around(self, p, inner, x):  # noqa: ANN001, ANN201
        return inner(x)


def check_name(name: str, session: Session | None) -> None:
    """
    Raises:
        ValueError: the name is taken, or could not stand in a module's name or a folder's.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[^./\\\0]+", name) or name == BASE or hasattr(nn.ModuleDict(), name):
        raise ValueError(f"{name!r} cannot name an adapter: use letters, digits, '-' and '_', and no name of a Python dict's method.")
    if session is not None and name in session.configs:
        raise ValueError(f"There is an adapter {name!r} already; delete it or choose another name.")


def attach(
    model: nn.Module,
    config: PeftConfig,
    name: str = "default",
    *,
    activate_it: bool = True,
    low_cpu_mem_usage: bool = False,
    autocast_adapter_dtype: bool = True,
    only: set[str] | None = None,
    fill: Callable[[list[Part]], object] | None = None,
) -> Session:
    """Set an adapter into a model.

    Args:
        model: the bare model, or one that has adapters.
        config: a method on weights; for a method on inputs only its ``modules_to_save`` are set in.
        name: what to call the adapter.
        activate_it: make it the active one.
        low_cpu_mem_usage: leave the tensors on the meta device, to be filled by a file.
        autocast_adapter_dtype: keep the adapter in float32 where the base is in half precision.
        only: names of the modules to adapt, where the configuration is not to decide.
        fill: gives the tensors their values from a file. Nothing is allocated before it has seen the shapes.

    Raises:
        ValueError: the name, a target or an option is wrong; the message says how to mend it. The model is untouched.
    """
    session = session_of(model)
    check_name(name, session)
    session = session or Session()
    parts = plan(model, config, low_cpu_mem_usage or fill is not None, autocast_adapter_dtype, only)
    if fill is not None:
        fill(parts)
        for part in parts:
            materialise(part)
    if not session.configs:
        own = {id(q) for q in _adapter_parameters(model)}
        session.frozen = [q for q in model.parameters() if q.requires_grad and id(q) not in own]
    for q in session.frozen:
        q.requires_grad_(False)
    for part in parts:
        _set_in(session, name, part)
    model.__dict__["_inlay_session"] = session
    session.configs[name] = config
    if not config.inference_mode:
        session.trainable.add(name)
    if activate_it or not session.active:
        activate(session, (name,), model)
    _show_trainable(model, session, (name,))
    return session


def materialise(part: Part) -> None:
    """Memory and initial values for what no file had."""
    if isinstance(part.adapter, Adapter):
        part.adapter.materialise()
        return
    for owner in part.adapter.modules():
        base = part.module.get_submodule(next(n for n, m in part.adapter.named_modules() if m is owner))
        for table, own in ((owner._parameters, base._parameters), (owner._buffers, base._buffers)):
            for key, tensor in table.items():
                if tensor is not None and tensor.device.type == "meta":
                    value = own[key].detach().to(tensor.dtype, copy=True)  # type: ignore[union-attr]
                    table[key] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value  # type: ignore[assignment]


def _set_in(session: Session, name: str, part: Part) -> None:
    key = part.site.name if part.site is not None else ""
    place = part.module.__dict__.get("_inlay", {}).get(key)
    if place is None:
        place = Retrained(session, part.path, part.module) if part.site is None else Place(session, part.path, part.site)
        place.in_file = part.in_file or part.path
        inlay(part.module, place)
    elif isinstance(part.adapter, Adapter):
        part.adapter.site = place.site
    seat(place, part.module, name, part.adapter)


def plan(
    model: nn.Module, config: PeftConfig, low_cpu_mem_usage: bool, autocast_adapter_dtype: bool, only: set[str] | None = None
) -> list[Part]:
    """Everything that an adapter consists of, built beside the model."""
    modules = dict(base_modules(model))
    meta = torch.device("meta") if low_cpu_mem_usage else None

    def where(site: Site) -> dict[str, torch.dtype | torch.device]:
        return {"dtype": adapter_dtype(site.dtype, autocast_adapter_dtype), "device": meta or site.device}

    parts: list[Part] = []
    tied = tied_paths(model)
    retrained = _retrained_parts(config, modules, tied, meta, autocast_adapter_dtype)
    if isinstance(config, Method):
        config.prepare(architecture(model))
        if only is None:
            targets = find_targets(model, config)
        else:
            targets = [Target(p, s) for p in modules if p in only and (s := site_of(modules[p])) is not None]
        follow = config.ensure_weight_tying
        if follow:
            sources = set(tied.values()) & {t.path for t in targets} | ({s for p, s in tied.items() if p in {t.path for t in targets}})
            targets = [t for t in targets if t.path not in tied]
            targets += [Target(s, site) for s in sources if s not in {t.path for t in targets} and (site := site_of(modules[s]))]
        methods = [config.at(t.path if t.site.name == "weight" else f"{t.path}.{t.site.name}") for t in targets]
        bank = config.shared([t.site for t in targets]) if targets else None
        for i, (target, method) in enumerate(zip(targets, methods, strict=True)):
            train_bias = config.bias != "none"
            adapter = Adapter(
                method, target.site, target.path, **where(target.site), shared=bank, owns_shared=bank is not None and i == 0, train_bias=train_bias
            )
            if meta is None:
                method.start(adapter)
            parts.append(Part(target.path, modules_at(model, target), target.site, adapter, target.in_file))
        if follow:
            parts += _tied_parts(modules, tied, parts, where)
        parts += _token_parts(model, config, modules, tied, parts, where)
        if config.bias == "all":
            parts += _bias_parts(modules, [*parts, *retrained], where)
    return parts + retrained


def modules_at(model: nn.Module, target: Target) -> nn.Module:
    return target.site.module


def adapter_dtype(base: torch.dtype, autocast_adapter_dtype: bool) -> torch.dtype:
    """The policy: the base's dtype; float32 in place of half precision (unless told otherwise) and of what cannot be trained."""
    trainable = base.is_floating_point and base.itemsize > 1
    half = base in (torch.float16, torch.bfloat16)
    return torch.float32 if not trainable or (half and autocast_adapter_dtype) else base


def _tied_parts(modules, tied, parts, where) -> list[Part]:  # noqa: ANN001
    by_path = {p.path: p for p in parts}
    found = []
    for path, source in tied.items():
        if source in by_path:
            site = site_of(modules[path])
            assert site is not None
            found.append(Part(path, modules[path], site, Adapter(Tied(source=by_path[source].adapter), site, path, **where(site))))  # type: ignore[arg-type]
    return found


def _token_parts(model, config, modules, tied, parts, where) -> list[Part]:  # noqa: ANN001
    """Rows of embeddings that are retrained beside the method."""
    from ..methods.trainable_tokens import TrainableTokensConfig

    wanted = config.trainable_token_indices
    if not wanted:
        return []
    if not isinstance(wanted, dict):
        embedding = getattr(model, "get_input_embeddings", lambda: None)()
        path = next((p for p, m in modules.items() if m is embedding), "embed_tokens")
        wanted = {path: wanted}
    found: list[Part] = []
    for pattern, indices in wanted.items():
        paths = [p for p in modules if p == pattern or p.endswith(f".{pattern}")]
        if not paths:
            raise ValueError(f"trainable_token_indices: no module {pattern!r}.{nearest(pattern, {p.rpartition('.')[2] for p in modules})}")
        for path in paths:
            site = site_of(modules[path])
            if site is None or any(part.path == path for part in parts):
                raise ValueError(f"trainable_token_indices: {path!r} is {'adapted already' if site else 'no embedding'}; choose one of the two.")
            if path in tied and tied[path] in {p.path for p in found}:
                continue
            method = TrainableTokensConfig(token_indices=list(indices), as_part=True)
            adapter = Adapter(method, site, path, **where(site))
            if adapter.trainable_tokens_delta.device.type != "meta":
                method.start(adapter)
            found.append(Part(path, modules[path], site, adapter, f"{path}.token_adapter"))
    return found + _tied_parts(modules, {p: s for p, s in tied.items() if p not in {f.path for f in found}}, found, where)


def _bias_parts(modules, parts, where) -> list[Part]:  # noqa: ANN001
    """``bias="all"``: the biases of all layers that are not adapted."""
    taken = {id(m) for part in parts for m in (part.module.modules() if part.site is None else (part.module,))}
    found = []
    for path, module in modules.items():
        if id(module) in taken or module._parameters.get("bias") is None or module._parameters.get("weight") is None:
            continue
        site = site_of(module) or Read(module)
        found.append(Part(path, module, site, Adapter(Biases(), site, path, **where(site), train_bias=True)))
    return found


def _retrained_parts(config, modules, tied, meta, autocast_adapter_dtype) -> list[Part]:  # noqa: ANN001
    """``modules_to_save``: copies of whole modules. Copies of modules with one weight have one weight, if that was asked for."""
    wanted = list(config.modules_to_save or ()) if getattr(config, "modules_to_save", None) else []
    paths = [p for p in modules if p and any(p == w or p.endswith(f".{w}") for w in wanted)]
    for w in wanted:
        # The task's own classes name both of these, of which a model has one.
        if w not in ("classifier", "score") and not any(p == w or p.endswith(f".{w}") for p in paths):
            raise ValueError(f"modules_to_save: no module {w!r}.{nearest(w, {p.rpartition('.')[2] for p in modules})}")
    if getattr(config, "ensure_weight_tying", False):
        paths += [p for p, s in tied.items() if s in paths and p not in paths]
        paths += [s for p, s in tied.items() if p in paths and s not in paths]
    found = []
    for path in paths:
        if any(path.startswith(f"{other}.") for other in paths):
            continue
        copied = pristine_copy(modules[path], meta)
        for q in copied.parameters():
            if q.is_floating_point():
                q.data = q.data.to(adapter_dtype(q.dtype, autocast_adapter_dtype))
            q.requires_grad_(q.is_floating_point())
        found.append(Part(path, modules[path], None, copied))
    by_path = {f.path: f for f in found}
    if getattr(config, "ensure_weight_tying", False):
        for path, source in tied.items():
            if path in by_path and source in by_path:
                by_path[path].adapter._parameters["weight"] = by_path[source].adapter._parameters["weight"]
    return found


def pristine_copy(module: nn.Module, device: torch.device | None = None) -> nn.Module:
    """A copy of a module as it was before any adapter.

    Raises:
        ValueError: something inside it has adapters of its own.
    """
    inner = next((n for n, m in module.named_modules() if isinstance(m, Inlaid) and m is not module and not n.startswith("adapters.")), None)
    if inner is not None:
        raise ValueError(f"modules_to_save would copy {inner!r}, which has adapters itself; load them in one configuration.")
    memo: dict[int, object] = {}
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
    return copied


def _adapter_parameters(model: nn.Module):  # noqa: ANN202
    for place in places(model):
        for adapter in place.adapters.values():
            yield from adapter.parameters()


def activate(session: Session, names: Sequence[str], model: nn.Module | None = None) -> None:
    """Make these the active adapters, in this order. What is trainable stays so; it takes gradients while it is active."""
    session.active = session.check(names)
    if model is not None:
        _show_trainable(model, session, tuple(session.configs))


def _show_trainable(model: nn.Module, session: Session, names: Sequence[str]) -> None:
    for place in places(model):
        for name in names:
            if name in place.adapters:
                place.adapters[name].requires_grad_(name in session.trainable and name in session.active)


def detach(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model; with the last one the model is what it was, trainable parameters included."""
    session = session_of(model)
    if session is None:
        raise ValueError("The model has no adapters.")
    session.check((name,))
    for place in list(places(model)):
        if name in place.adapters:
            unseat(place, host_of(place), name)
    session.forget(name)
    del session.configs[name]
    _show_trainable(model, session, session.active)
    if not session.configs:
        for q in session.frozen:
            q.requires_grad_(True)
        model.__dict__.pop("_inlay_session", None)


__all__ = ["Part", "activate", "attach", "check_name", "detach", "inlaid_class", "plan", "pristine_copy"]
