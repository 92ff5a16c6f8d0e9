"""An adapter's tensors by the names that HF peft gives them, in both directions."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.additive import LowRank
from ..core.config import nearest
from ..core.inlaid import host_of, places
from ..core.method import Method
from ..core.param import Param
from ..core.place import Place
from ..core.plan import Biases, Part
from ..core.retrained import Retrained
from ..core.session import Session
from ..core.site import Site
from ..core.targets import base_modules, tied_paths
from ..core.tied import Tied
from ..methods.trainable_tokens import TrainableTokensConfig
from .experts import in_stacks

PREFIX = "base_model.model."
EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


class Slot(NamedTuple):
    """One tensor of an adapter: where it is and what it is called in a file.

    Attributes:
        key: in a file, without the prefix.
        live: in the model's own state dict.
        holder, name: the module that has it, and as what.
        param, site: how it was declared; None for tensors that are written as they are.
    """

    key: str
    live: str
    holder: nn.Module
    name: str
    param: Param | None = None
    site: Site | None = None

    @property
    def tensor(self) -> Tensor:
        found = self.holder._parameters.get(self.name)
        return self.holder._buffers[self.name] if found is None else found  # type: ignore[return-value]

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor if self.param is None or self.site is None else self.param.to_file(self.site, tensor)

    def from_file(self, tensor: Tensor) -> Tensor:
        return tensor if self.param is None or self.site is None else self.param.from_file(self.site, tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """In a file."""
        if self.param is None or self.site is None:
            return tuple(self.tensor.shape)
        return self.param.shape_in_file(self.site)

    def put(self, tensor: Tensor) -> None:
        """Set the value, from a file's tensor; a tensor on the meta device gets its memory here."""
        old = self.tensor
        value = self.from_file(tensor.detach())
        if old.device.type == "meta":
            device = self.site.device if self.site is not None else tensor.device
            made = value.to(device, old.dtype, copy=True).contiguous()
            if self.name in self.holder._parameters:
                self.holder._parameters[self.name] = nn.Parameter(made, requires_grad=old.requires_grad)
            else:
                self.holder._buffers[self.name] = made
        else:
            with torch.no_grad():
                old.copy_(value)


def slots(path: str, in_file: str, site_name: str, adapter: nn.Module, name: str) -> Iterator[Slot]:
    """The tensors of one adapter at one place."""
    base, live = f"{path}." if path else "", _live(path, site_name, name)
    if not isinstance(adapter, Adapter):
        for key in adapter.state_dict(keep_vars=True):
            yield Slot(base + key, live + key, *_held(adapter, key))
        return
    # Tokens beside a method have a name of their own, whichever adapter was first at this place.
    as_part = isinstance(adapter.method, TrainableTokensConfig) and adapter.method.as_part
    in_file = f"{path}.token_adapter" if as_part else in_file.removesuffix(".token_adapter")
    for own, param in adapter.declared.items():
        if param.persistent:
            yield Slot(f"{in_file}.{param.key or own}".lstrip("."), live + own, adapter, own, param, adapter.site)
    if adapter.trained_bias is not None:
        inside = "" if isinstance(adapter.method, Biases) else "base_layer."
        # A host may have a bias for each of its raw parameters.
        leaf = adapter.site.bias_name or "bias"
        yield Slot(f"{base}{inside}{leaf}", f"{live}trained_bias", adapter, "trained_bias")
    if adapter.shared is None:
        return
    bank, bank_live = adapter.shared, f"{live if adapter.bank_at is None else _live(*adapter.bank_at, name)}bank."
    for leaf, key in adapter.method.repeated(adapter).items():
        yield Slot(f"{in_file}.{leaf}", bank_live + key, *_held(bank, key))
    if adapter.bank_at is None:
        for key in bank.state_dict():
            # The bank belongs to the whole adapter, one level above the model.
            in_bank = adapter.method.bank_key(key)
            if in_bank is not None:
                yield Slot(in_bank, bank_live + key, *_held(bank, key))


def _live(path: str, site_name: str, name: str) -> str:
    """Where an adapter's tensors are in the model's own state dict."""
    return (f"{path}." if path else "") + f"adapters.{name}." + (f"{site_name}." if site_name not in ("", "weight") else "")


