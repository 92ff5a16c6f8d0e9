"""Which modules a configuration means, and why not the others."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .config import nearest
from .inlaid import Inlaid
from .method import Method, matches
from .site import Embedding, Norm, Read, Site, Stack, site_of

ALL_LINEAR = "all-linear"
# The word that asks for an adapter without any target; other libraries use it to reserve a name.
NO_TARGETS = "dummy-target-modules"

# The modules that are adapted where a configuration names none, by `model_type` of the base.
_QKV = ["q_proj", "v_proj"]
# A regular expression keeps out a part of the base, such as what sees and hears.
DEFAULT_TARGETS: dict[str, list[str] | str] = {
    "t5": ["q", "v"], "mt5": ["q", "v"], "umt5": ["q", "v"], "bart": _QKV, "opt": _QKV, "blip-2": ["q", "v", *_QKV],
    "gpt2": ["c_attn"], "gpt_bigcode": ["c_attn"], "bloom": ["query_key_value"], "gpt_neox": ["query_key_value"],
    "gptj": _QKV, "gpt_neo": _QKV, "bert": ["query", "value"], "roberta": ["query", "value"], "camembert": ["query", "value"],
    "xlm-roberta": ["query", "value"], "electra": ["query", "value"], "deberta": ["in_proj"],
    "deberta-v2": ["query_proj", "value_proj"], "layoutlm": ["query", "value"], "distilbert": ["q_lin", "v_lin"],
    "modernbert": ["Wqkv"], "llama": _QKV, "llama4": _QKV, "mistral": _QKV, "ministral": _QKV, "mistral3": _QKV,
    "mixtral": _QKV, "chatglm": ["query_key_value"], "falcon": ["query_key_value"], "mpt": ["Wqkv"], "stablelm": _QKV,
    "btlm": ["c_proj", "c_attn"], "codegen": ["qkv_proj"], "phi": ["q_proj", "v_proj", "fc1", "fc2"], "phi3": ["qkv_proj"],
    "gemma": _QKV, "gemma2": _QKV, "gemma3_text": _QKV, "gemma3": _QKV, "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "qwen": ["c_attn"], "qwen2": _QKV, "RefinedWeb": ["query_key_value"], "RefinedWebModel": ["query_key_value"],
    "nemotron_h": ["q_proj", "k_proj", "v_proj", "o_proj"], "qwen2_moe": _QKV, "qwen3": _QKV, "qwen3_moe": _QKV,
    "rwkv": ["key", "value", "receptance", "output"],
    "rwkv7": ["r_proj", "k_proj", "v_proj", "o_proj", "key", "value"], "cohere": _QKV, "olmo2": _QKV, "olmo3": _QKV, "granite": _QKV,
    "vit": ["query", "value"], "whisper": _QKV, "gpt_oss": _QKV, "deepseek_v3": ["q_a_proj", "q_b_proj", "kv_b_proj"],
}  # fmt: skip

# Hosts that read the weights of these children themselves, so that the children's own forward never runs.
READ_BY_PARENT: dict[type[nn.Module], tuple[str, ...]] = {
    nn.MultiheadAttention: ("out_proj",),
    nn.TransformerEncoderLayer: ("linear1", "linear2", "norm1", "norm2"),
}


class NoMatchingPeftModuleError(ValueError):
    """A configuration matches no module of the model."""


@dataclass
class Target:
    """One weight to adapt: the host's name in the model and the site.

    Attributes:
        in_file: what a file calls the host, where HF peft nests its wrappers; empty stands for ``path``.
    """

    path: str
    site: Site
    in_file: str = ""

    @property
    def name(self) -> str:
        """What patterns of the configuration are matched against."""
        return self.path if self.site.name in ("weight", "whole") else f"{self.path}.{self.site.name}"


@dataclass
class Explanation:
    """What `explain_targets` found.

    Attributes:
        matched: names of the weights that get an adapter.
        excluded: names that matched, with what took them out again.
        refused: names that matched, with the reason why the method cannot act there.
        unmatched: for each pattern that matched nothing, a suggestion (or an empty string).
        frozen: names of adaptable modules that no pattern means.
    """

    matched: list[str] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    frozen: list[str] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        lines = [f"{len(self.matched)} weights get an adapter:", *(f"  + {n}" for n in self.matched)]
        for title, sign, found in (("excluded", "-", self.excluded), ("not possible", "!", self.refused)):
            if found:
                lines += [f"{len(found)} {title}:", *(f"  {sign} {n}: {why}" for n, why in found.items())]
        if self.unmatched:
            lines += ["patterns that match nothing:", *(f"  ? {n!r}.{hint}" for n, hint in self.unmatched.items())]
        if self.frozen:
            lines += [f"{len(self.frozen)} could be adapted and are not:", *(f"  . {n}" for n in self.frozen)]
        return "\n".join(lines)


def explain_targets(model: nn.Module, config: Method) -> Explanation:
    """What a configuration matches in a model, what it does not, and why; nothing is changed.

    Args:
        model: any module; a model that has adapters already is looked at as if it had none.
        config: the configuration of a method on weights.
    """
    model = bare_model(model)
    config.prepare(model)
    found = Explanation()
    modules = base_modules(model)
    by_name = dict(modules)
    wanted = effective_targets(model, config)
    hit: set[str] = set()
    meant: dict[str, nn.Module] = {}
    for path, module in modules:
        if not path:
            continue
        pattern = target_for(wanted, path)
        if pattern is None:
            if site_of(module) is not None:
                found.frozen.append(path)
            continue
        hit.add(pattern)
        why = left_out(config, path)
        if why:
            found.excluded[path] = why
        else:
            meant[path] = module
    chosen = set(config.chosen(list(meant)))
    for path, module in meant.items():
        if path not in chosen:
            found.excluded[path] = f"{type(config).__name__} takes {len(chosen)} of the {len(meant)} that match"
            continue
        own = config.site_of(module)
        sites = _sites(module, by_name, path) if own is None else [Target(path, _known(module, own.name, own))]
        if not sites:
            found.refused[path] = f"a {type(module).__name__} has no weight that is known as a matrix"
        for target in sites:
            method = config.at(path)
            reason = target.site.unfit or method.refuses(target.site)
            if reason:
                found.refused[path] = reason
            else:
                found.matched.append(path)
                found.targets.append(target)
    parameters = _parameters(modules, config, found)
    _check_patterns(config, wanted, hit, parameters, list(by_name), found)
    return found


def find_targets(model: nn.Module, config: Method) -> list[Target]:
    """The weights that a configuration means.

    Raises:
        NoMatchingPeftModuleError: nothing matches, or a pattern of the configuration matches nothing; with a near miss.
        ValueError: a module that is meant cannot take the method, with the reason.
    """
    if config.target_modules == NO_TARGETS:
        return []
    found = explain_targets(model, config)
    if found.refused:
        path, why = next(iter(found.refused.items()))
        raise ValueError(f"{type(config).__name__} cannot act on {path!r}: {why}. Take it out with `exclude_modules`.")
    if not found.targets and not (config.trainable_token_indices and not config.target_modules):
        if found.excluded and not found.unmatched:
            path, why = next(iter(found.excluded.items()))
            raise NoMatchingPeftModuleError(f"All modules that match were excluded; {path!r}: {why}.")
        hints = "; ".join(f"{name!r} matches nothing.{hint}" for name, hint in found.unmatched.items())
        raise NoMatchingPeftModuleError(
            f"Target modules {_shown(config.target_modules)} not found in the base model. {hints or 'No `target_modules` were passed.'} "
            "`inlay.explain_targets(model, config)` shows what could be adapted."
        )
    if found.unmatched:
        hints = "; ".join(f"{name!r} matches nothing.{hint}" for name, hint in found.unmatched.items())
        raise NoMatchingPeftModuleError(f"Patterns without a module: {hints}")
    return found.targets


def _shown(wanted: Any) -> str:
    return str(sorted(wanted)) if isinstance(wanted, (set, list)) else repr(wanted)


def bare_model(model: nn.Module) -> nn.Module:
    """What a `PeftModel` wraps; other models are themselves."""
    get: Any = getattr(model, "get_base_model", None)
    return model if get is None else get()


def base_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules of the model, without those of its adapters."""
    found: dict[nn.Module, str] = {}

    def walk(path: str, module: nn.Module) -> None:
        found[module] = path
        for name, child in module._modules.items():
            if child is not None and child not in found and not (name == "adapters" and isinstance(module, Inlaid)):
                walk(f"{path}.{name}" if path else name, child)

    walk("", model)
    return [(path, module) for module, path in found.items()]


