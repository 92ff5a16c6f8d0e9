"""An adapter's values out of a file, and what does not fit."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.config import nearest
from ..core.targets import base_modules
from .experts import in_stacks
from .slots import PREFIX, Slot, bare_key, embedding_leaves, key_in_file, named_in_file, said_twice


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
    given = {bare_key(k): (k, t) for k, t in tensors.items()}
    report, pairs, used = LoadReport(), [], set()
    for slot in found:
        hit = next((k for k in (slot.key, named_in_file(slot.key, name)) if k in given), None)
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
        if said_twice(model, hit, given):
            continue
        if own is None or path.rpartition(".")[2] not in embedding_leaves(model):
            report.unexpected_keys.append(key)
        elif own.shape != tensor.shape:
            report.mismatched_keys.append((key, tuple(tensor.shape), tuple(own.shape)))
        else:
            base.append((module, tensor))
    return pairs, base, report


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
