"""What a merge is going to do, to the last byte: which weights change together, how, and where each tensor goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...core.adapter import Adapter
from ...core.attach import attach
from ...core.inlaid import places
from ...core.place import Place
from ...core.plan import Biases
from ...core.retrained import AnyPlace, Retrained
from ...core.targets import base_modules
from ...core.tied import Tied
from ...formats.slots import Slot, embedding_leaves, key_in_file, named_in_file, said_twice, slots
from ...formats.streaming import Files
from ...methods.banks import Corners
from ..arithmetic import COMBINATIONS, DENSITY, Options, combination
from ..combine import Weights, check_combination
from .adapters import AdapterFile, Given
from .base import chosen_folder, open_base
from .change import Change, Combining, Rounding, Unit
from .layout import Layout


class Plan(Layout):
    """A merge that is planned to the last byte, and can be looked at before it is run.

    Args:
        base: the folder of a model, in safetensors.
        adapters: folders or hub names, in the order in which they act.
        weights: the strength of each, or its weight in the combination, there also by layer (see `add_weighted_adapter`); 1 where None.
        out_dtype: of all floating-point tensors; those of the base where None. Merged weights are rounded to it once, so that a wider
            one than the base's keeps digits which `merge_and_unload` rounds away in the base's own dtype.
        base_dtype: what becomes of a quantised base, as in `merge_and_unload`: ``"dequantized"`` writes all of it dense,
            ``"requantized"`` quantises changed weights again, ``"original"`` takes the weights of another folder.
        original: the folder of the weights from before the base was quantised.
        combine: how several become one change of the base (see `COMBINATIONS`); where None, they act one after another. No rank is
            cut off, also where the combination's name ends in ``svd``: a dense weight holds all of it. Changes are made some rows at
            a time, in as many passes as the rule has to know of all of them. Whole are those of methods that cannot be taken to
            pieces, and of ``knots`` and ``core_ties`` where an adapter has no factors.
        density, majority_sign_method, seed: of the combination, see `add_weighted_adapter`.

    Attributes:
        slots: where the tensors of each adapter belong, and where they are in the files.
        copies: where those of retrained modules are in the files, by the identity of what has no values in the model.
        changes: what will become of which weight.
        config_changes: fields of config.json that change.
        size: of the output's weights, in bytes.
        rounding: of each weight that was quantised again, what that lost; known once it is written.

    Raises:
        ValueError: base and adapters do not fit, or the base is pickled, or quantised in a way that cannot be read; the message
            says what to do.
        TypeError: a method is no function of the weight.
    """

    def __init__(
        self,
        base: str | Path,
        adapters: Sequence[str | Path],
        weights: Weights | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        base_dtype: str | None = None,
        original: str | Path | None = None,
        combine: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int | None = None,
    ) -> None:
        self.files, self.out_dtype, self.base_dtype = Files(), out_dtype, base_dtype
        self.named = Path(base)
        self.rounding: dict[str, Rounding] = {}
        given = [1.0] * len(adapters) if weights is None else weights
        chosen, by_layer = None if combine is None else combination(combine), isinstance(given, Mapping)
        check_combination([str(a) for a in adapters], given, None if chosen is None else density)
        self.combining: Combining | None = None
        strengths = [1.0] * len(adapters) if isinstance(given, Mapping) else [float(w) for w in given]
        if by_layer and chosen is None:
            raise ValueError("Weights by layer are those of a combination; say how to combine, such as 'cat'.")
        if chosen is not None and (by_layer or len(adapters) > 1):
            options = Options(DENSITY if density is None else density, majority_sign_method)
            # One adapter alone is itself by every way, times its weight.
            way, by = chosen if len(adapters) > 1 else COMBINATIONS["cat"], given if isinstance(given, Mapping) else strengths
            self.combining, strengths = Combining(way, by, options, seed), [1.0] * len(adapters)
        self.folder = chosen_folder(self.named, base_dtype, original)
        names = ["default", *(f"adapter{i}" for i in range(1, len(adapters)))]
        self.adapters = [AdapterFile(str(a), n, w, self.files) for a, n, w in zip(adapters, names, strengths, strict=True)]
        opened = open_base(self.folder, self.adapters, self.files)
        self.base, self.checkpoint, self.model_class = opened.base, opened.checkpoint, opened.model_class
        self.resized, self.config, self.config_changes = opened.resized, opened.config, opened.config_changes
        if base_dtype == "dequantized":
            self.config_changes["quantization_config"] = None
        self.slots: dict[int, list[tuple[Slot, AdapterFile, str]]] = {}
        self.copies: dict[int, tuple[AdapterFile, str]] = {}
        for adapter in self.adapters:
            self._attach(adapter)
        self.following, self.untied = self._ties()
        self.units = self._units()
        self.sources, self.in_codes = {}, set()
        self.shards, self.where = self._layout()
        self.size = sum(shard.size for shard in self.shards.values())
        self.changes = list(self._changes())

    def _attach(self, adapter: AdapterFile) -> None:
        """Set an adapter in without values, and find each of its tensors in its file."""
        from ...model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

        model, config = self.base.model, adapter.config
        heads = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel).heads
        if heads and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))  # type: ignore[attr-defined]
        attach(model, config, adapter.name, low_cpu_mem_usage=True, only_folds=True)
        given, used, missing, bank = Given(adapter), set(), [], {}
        for place in places(model):
            p = place.adapters.get(adapter.name)
            if p is None:
                continue
            if isinstance(p, Adapter):
                if p.method.unmergeable:
                    raise TypeError(f"{adapter.source}: cannot be merged: {p.method.unmergeable}")
                p.strength *= adapter.weight
            for slot in slots(place.path, place.in_file, place.name, p, adapter.name):
                hit = next((k for k in (slot.key, named_in_file(slot.key, adapter.name)) if k in given), None)
                if hit is None:
                    if slot.param is None or not slot.param.optional:
                        missing.append(key_in_file(slot))
                    continue
                used.add(hit)
                key = given.own[hit]
                wanted = slot.holder.shapes[slot.name] if isinstance(slot.holder, Corners) else slot.shape
                if adapter.shape(key) != wanted:
                    raise ValueError(
                        f"{adapter.source}: {key!r} is {adapter.shape(key)} in its file and {wanted} for {self.folder}; it was made "
                        "for another base."
                    )
                if not isinstance(p, Adapter):
                    self.copies[id(slot.tensor)] = adapter, key
                elif slot.tensor.device.type == "meta":
                    self.slots.setdefault(id(p), []).append((slot, adapter, key))
                else:
                    bank[id(slot.holder), slot.name] = slot, key
        if missing:
            raise ValueError(f"{adapter.source}: its file lacks {len(missing)} tensors, such as {missing[0]!r}.")
        for slot, key in bank.values():
            adapter.read_corner(key, slot.tensor)
        self._base_tensors(adapter, given, [hit for hit in given if hit not in used])

    def _base_tensors(self, adapter: AdapterFile, given: Given, left: Sequence[str]) -> None:
        """Tensors of the base that were saved along: embeddings that were resized, or are adapted."""
        model, modules, unexpected = self.base.model, dict(base_modules(self.base.model)), []
        for hit in left:
            if said_twice(model, hit, given):
                continue
            key = given.own[hit]
            path, _, leaf = hit.replace(".base_layer", "").rpartition(".")
            own = modules[path]._parameters.get(leaf) if path in modules else None
            if own is None or path.rpartition(".")[2] not in embedding_leaves(model):
                unexpected.append(key)
            elif tuple(own.shape) != adapter.shape(key):
                raise ValueError(f"{adapter.source}: {key!r} is {adapter.shape(key)} in its file and {tuple(own.shape)} in {self.folder}.")
            else:
                dtype = own.dtype
                self.base.values[self.base.canonical(f"{path}.{leaf}")] = lambda key=key, dtype=dtype: adapter.read(key).to(dtype)
        if unexpected:
            raise ValueError(
                f"{adapter.source}: {len(unexpected)} tensors of its file have no place in {self.folder}, such as {unexpected[0]!r}."
            )

    def touched(self, place: AnyPlace) -> list[str]:
        """What the model calls the tensors that a place may change."""
        base = f"{place.path}." if place.path else ""
        if isinstance(place, Retrained):
            return [base + key for key in place.adapters[place.here(self.order)[-1]].state_dict()]
        own, here = place.site.module._parameters, place.here(self.order)
        only_bias = all(isinstance(p, Adapter) and isinstance(p.method, Biases) for p in map(place.adapters.get, here))
        names = (None if only_bias else place.site.name, place.site.bias_name)
        return [base + n for n in names if n is not None and own.get(n) is not None]

    @property
    def order(self) -> list[str]:
        return [a.name for a in self.adapters]

    def _ties(self) -> tuple[set[str], set[str]]:
        """Of the further names of tied weights: those that stay one with the first, and those that become weights of their own."""
        by_name = {name: place for place in places(self.base.model) for name in self.touched(place)}
        following, untied = set(), set()
        for first, names in self.base.aliases.items():
            if not any(n in by_name for n in names):
                continue
            for name in names:
                if name != first:
                    (following if self._follows(by_name.get(name), by_name.get(first)) else untied).add(name)
        if untied:
            self.config_changes["tie_word_embeddings"] = False
        return following, untied

    def _follows(self, end: AnyPlace | None, source: AnyPlace | None) -> bool:
        if isinstance(end, Place) and isinstance(source, Place):
            return list(end.here(self.order)) == list(source.here(self.order)) and all(
                isinstance(m := p.method, Tied) and m.source in source.adapters.values() for p in end.adapters.values()
            )
        if isinstance(end, Retrained) and isinstance(source, Retrained):
            last, of_source = end.here(self.order)[-1], source.here(self.order)[-1]
            mine, its = (p.adapters[last]._parameters.get("weight") for p in (end, source)) if last == of_source else (None, self)
            return mine is its
        return False

    def _marks(self, name: str) -> set[Any]:
        """A tensor of the model, and the groups that it is in under any of its names."""
        first = self.base.canonical(name)
        return {first, *(id(self.base.group_of[n]) for n in self.base.aliases.get(first, [first]) if n in self.base.group_of)}

    def _units(self) -> list[Unit]:
        base, found = self.base, list(places(self.base.model))
        at = {id(p): place for place in found for p in place.adapters.values()}
        touched = {name for place in found for name in self.touched(place)}
        parts: list[tuple[AnyPlace | None, list[str]]] = [(None, [name]) for name in base.values]
        for place in found:
            names = self.touched(place)
            for p in place.adapters.values():
                if isinstance(p, Adapter) and isinstance(p.method, Tied):
                    names = [*names, *self.touched(at[id(p.method.source)])]
            parts.append((place, names))
        by_mark: dict[Any, Unit] = {}
        for place, names in parts:
            unit = Unit([], marks=set().union(*map(self._marks, names)))
            for other in {by_mark[mark] for mark in unit.marks if mark in by_mark}:
                unit.places += other.places
                unit.marks |= other.marks
            unit.places += [] if place is None else [place]
            by_mark |= dict.fromkeys(unit.marks, unit)
        units = list(dict.fromkeys(by_mark.values()))
        order = {id(place): i for i, place in enumerate(found)}
        for unit in units:
            unit.places.sort(key=lambda place: order[id(place)])
        for group in base.groups:
            if id(group) in by_mark:
                by_mark[id(group)].groups.append(group)
                if group.converter is not None:
                    group.revert(dict(group.targets), base.model, base.key_of(group))
        for name in sorted((touched | self.untied | set(base.values)) - self.following):
            if name not in base.group_of:
                by_mark[base.canonical(name)].new.append(name)
        for name in self.resized & set(base.group_of):
            if base.canonical(name) not in base.values and not any(isinstance(at, Retrained) for at in self._at(name)):
                raise ValueError(f"The adapters bring new rows for the vocabulary, and none for {name!r}; save them with the embeddings.")
        return units

    def _at(self, name: str) -> list[AnyPlace]:
        return [place for place in places(self.base.model) if name in self.touched(place)]

    def _changes(self) -> Iterator[Change]:
        for unit in self.units:
            for place in unit.places:
                for name in self.touched(place):
                    if name in self.following or (isinstance(place, Place) and name.rpartition(".")[2] == place.site.bias_name):
                        continue
                    yield Change(name, self.shape(name)[0], self._how(place))
            done = {name for place in unit.places for name in self.touched(place)}
            for name in [n for g in unit.groups for n in g.targets if self.base.canonical(n) in self.base.values] + unit.new:
                if name not in done:
                    done.add(name)
                    how = "a weight of its own, no longer tied" if name in self.untied else "brought by an adapter"
                    yield Change(name, self.shape(name)[0], how)

    def _how(self, place: AnyPlace) -> str:
        here = place.here(self.order)
        if isinstance(place, Retrained):
            return "retrained (modules_to_save)"
        named = []
        for name in here:
            p = place.adapters[name]
            method = p.method.source.method if isinstance(p.method, Tied) and p.method.source is not None else p.method
            kind = type(method).__name__ if method.peft_type is None else str(getattr(method.peft_type, "value", method.peft_type))
            named.append(kind + ("" if p.strength == 1 else f" x {p.strength:g}"))
        return " + ".join(named)