def effective_targets(model: nn.Module, config: Method) -> Collection[str]:
    """``target_modules`` with defaults and ``"all-linear"`` resolved.

    Raises:
        ValueError: no targets are given and the architecture has no defaults.
    """
    wanted = config.target_modules
    if isinstance(wanted, str) and wanted.lower() == ALL_LINEAR:
        return _all_linear(model, config)
    if wanted is not None or config.target_parameters:
        return wanted if wanted is not None else set()
    model_type = architecture(model)
    table = config.default_targets()
    if model_type not in table:
        if config.trainable_token_indices:
            return set()
        raise ValueError(f"Please specify `target_modules`: there is no default for architecture {model_type!r}.")
    names = table[str(model_type)]
    return names if isinstance(names, str) else set(names)


def architecture(model: nn.Module) -> str | None:
    """The ``model_type`` of a model of transformers."""
    return getattr(getattr(model, "config", None), "model_type", None)


def resolved_targets(model: nn.Module, config: Method, targets: Iterable[Target]) -> Collection[str] | None:
    """``target_modules`` as names, for the file: its readers resolve neither defaults nor ``"all-linear"``."""
    wanted = config.target_modules
    shorthand = isinstance(wanted, str) and wanted.lower() == ALL_LINEAR
    if not shorthand:
        return wanted if wanted is not None or config.target_parameters else set(effective_targets(model, config))
    names = [p for p, _ in base_modules(model)]
    paths = {t.path for t in targets if not isinstance(t.site, Stack)}
    for found in ({p.rpartition(".")[2] for p in paths}, paths):
        if {n for n in names if target_for(found, n) is not None} == paths:
            return found
    return "|".join(re.escape(p) for p in sorted(paths))