def _held(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and as what."""
    owner, _, leaf = key.rpartition(".")
    return module.get_submodule(owner), leaf


def slots_of_parts(parts: Sequence[Part], name: str) -> list[Slot]:
    return [s for p in parts for s in slots(p.path, p.in_file or p.path, p.site.name if p.site is not None else "", p.adapter, name)]


def slots_of_model(model: nn.Module, name: str) -> list[Slot]:
    found = []
    for place in places(model):
        if name in place.adapters:
            found += slots(place.path, place.in_file, place.name, place.adapters[name], name)
    return found


def key_in_file(slot: Slot, prefix: str = PREFIX) -> str:
    return slot.key if slot.key.startswith("base_model.") else prefix + slot.key


# ---- out ------------------------------------------------------------------------------------------------------------------
def adapter_tensors(
    model: nn.Module,
    session: Session,
    name: str,
    *,
    prefix: str = PREFIX,
    state_dict: Mapping[str, Tensor] | None = None,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors of an adapter as a file has them.

    Args:
        model: the bare model that holds the adapters.
        prefix: in front of the keys.
        state_dict: take the values from here (a gathered state dict of a sharded model), by live names with any prefix.
        save_embedding_layers: add the base's embeddings; ``"auto"`` does where they are adapted or were resized.

    Raises:
        ValueError: ``state_dict`` lacks a tensor of the adapter, or a tensor is empty, as the shards of a distributed model are that
            were not gathered.
    """
    session.check((name,))
    find = _finder(state_dict)
    own = [(s, find(s)) for s in slots_of_model(model, name)]
    empty = [s.live for s, t in own if t.numel() == 0 and (s.param is None or s.site is None or prod(s.param.shape(s.site)))]
    if empty:
        raise ValueError(f"{len(empty)} tensors to save are empty, such as {empty[0]!r}: gather the shards of the model before saving.")
    found = {key_in_file(s, prefix): s.to_file(t) for s, t in own}
    config = session.configs[name]
    if isinstance(config, Method):
        found = config.written(found)
    found |= {prefix + k: t for k, t in _of_tied_ends(model, name).items()}
    for path, module in _embeddings_to_save(model, session, name, save_embedding_layers):
        adapted = any(isinstance(p, Place) and host_of(p) is module and name in p.adapters for p in places(model))
        found[f"{prefix}{path}.{'base_layer.' if adapted else ''}weight"] = module._parameters["weight"]  # type: ignore[assignment]
    return {k: _whole(t) for k, t in found.items()}


def _of_tied_ends(model: nn.Module, name: str) -> dict[str, Tensor]:
    """HF writes the transposed factors of a tied head beside those of the embedding; readers of its files look for them."""
    found = {}
    for place in places(model):
        p = place.adapters.get(name)
        source = p.method.source if isinstance(p, Adapter) and isinstance(p.method, Tied) else None
        if source is None:
            continue
        if isinstance(source.method, LowRank) and "lora_embedding_A" in source.declared:
            a, b = source.lora_embedding_A, source.lora_embedding_B
            found |= {f"{place.path}.lora_A.weight": b.mT, f"{place.path}.lora_B.weight": a.mT}
        elif isinstance(source.method, TrainableTokensConfig) and not source.method.as_part:
            found[f"{place.path}.trainable_tokens_delta"] = source.trainable_tokens_delta
    return found


def _said_twice(model: nn.Module, key: str, given: Mapping[str, tuple[str, Tensor]]) -> bool:
    """Keys of HF's files that repeat what other keys say: a tied head's factors, a retrained bias under its wrappers' names."""
    if ".original_module." in key or ".modules_to_save." in key:
        return True
    repeats = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A", "trainable_tokens_delta": "trainable_tokens_delta"}
    for path, source in tied_paths(model).items():
        for leaf, of in repeats.items():
            first = given.get(f"{source}.{of}")
            if key == f"{path}.{leaf}" and first is not None:
                return torch.equal(given[key][1], first[1] if leaf == of else first[1].mT)
    return False


def _finder(state_dict: Mapping[str, Tensor] | None):
    if state_dict is None:
        return lambda slot: slot.tensor
    clean = {_bare(k): t for k, t in state_dict.items()}

    def find(slot: Slot) -> Tensor:
        if slot.live not in clean:
            raise ValueError(
                f"The given state_dict lacks {slot.live!r}.{nearest(slot.live, clean)} Was it gathered from the adapted model?"
            )
        return clean[slot.live]

    return find


def _bare(key: str) -> str:
    """A live name without what wrappers put in front of it or into it."""
    key = key.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "").replace("_checkpoint_wrapped_module.", "")
    return key.removeprefix("module.").removeprefix(PREFIX)


