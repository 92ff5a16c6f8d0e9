"""What a merge is going to do, to the last byte: which weights change together, how, and where each tensor goes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ...auto import AUTO_CLASSES
from ...core.adapter import Adapter
from ...core.attach import attach
from ...core.config import nearest
from ...core.inlaid import places
from ...core.place import Place
from ...core.plan import Biases
from ...core.retrained import AnyPlace, Retrained
from ...core.targets import base_modules
from ...core.tied import Tied
from ...formats.packed import READABLE, Packed
from ...formats.slots import Slot, embedding_leaves, key_in_file, named_in_file, said_twice, slots
from ...formats.streaming import DTYPES, NAMES, Checkpoint, Entry, Files, Planned, Shard
from ...methods.banks import Corners
from ..arithmetic import DENSITY, Combination, Options, combination
from ..combine import _check as check_combination
from ..dequantize import BASES
from ..disk_base import PACKED, DiskBase, Group, open_checkpoint, quantisation, quantised, read_config
from ..replicate import blocks_of, replicated
from .adapters import AdapterFile, Given


@dataclass
class Change:
    """What becomes of one weight.

    Attributes:
        name: in the model.
        how: the methods that act on it, in order; or what else happens.
    """

    name: str
    shape: tuple[int, ...]
    how: str


@dataclass(frozen=True)
class Rounding:
    """What quantising a merged weight again lost, in squares of norms."""

    error: float
    weight: float
    change: float

    @property
    def of_weight(self) -> float:
        """The error as a share of the weight."""
        return (self.error / max(self.weight, 1e-30)) ** 0.5

    @property
    def of_change(self) -> float:
        """The error as a share of what the adapters changed."""
        return (self.error / max(self.change, 1e-30)) ** 0.5

    @staticmethod
    def total(all_of_them: Iterable[Rounding]) -> Rounding:
        found = list(all_of_them)
        return Rounding(sum(r.error for r in found), sum(r.weight for r in found), sum(r.change for r in found))


@dataclass(frozen=True)
class Combining:
    """How several adapters become one change."""

    chosen: Combination
    weights: list[float]
    options: Options
    seed: int | None

    def fingerprint(self) -> list[Any]:
        o = self.options
        return [self.chosen.name, self.weights, o.density, o.majority_sign_method, o.gamma, o.epsilon, self.seed]


@dataclass(eq=False)
class Unit:
    """Weights that have to be computed together, and the tensors of the files that they are made of.

    Attributes:
        new: names of tensors that the base's files do not have.
        marks: what it has in common with places and groups that belong to it.
    """

    places: list[AnyPlace] = field(default_factory=list)
    groups: list[Group] = field(default_factory=list)
    new: list[str] = field(default_factory=list)
    marks: set[Any] = field(default_factory=set)


class Plan:
    """A merge that is planned to the last byte, and can be looked at before it is run.

    Args:
        base: the folder of a model, in safetensors.
        adapters: folders or hub names, in the order in which they act.
        weights: the strength of each, or its weight in the combination; 1 where None.
        out_dtype: of all floating-point tensors; those of the base where None. Merged weights are rounded to it once, so that a wider
            one than the base's keeps digits which `merge_and_unload` rounds away in the base's own dtype.
        base_dtype: what becomes of a quantised base, as in `merge_and_unload`: ``"dequantized"`` writes all of it dense,
            ``"requantized"`` quantises changed weights again, ``"original"`` takes the weights of another folder.
        original: the folder of the weights from before the base was quantised.
        combine: how several become one change of the base (see `COMBINATIONS`); where None, they act one after another. No rank is
            cut off, also where the combination's name ends in ``svd``: a dense weight holds all of it.
        density, majority_sign_method, seed: of the combination, see `add_weighted_adapter`.

    Attributes:
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
        weights: Sequence[float] | None = None,
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
        self.folder = self.named = Path(base)
        self.config_changes: dict[str, Any] = {}
        self.rounding: dict[str, Rounding] = {}
        if weights is not None and len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters need as many weights, not {len(weights)}.")
        strengths = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
        self.combining: Combining | None = None
        if combine is not None and len(adapters) > 1:
            chosen = combination(combine)
            check_combination([str(a) for a in adapters], strengths, chosen, density, majority_sign_method)
            options = Options(DENSITY if density is None else density, majority_sign_method)
            self.combining, strengths = Combining(chosen, strengths, options, seed), [1.0] * len(adapters)
        self.config = self._choose_base(original)
        names = ["default", *(f"adapter{i}" for i in range(1, len(adapters)))]
        self.adapters = [AdapterFile(str(a), n, w, self.files) for a, n, w in zip(adapters, names, strengths, strict=True)]
        self.base = self._open_base()
        self.slots: dict[int, list[tuple[Slot, AdapterFile, str]]] = {}
        for adapter in self.adapters:
            self._attach(adapter)
        self.following, self.untied = self._ties()
        self.units = self._units()
        self.sources: dict[str, Entry] = {}
        # Tensors that stand for others only in the dtype that they have.
        self.in_codes: set[str] = set()
        self.shards, self.where = self._layout()
        self.size = sum(shard.size for shard in self.shards.values())
        self.changes = list(self._changes())

    def _choose_base(self, original: str | Path | None) -> dict[str, Any]:
        """Whose weights are taken; returns the content of their config.json."""
        if self.base_dtype not in (None, *BASES):
            ways = ", ".join(map(repr, BASES))
            raise ValueError(f"base_dtype={self.base_dtype!r} is not one of {ways}.{nearest(str(self.base_dtype), BASES)}")
        config = read_config(self.folder)
        how = quantisation(config)
        if how is None and self.base_dtype is not None:
            raise ValueError(f"{self.folder} is not quantised, so there is nothing to choose; leave {self.base_dtype!r} out.")
        if original is not None and self.base_dtype != "original":
            raise ValueError("Another folder's weights are taken only if the base's dtype is 'original'.")
        if how is None:
            return config
        if how not in READABLE and self.base_dtype != "original":
            raise ValueError(quantised(self.folder, how))
        if self.base_dtype is None:
            raise ValueError(
                f"{self.folder} is quantised ({how}). Say what to merge into (--base-dtype): 'dequantized' writes dense weights, "
                "'requantized' rounds changed weights again, 'original' takes the weights from before (--original)."
            )
        if self.base_dtype != "original":
            if self.base_dtype == "dequantized":
                self.config_changes["quantization_config"] = None
            return config
        if original is None:
            raise ValueError(f"Which weights {self.folder} was made of is not known; name their folder (--original).")
        self.folder = Path(original)
        config = read_config(self.folder)
        if quantisation(config) is not None:
            raise ValueError(f"{self.folder} is quantised as well; name the folder of the dense weights.")
        return config

    def _open_base(self) -> DiskBase:
        import transformers
        from transformers import AutoConfig

        try:
            config: Any = AutoConfig.from_pretrained(str(self.folder))
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{self.folder}: its config.json cannot be read: {' '.join(str(error).split())}") from error
        own = (config.architectures or [""])[0]
        configs = [a.config for a in self.adapters]
        task = next((str(c.task_type) for c in configs if c.task_type is not None), None)
        mapping = next((c.auto_mapping for c in configs if c.auto_mapping), None) or {}
        named = str(mapping.get("base_model_class")) if str(mapping.get("parent_library")).startswith("transformers") else own
        if task not in (None, "CAUSAL_LM"):
            named = AUTO_CLASSES[str(task)]
        cls: Any = getattr(transformers, own if task == "CAUSAL_LM" else named, None)
        cls = cls or (transformers.AutoModelForCausalLM if task == "CAUSAL_LM" else transformers.AutoModel)
        self.model_class = cls
        labels = self._rows_of(("score", "classifier"))
        if labels is not None and labels != config.num_labels and task in ("SEQ_CLS", "TOKEN_CLS"):
            config.num_labels = labels

        def build() -> nn.Module:
            return cls.from_config(config) if cls.__name__.startswith("Auto") else cls._from_config(config)

        if hasattr(config, "quantization_config"):
            del config.quantization_config
        with torch.device("meta"):
            model: Any = build()
        self.checkpoint = Checkpoint.open(self.folder)
        ranges = self._replication()
        if ranges:
            blocks = blocks_of(model)
            self.config_changes |= replicated(model, ranges)
            self.checkpoint = again(self.checkpoint, blocks, ranges)
            with torch.device("meta"):
                model = build()
        self.checkpoint = open_checkpoint(self.checkpoint, self.config, self.files)
        ends = [getattr(model, g, lambda: None)() for g in ("get_input_embeddings", "get_output_embeddings")]
        paths = [p for p, m in model.named_modules() if any(m is e for e in ends)]
        rows, text = self._rows_of(paths), config.get_text_config()
        resized: list[str] = []
        if rows is not None and rows != text.vocab_size:
            # Tokens were added to the base before the adapter was made; the adapter brought their rows along.
            text.vocab_size = self.config_changes["vocab_size"] = rows
            resized = [f"{p}.{leaf}" for p in paths for leaf in ("weight", "bias")]
            with torch.device("meta"):
                model = build()
        base = DiskBase(self.checkpoint, model, self.files, resized)
        name = type(model).__name__
        if name != own and task not in (None, "FEATURE_EXTRACTION"):
            self.config_changes["architectures"] = [name]
            if task in ("SEQ_CLS", "TOKEN_CLS"):
                self.config_changes |= {"id2label": dict(config.id2label), "label2id": dict(config.label2id)}
        self.resized = set(resized)
        return base

    def _replication(self) -> list[list[int]]:
        """The ranges of blocks in which the first adapter runs through the base."""
        found = [getattr(a.config, "layer_replication", None) for a in self.adapters]
        late = next((a for a, ranges in zip(self.adapters[1:], found[1:], strict=True) if ranges), None)
        if late is not None:
            raise ValueError(f"{late.source} repeats blocks of the base (layer_replication); only the first adapter can, so name it first.")
        if found[0]:
            # The files are read as those of the larger model.
            self.adapters[0].config.layer_replication = None  # type: ignore[attr-defined]
        return found[0] or []

    def _rows_of(self, paths: Sequence[str]) -> int | None:
        """The number of rows of a weight that adapters bring: of the modules with these names, or ends of names."""
        for adapter in self.adapters:
            for key in adapter.keys:
                path, _, leaf = key.replace(".base_layer", "").removeprefix("base_model.model.").rpartition(".")
                if leaf == "weight" and any(path == p or path.endswith(f".{p}") for p in paths):
                    return adapter.shape(key)[0]
        return None

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
                if slot.tensor.device.type == "meta":
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

    # -- the output, to the byte --
    def dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.out_dtype if self.out_dtype is not None and dtype.is_floating_point and dtype not in PACKED else dtype

    def _planned(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Planned:
        dtype = self.dtype(dtype)
        return key, NAMES[dtype], tuple(shape), dtype.itemsize * torch.Size(shape).numel()

    def shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a tensor of the model that the files do not have, or not in this shape."""
        path, _, leaf = name.rpartition(".")
        module = self.base.model.get_submodule(path)
        own = module._parameters.get(leaf)
        own = module._buffers[leaf] if own is None else own
        return tuple(own.shape), own.dtype

    def keeps(self, entry: Entry | None) -> bool:
        """Whether a tensor of the base is quantised, and stays so."""
        return isinstance(entry, Packed) and self.base_dtype == "requantized"

    def written_as(self, key: str) -> list[str]:
        """What a tensor of the base is in the output's files."""
        entry = self.checkpoint.tensors[key]
        return [e.key for e in entry.parts.values()] if isinstance(entry, Packed) and self.keeps(entry) else [key]

    def keys_of(self, group: Group) -> list[str]:
        """What a group is in the output's files."""
        return [k for key in group.keys for k in self.written_as(key)]

    def keys(self, unit: Unit) -> list[str]:
        """What a unit is in the output's files."""
        return [k for g in unit.groups for k in self.keys_of(g)] + unit.new

    def _layout(self) -> tuple[dict[str, Shard], dict[str, str]]:
        """The output's files, and in which of them each tensor is. Sets where tensors that are copied come from."""
        planned: dict[str, list[Planned]] = {file: [] for file in self.checkpoint.files}
        other = {g.keys[0]: self.shape(n) for u in self.units for g in u.groups for n in g.targets if n in self.resized}
        changed = {key for unit in self.units for g in unit.groups for key in g.keys}
        entries: list[Entry] = []
        for key, entry in self.checkpoint.tensors.items():
            if not (isinstance(entry, Packed) and self.keeps(entry)):
                entries.append(entry)
            else:
                parts = entry.written() if key in changed else list(entry.parts.values())
                self.in_codes |= {e.key for e in parts}
                entries += parts
        self.sources = {e.key: e for e in sorted(entries, key=lambda e: (e.file.name, e.start))}
        for key, entry in self.sources.items():
            if key not in other and not self.casts(key):
                planned[entry.file.name].append((key, entry.dtype, entry.shape, entry.nbytes))
            else:
                planned[entry.file.name].append(self._planned(key, entry.torch_dtype, other[key][0] if key in other else entry.shape))
        for unit in self.units:
            for name in unit.new:
                shape, dtype = self.shape(name)
                planned[self.checkpoint.files[-1]].append(self._planned(name, dtype, shape))
        for tensors in planned.values():
            # Readers want each tensor to begin at a multiple of its numbers' width.
            tensors.sort(key=lambda p: -DTYPES[p[1]].itemsize if p[1] in DTYPES else 0)
        where = {p[0]: file for file, tensors in planned.items() for p in tensors}
        return {f: Shard(Path(f), tensors, self._said_of(f)) for f, tensors in planned.items()}, where

    def _said_of(self, file: str) -> dict[str, str]:
        """The metadata of a file. What they say of quantised weights goes with those."""
        said = self.checkpoint.metadata[file]
        return said if said and self.base_dtype != "dequantized" else {"format": "pt"}

    def casts(self, key: str) -> bool:
        """Whether a tensor of the output that no adapter touches has other bytes than in the base."""
        entry = self.sources[key]
        if key in self.in_codes:
            return False
        return isinstance(entry, Packed) or (entry.dtype in DTYPES and self.dtype(DTYPES[entry.dtype]) != DTYPES[entry.dtype])

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


def again(checkpoint: Checkpoint, blocks: str, ranges: Sequence[Sequence[int]]) -> Checkpoint:
    """The files as if they had the blocks of these ranges, one after another.

    Args:
        blocks: the path of the list of blocks; files may lack its first words.
    """
    words = blocks.split(".")
    starts = "|".join(re.escape(".".join(words[i:])) for i in range(len(words)))
    order = [i for start, end in ranges for i in range(start, end)]
    found: dict[str, Entry] = {}
    for key, entry in checkpoint.tensors.items():
        hit = re.match(rf"((?:{starts})\.)(\d+)(\..*)", key)
        copies = [key] if hit is None else [f"{hit[1]}{at}{hit[3]}" for at, i in enumerate(order) if i == int(hit[2])]
        found |= {k: replace(entry, key=k) for k in copies}
    return replace(checkpoint, tensors=found)