class Exactly(frozenset[str]):
    """Whole names, where other collections of names hold ends of names as well."""


def _all_linear(model: nn.Module, config: Method) -> Exactly:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    names = set()
    for path, module in base_modules(model):
        site = site_of(module)
        if site is None or site.reads or type(site).__name__ not in ("Linear", "TransposedLinear") or module is head:
            continue
        # The head of a sequence classifier is retrained as a whole.
        if config.task_type == "SEQ_CLS" and path.rpartition(".")[2] in ("classifier", "score"):
            continue
        names.add(path)
    return Exactly(names)


def is_meant(wanted: Collection[str], path: str) -> bool:
    """Whether ``target_modules`` or their like mean this module."""
    return target_for(wanted, path) is not None


def target_for(wanted: Collection[str], path: str) -> str | None:
    """The pattern that means this module."""
    if isinstance(wanted, str):
        return wanted if re.fullmatch(wanted, path) else None
    if path in wanted or isinstance(wanted, Exactly):
        return path if path in wanted else None
    return next((w for w in wanted if path.endswith(f".{w}")), None)


def left_out(config: Method, path: str) -> str | None:
    """Why a module that the targets mean gets no adapter; None where it gets one."""
    return _excluded(config, path) or (None if config.layers_to_transform is None else _outside_layers(config, path))


def _excluded(config: Method, path: str) -> str | None:
    if config.exclude_modules:
        hit = target_for(config.exclude_modules, path)
        if hit is not None:
            return f"exclude_modules has {hit!r}"
    for name in config.modules_to_save or ():
        if re.match(rf"(^|.*\.){name}($|\..*)", path):
            return f"modules_to_save retrains {name!r} as a whole"
    return None


def _outside_layers(config: Method, path: str) -> str | None:
    indices = config.layers_to_transform
    indices = [indices] if isinstance(indices, int) else indices
    if not indices:
        return None
    patterns = [config.layers_pattern] if isinstance(config.layers_pattern, str) else config.layers_pattern
    # The first number in the name is the block's; a later one may be an expert's.
    expressions = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in patterns] if patterns else [r".*?\.[^.]*\.(\d+)\."]
    match = next((m for e in expressions if (m := re.match(e, path))), None)
    if match is None:
        return "it is in no numbered block"
    return None if int(match[1]) in indices else f"block {match[1]} is not in layers_to_transform"


def site_at(module: nn.Module, name: str = "weight") -> Site | None:
    """The site of a module's weight: the one that adapters sit at already, or a new one."""
    place = module.__dict__.get("_inlay", {}).get(name)
    return site_of(module) if place is None else place.site


def _known(module: nn.Module, name: str, new: Site) -> Site:
    place = module.__dict__.get("_inlay", {}).get(name)
    return new if place is None else place.site


def _sites(module: nn.Module, modules_by_name: dict[str, nn.Module], path: str) -> list[Target]:
    parent_path, _, child = path.rpartition(".")
    parent = modules_by_name.get(parent_path)
    if isinstance(module, nn.MultiheadAttention):
        return _attention(module, path)
    site = site_at(module)
    if site is None:
        return []
    for cls, children in READ_BY_PARENT.items():
        if isinstance(parent, cls) and child in children and not site.reads:
            site = Read(module)
    return [Target(path, site)]