def _whole(tensor: Tensor) -> Tensor:
    """A distributed tensor gathered; others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[attr-defined]


def _embeddings_to_save(model: nn.Module, session: Session, name: str, wanted: bool | str) -> list[tuple[str, nn.Module]]:
    ends = [getattr(model, g, lambda: None)() for g in ("get_input_embeddings", "get_output_embeddings")]
    named = [(p, m) for p, m in base_modules(model) if any(m is e for e in ends) and m._parameters.get("weight") is not None]
    config = session.configs[name]
    tokens = config.peft_type == "TRAINABLE_TOKENS" or getattr(config, "trainable_token_indices", None)
    if wanted != "auto":
        return named if wanted else []
    if not tokens:
        adapted = {id(host_of(p)) for p in places(model) if isinstance(p, Place) and p.adapters.get(name) is not None}
        adapted_embeddings = [(p, m) for p, m in named if id(m) in adapted]
        # The new rows of a vocabulary that grew are at both ends, also where an adapter is at one of them.
        if adapted_embeddings and not _resized(model, config):
            return adapted_embeddings
    return named if _resized(model, config) else []


def _resized(model: nn.Module, config: Any) -> bool:
    """Whether the vocabulary differs from that of the base on disk. Only a local folder is looked at."""
    import json
    from pathlib import Path

    size = getattr(getattr(model, "config", None), "vocab_size", None)
    path = Path(config.base_model_name_or_path or "") / "config.json"
    if not size or not config.base_model_name_or_path or not path.is_file():
        return False
    return json.loads(path.read_text(encoding="utf-8")).get("vocab_size", size) != size


# ---- in -------------------------------------------------------------------------------------------------------------------
@dataclass
class LoadReport:
    """What a file and an adapter did not have in common.

    Attributes:
        missing_keys: the adapter's tensors that the file lacks.
        unexpected_keys: the file's tensors that the adapter has no place for.
        mismatched_keys: ``(key, shape in the file, shape of the adapter)``.
        bad_keys: tensors with values that are not finite.
    """

    missing_keys: list[str] = field(default_factory=list)
    unexpected_keys: list[str] = field(default_factory=list)
    mismatched_keys: list[tuple[str, tuple[int, ...], tuple[int, ...]]] = field(default_factory=list)
    bad_keys: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.missing_keys or self.unexpected_keys or self.mismatched_keys or self.bad_keys)

    def __str__(self) -> str:
        def some(keys: Sequence[Any]) -> str:
            return ", ".join(map(str, keys[:5])) + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")

        lines = []
        if self.missing_keys:
            hints = {nearest(k, self.unexpected_keys) for k in self.missing_keys[:1]}
            lines.append(f"{len(self.missing_keys)} tensors are missing: {some(self.missing_keys)}.{''.join(hints)}")
        if self.unexpected_keys:
            lines.append(f"{len(self.unexpected_keys)} tensors have no place in the model: {some(self.unexpected_keys)}.")
        if self.mismatched_keys:
            shown = [f"{k} is {a} in the file and {b} in the model" for k, a, b in self.mismatched_keys]
            lines.append(f"{len(shown)} tensors have another shape: {some(shown)}.")
        if self.bad_keys:
            lines.append(f"{len(self.bad_keys)} tensors hold values that are not finite: {some(self.bad_keys)}.")
        return " ".join(lines)


class AdapterMismatch(ValueError):
    """A file does not fit the adapter; `report` says where."""

    def __init__(self, report: LoadReport) -> None:
        super().__init__(f"The adapter's file does not fit: {report} Pass `strict=False` to load what fits.")
        self.report = report


def compare(
    found: Sequence[Slot], model: nn.Module, tensors: Mapping[str, Tensor], name: str
) -> tuple[list[tuple[Slot, Tensor]], list[tuple[nn.Module, Tensor]], LoadReport]:
    """Match a file's tensors to an adapter's; nothing is changed.

    Returns:
        The pairs that fit, the tensors that belong to the base (embeddings that were saved along), and the report.
    """
    method = next((s.holder.method for s in found if isinstance(s.holder, Adapter)), None)
    if method is not None:
        tensors = method.as_read(tensors)
    given = {_file_key(k): (k, t) for k, t in tensors.items()}
    report, pairs, used = LoadReport(), [], set()
    for slot in found:
        hit = next((k for k in (slot.key, _with_name(slot.key, name)) if k in given), None)
        if hit is None:
            if slot.param is None or not slot.param.optional:
                report.missing_keys.append(key_in_file(slot))
            continue
        used.add(hit)
        key, tensor = given[hit]
        if tuple(tensor.shape) != slot.shape:
            report.mismatched_keys.append((key, tuple(tensor.shape), slot.shape))
        else:
            if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                report.bad_keys.append(key)
            pairs.append((slot, tensor))
    base = []
    modules = dict(base_modules(model))
    for hit, (key, tensor) in given.items():
        if hit in used:
            continue
        path, _, leaf = hit.replace(".base_layer", "").rpartition(".")
        module = modules.get(path)
        own = module._parameters.get(leaf) if module is not None else None
        if _said_twice(model, hit, given):
            continue
        if own is None or path.rpartition(".")[2] not in _embedding_leaves(model):
            report.unexpected_keys.append(key)
        elif own.shape != tensor.shape:
            report.mismatched_keys.append((key, tuple(tensor.shape), tuple(own.shape)))
        else:
            base.append((module, tensor))
    return pairs, base, report


def _embedding_leaves(model: nn.Module) -> set[str]:
    ends = [getattr(model, g, lambda: None)() for g in ("get_input_embeddings", "get_output_embeddings")]
    return {p.rpartition(".")[2] for p, m in base_modules(model) if any(m is e for e in ends if e is not None)} | set(EMBEDDING_LAYER_NAMES)


def _file_key(key: str) -> str:
    return key.removeprefix("_orig_mod.").removeprefix(PREFIX)


def _with_name(key: str, name: str) -> str:
    """The key as it is in a live state dict of HF: with the adapter's name behind the tensor's."""
    head, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias") and re.search(r"(lora|vera|oft|hra|ia3|boft|hada|lokr)_\w+$", head):
        return f"{head}.{name}.{leaf}"
    return f"{key}.{name}"


def fill(
    found: Sequence[Slot],
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    *,
    strict: bool = True,
    ignore_mismatched_sizes: bool = False,
) -> LoadReport:
    """Give an adapter the values of a file.

    Raises:
        AdapterMismatch: ``strict`` and the two do not fit each other; nothing is changed.
        ValueError: shapes differ and ``ignore_mismatched_sizes`` is not set.
    """
    pairs, base, report = compare(found, model, in_stacks(found, model, tensors, PREFIX), name)
    if strict and report:
        raise AdapterMismatch(report)
    if report.mismatched_keys and not ignore_mismatched_sizes:
        raise AdapterMismatch(LoadReport(mismatched_keys=report.mismatched_keys))
    for slot, tensor in pairs:
        slot.put(tensor)
    for module, tensor in base:
        weight = module._parameters["weight"]
        assert weight is not None
        if not torch.equal(weight.detach().cpu(), tensor.to("cpu", weight.dtype)):
            # A skeleton of a model has no memory of its own to copy into.
            weight.data = tensor.to(weight.device, weight.dtype, copy=True) if 0 in weight.stride() else weight.data.copy_(tensor)
    return report


def warn_of(report: LoadReport) -> None:
    if report:
        warnings.warn(f"The adapter's file does not fit everywhere: {report}", stacklevel=3)


__all__ = [
    "PREFIX",
    "AdapterMismatch",
    "LoadReport",
    "Retrained",
    "Slot",
    "adapter_tensors",
    "compare",
    "fill",
    "slots_of_model",
    "slots_of_parts",
    "warn_of",
]