def _attention(module: nn.MultiheadAttention, path: str) -> list[Target]:
    """An attention of torch: its packed (or separate) projections, and the one behind it."""
    packed = module.in_proj_weight is not None
    names = ["in_proj_weight"] if packed else ["q_proj_weight", "k_proj_weight", "v_proj_weight"]
    bias = "in_proj_bias" if packed else None
    targets = [Target(path, _known(module, n, Read(module, n, bias)), path if packed else f"{path}.{n}") for n in names]
    out = _known(module.out_proj, "weight", Read(module.out_proj, "weight", "bias"))
    return [*targets, Target(f"{path}.out_proj", out, f"{path}.base_layer.out_proj")]


def _parameters(modules: Iterable[tuple[str, nn.Module]], config: Method, found: Explanation) -> set[str]:
    """Sites on raw parameters; returns the names of ``target_parameters`` that are there."""
    hit: set[str] = set()
    if not config.target_parameters:
        return hit
    for path, module in modules:
        own = []
        for name in module._parameters:
            full_name = f"{path}.{name}" if path else name
            pattern = target_for(set(config.target_parameters), full_name)
            if pattern is not None and module._parameters[name] is not None:
                hit.add(pattern)
                own.append((name, full_name))
        for i, (name, full_name) in enumerate(own):
            site = _known(module, name, Stack(module, name))
            if len(site.raw_shape) not in (2, 3):
                found.refused[full_name] = f"a parameter of shape {tuple(site.raw_shape)} is neither a matrix nor a stack of matrices"
                continue
            reason = config.at(path).refuses(site)
            if reason:
                found.refused[full_name] = reason
                continue
            found.matched.append(full_name)
            found.targets.append(Target(path, site, path + ".base_layer" * (len(own) - 1 - i)))
    return hit


def _check_patterns(
    config: Method, wanted: Collection[str], hit: set[str], parameters: set[str], names: list[str], found: Explanation
) -> None:
    """Collect every pattern that means nothing, with what may have been meant."""
    ends = {n.rpartition(".")[2] for n in names if n} | set(names)
    if isinstance(wanted, str):
        if wanted not in hit:
            found.unmatched[wanted] = ""
    else:
        # One name of several may be absent (defaults of a family of architectures); of those that a user wrote, none may.
        missing = sorted(set(wanted) - hit)
        explicit = not isinstance(config.target_modules, str) and config.target_modules is not None
        if not hit or explicit:
            covered = {w for w in missing if any(h.endswith(f".{w}") or w.endswith(f".{h}") for h in hit)}
            found.unmatched |= {w: nearest(w, ends) for w in missing if w not in covered}
    for name in sorted(set(config.target_parameters or ()) - parameters):
        found.unmatched[name] = nearest(name, [f"{t.path}.{t.site.name}" for t in found.targets])
    paths = [n for t in found.targets for n in {t.path, t.name}]
    for attribute in (*config.patterns, "overrides"):
        for pattern in getattr(config, attribute) or {}:
            if not any(matches(pattern, p) for p in paths):
                found.unmatched[f"{attribute}: {pattern}"] = nearest(pattern, {p.rpartition(".")[2] for p in paths})


def end_of(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model says are its embeddings (``"get_input_embeddings"``) or its head (``"get_output_embeddings"``); None where it knows
    of none, as models of speech do."""
    try:
        found = getattr(model, getter, lambda: None)()
    except NotImplementedError:
        return None
    return found if isinstance(found, nn.Module) else None


def tied_paths(model: nn.Module) -> dict[str, str]:
    """Names of modules whose weight is the very tensor of the input embedding, to the name of that embedding."""
    embedding = end_of(model, "get_input_embeddings")
    weight = getattr(embedding, "_parameters", {}).get("weight")
    if weight is None:
        return {}
    found = [(p, m) for p, m in base_modules(model) if m._parameters.get("weight") is weight]
    source = next((p for p, m in found if m is embedding), None)
    return {p: source for p, m in found if m is not embedding} if source is not None else {}


__all__ = [
    "ALL_LINEAR",
    "DEFAULT_TARGETS",
    "Embedding",
    "Explanation",
    "NoMatchingPeftModuleError",
    "Norm",
    "Target",
    "explain_targets",
    "find_targets",
]
