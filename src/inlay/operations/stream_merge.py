"""Merging without loading: adapters go into a base's files tensor by tensor, and an ordinary model folder comes out.

The model exists without values. Each adapted weight is read, folded as in memory, written to its final place and forgotten; all
other bytes go from file to file. Peak memory is that of one weight (or of one stack of experts) and what folds it.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..auto import AUTO_CLASSES
from ..core.adapter import Adapter
from ..core.attach import attach
from ..core.config import PeftConfig
from ..core.inlaid import places
from ..core.method import Additive, LowRank, Method, full
from ..core.place import Place
from ..core.retrained import AnyPlace, Retrained
from ..core.site import Embedding, Linear, Site, Stack, TransposedLinear
from ..core.targets import base_modules
from ..core.tied import Tied
from ..formats.folder import weight_files, write_json
from ..formats.state import Slot, _embedding_leaves, _file_key, _said_twice, _with_name, key_in_file, slots
from ..formats.streaming import AT_ONCE, DTYPES, NAMES, Checkpoint, Entry, Files, Planned, Shard, Writing, read_header, write_index
from .arithmetic import DENSITY, Combination, Options, combination
from .combine import _check as check_combination
from .combine import combined
from .disk_base import PACKED, DiskBase, Group, read_config
from .updates import effects

JOURNAL = ".inlay-merge.json"
# Left on the disk beside what is written.
SPARE = 64 * 2**20
# Files of a model's folder that are its weights in other forms.
OTHER_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".index.json")
TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "vocab.json",
    "vocab.txt", "merges.txt", "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
)  # fmt: skip


# ---- adapters -------------------------------------------------------------------------------------------------------------
class AdapterFile:
    """An adapter's folder, of whose tensors only those are read that are needed.

    Attributes:
        name: in the model.
        weight: its strength.
    """

    def __init__(self, source: str, name: str, weight: float, files: Files) -> None:
        self.source, self.name, self.weight, self.files = source, name, weight, files
        self.config = PeftConfig.from_pretrained(source)
        self.config.inference_mode = True
        if not isinstance(self.config, Method):
            raise TypeError(f"{source}: {self.config.peft_type} acts on the inputs of the model, not its weights, and cannot be merged.")
        if getattr(self.config, "layer_replication", None):
            raise TypeError(f"{source}: it repeats blocks of the base (layer_replication); merge it in memory, with `merge_and_unload`.")
        self.entries: dict[str, Entry] = {}
        self.paths = weight_files(source)
        for path in self.paths:
            self.entries |= read_header(path)[0]
        self.tensors: dict[str, Tensor] | None = None
        if type(self.config).as_read is not Method.as_read:
            self.tensors = dict(self.config.as_read({k: files.read(e) for k, e in self.entries.items()}))

    @property
    def keys(self) -> list[str]:
        return list(self.entries if self.tensors is None else self.tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        return self.entries[key].shape if self.tensors is None else tuple(self.tensors[key].shape)

    def read(self, key: str) -> Tensor:
        """
        Raises:
            ValueError: a value is not finite.
        """
        found = self.files.read(self.entries[key]) if self.tensors is None else self.tensors[key]
        if found.is_floating_point() and not torch.isfinite(found).all():
            raise ValueError(f"{self.source}: {key!r} holds values that are not finite; the adapter is broken.")
        return found

    def fingerprint(self) -> list[Any]:
        config = json.dumps(self.config.to_file(), sort_keys=True, default=str)
        return [self.weight, zlib.crc32(config.encode()), *map(_checksum, self.paths)]


def _checksum(path: Path) -> int:
    found = 0
    with path.open("rb") as source:
        while block := source.read(AT_ONCE):
            found = zlib.crc32(block, found)
    return found


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


class _Given(Mapping[str, tuple[str, Tensor]]):
    """An adapter's tensors by their bare keys, each read when it is asked for."""

    def __init__(self, adapter: AdapterFile) -> None:
        self.adapter, self.own = adapter, {_file_key(key): key for key in adapter.keys}

    def __getitem__(self, key: str) -> tuple[str, Tensor]:
        return self.own[key], self.adapter.read(self.own[key])

    def __contains__(self, key: object) -> bool:
        return key in self.own

    def __iter__(self) -> Iterator[str]:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


# ---- the merge ------------------------------------------------------------------------------------------------------------
class StreamMerge:
    """A merge that is planned to the last byte, and can be looked at before it is run.

    Args:
        base: the folder of a model, in safetensors.
        adapters: folders or hub names, in the order in which they act.
        weights: the strength of each, or its weight in the combination; 1 where None.
        out_dtype: of all floating-point tensors; those of the base where None.
        combine: how several become one change of the base (see `COMBINATIONS`); where None, they act one after another. No rank is
            cut off, also where the combination's name ends in ``svd``: a dense weight holds all of it.
        density, majority_sign_method, seed: of the combination, see `add_weighted_adapter`.

    Attributes:
        changes: what will become of which weight.
        config_changes: fields of config.json that change.
        size: of the output's weights, in bytes.

    Raises:
        ValueError: base and adapters do not fit, or the base is quantised or pickled; the message says what to do.
        TypeError: a method is no function of the weight.
    """

    def __init__(
        self,
        base: str | Path,
        adapters: Sequence[str | Path],
        weights: Sequence[float] | None = None,
        out_dtype: torch.dtype | None = None,
        *,
        combine: str | None = None,
        density: float | None = None,
        majority_sign_method: str = "total",
        seed: int | None = None,
    ) -> None:
        self.folder, self.files, self.out_dtype = Path(base), Files(), out_dtype
        if weights is not None and len(weights) != len(adapters):
            raise ValueError(f"{len(adapters)} adapters need as many weights, not {len(weights)}.")
        strengths = [1.0] * len(adapters) if weights is None else [float(w) for w in weights]
        self.combining: Combining | None = None
        if combine is not None and len(adapters) > 1:
            chosen = combination(combine)
            check_combination([str(a) for a in adapters], strengths, chosen, density, majority_sign_method)
            options = Options(DENSITY if density is None else density, majority_sign_method)
            self.combining, strengths = Combining(chosen, strengths, options, seed), [1.0] * len(adapters)
        self.config = read_config(self.folder)
        self.checkpoint = Checkpoint.open(self.folder)
        names = ["default", *(f"adapter{i}" for i in range(1, len(adapters)))]
        self.adapters = [AdapterFile(str(a), n, w, self.files) for a, n, w in zip(adapters, names, strengths, strict=True)]
        self.config_changes: dict[str, Any] = {}
        self.base = self._open_base()
        self.slots: dict[int, list[tuple[Slot, AdapterFile, str]]] = {}
        for adapter in self.adapters:
            self._attach(adapter)
        self.following, self.untied = self._ties()
        self.units = self._units()
        self.shards, self.where = self._layout()
        self.size = sum(shard.size for shard in self.shards.values())
        self.changes = list(self._changes())

    # ---- planning -----------------------------------------------------------------------------------------------------
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

        with torch.device("meta"):
            model: Any = build()
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
        from ..model import MODEL_TYPE_TO_PEFT_MODEL_MAPPING, PeftModel

        model, config = self.base.model, adapter.config
        heads = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel).heads
        if heads and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *heads]))  # type: ignore[attr-defined]
        attach(model, config, adapter.name, low_cpu_mem_usage=True)
        given, used, missing, bank = _Given(adapter), set(), [], {}
        for place in places(model):
            p = place.adapters.get(adapter.name)
            if p is None:
                continue
            if isinstance(p, Adapter):
                if p.method.unmergeable:
                    raise TypeError(f"{adapter.source}: cannot be merged: {p.method.unmergeable}")
                p.strength *= adapter.weight
            for slot in slots(place.path, place.in_file, place.name, p, adapter.name):
                hit = next((k for k in (slot.key, _with_name(slot.key, adapter.name)) if k in given), None)
                if hit is None:
                    if slot.param is None or not slot.param.optional:
                        missing.append(key_in_file(slot))
                    continue
                used.add(hit)
                key = given.own[hit]
                if adapter.shape(key) != slot.shape:
                    raise ValueError(
                        f"{adapter.source}: {key!r} is {adapter.shape(key)} in its file and {slot.shape} for {self.folder}; it was made "
                        "for another base."
                    )
                if slot.tensor.device.type == "meta":
                    self.slots.setdefault(id(p), []).append((slot, adapter, key))
                else:
                    bank[id(slot.holder), slot.name] = slot, key
        if missing:
            raise ValueError(f"{adapter.source}: its file lacks {len(missing)} tensors, such as {missing[0]!r}.")
        for slot, key in bank.values():
            slot.put(adapter.read(key))
        self._base_tensors(adapter, given, [hit for hit in given if hit not in used])

    def _base_tensors(self, adapter: AdapterFile, given: _Given, left: Sequence[str]) -> None:
        """Tensors of the base that were saved along: embeddings that were resized, or are adapted."""
        model, modules, unexpected = self.base.model, dict(base_modules(self.base.model)), []
        for hit in left:
            if _said_twice(model, hit, given):
                continue
            key = given.own[hit]
            path, _, leaf = hit.replace(".base_layer", "").rpartition(".")
            own = modules[path]._parameters.get(leaf) if path in modules else None
            if own is None or path.rpartition(".")[2] not in _embedding_leaves(model):
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

    def _touched(self, place: AnyPlace) -> list[str]:
        """What the model calls the tensors that a place may change."""
        base = f"{place.path}." if place.path else ""
        if isinstance(place, Retrained):
            return [base + key for key in place.adapters[place.here(self.order)[-1]].state_dict()]
        own = place.site.module._parameters
        return [base + n for n in (place.site.name, place.site.bias_name) if n is not None and own.get(n) is not None]

    @property
    def order(self) -> list[str]:
        return [a.name for a in self.adapters]

    def _ties(self) -> tuple[set[str], set[str]]:
        """Of the further names of tied weights: those that stay one with the first, and those that become weights of their own."""
        by_name = {name: place for place in places(self.base.model) for name in self._touched(place)}
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
        touched = {name for place in found for name in self._touched(place)}
        parts: list[tuple[AnyPlace | None, list[str]]] = [(None, [name]) for name in base.values]
        for place in found:
            names = self._touched(place)
            for p in place.adapters.values():
                if isinstance(p, Adapter) and isinstance(p.method, Tied):
                    names = [*names, *self._touched(at[id(p.method.source)])]
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
        return [place for place in places(self.base.model) if name in self._touched(place)]

    # -- the output, to the byte --
    def _dtype(self, dtype: torch.dtype) -> torch.dtype:
        return self.out_dtype if self.out_dtype is not None and dtype.is_floating_point and dtype not in PACKED else dtype

    def _planned(self, key: str, dtype: torch.dtype, shape: Sequence[int]) -> Planned:
        dtype = self._dtype(dtype)
        return key, NAMES[dtype], tuple(shape), dtype.itemsize * torch.Size(shape).numel()

    def _shape(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Of a tensor of the model that the files do not have, or not in this shape."""
        path, _, leaf = name.rpartition(".")
        module = self.base.model.get_submodule(path)
        own = module._parameters.get(leaf)
        own = module._buffers[leaf] if own is None else own
        return tuple(own.shape), own.dtype

    def _layout(self) -> tuple[dict[str, Shard], dict[str, str]]:
        """The output's files, and in which of them each tensor is."""
        planned: dict[str, list[Planned]] = {file: [] for file in self.checkpoint.files}
        other = {g.keys[0]: self._shape(n) for u in self.units for g in u.groups for n in g.targets if n in self.resized}
        for key, entry in self.checkpoint.tensors.items():
            if key not in other and not self._cast(key):
                planned[entry.file.name].append((key, entry.dtype, entry.shape, entry.nbytes))
            else:
                planned[entry.file.name].append(self._planned(key, entry.torch_dtype, other[key][0] if key in other else entry.shape))
        for unit in self.units:
            for name in unit.new:
                shape, dtype = self._shape(name)
                planned[self.checkpoint.files[-1]].append(self._planned(name, dtype, shape))
        where = {p[0]: file for file, tensors in planned.items() for p in tensors}
        return {f: Shard(Path(f), tensors, self.checkpoint.metadata[f] or {"format": "pt"}) for f, tensors in planned.items()}, where

    def _changes(self) -> Iterator[Change]:
        for unit in self.units:
            for place in unit.places:
                for name in self._touched(place):
                    if name in self.following or (isinstance(place, Place) and name.rpartition(".")[2] == place.site.bias_name):
                        continue
                    yield Change(name, self._shape(name)[0], self._how(place))
            done = {name for place in unit.places for name in self._touched(place)}
            for name in [n for g in unit.groups for n in g.targets if self.base.canonical(n) in self.base.values] + unit.new:
                if name not in done:
                    done.add(name)
                    how = "a weight of its own, no longer tied" if name in self.untied else "brought by an adapter"
                    yield Change(name, self._shape(name)[0], how)

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

    # ---- running ------------------------------------------------------------------------------------------------------
    def check_space(self, out: Path) -> None:
        """
        Raises:
            OSError: the output does not fit on the disk.
        """
        folder = working_folder(out)
        there = sum(f.stat().st_blocks * 512 for f in folder.iterdir() if f.is_file()) if folder.is_dir() else 0
        nearest = next(p for p in (out.parent, *out.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(nearest).free + there
        if free < self.size + SPARE:
            raise OSError(
                f"{nearest} has {free / 1e9:,.2f} GB free and the merged model needs {self.size / 1e9:,.2f} GB; make room, or write it "
                "to another disk."
            )

    def fingerprint(self) -> int:
        """Of everything that the output depends on."""
        files = [[f, (s := (self.folder / f).stat()).st_size, s.st_mtime_ns] for f in self.checkpoint.files]
        config = zlib.crc32((self.folder / "config.json").read_bytes())
        how = None if self.combining is None else self.combining.fingerprint()
        parts = [files, config, str(self.out_dtype), how, [a.fingerprint() for a in self.adapters]]
        return zlib.crc32(json.dumps(parts).encode(), zlib.crc32(b"".join(s.header for s in self.shards.values())))

    @torch.no_grad()
    def run(
        self, out: str | Path, progress: Callable[[int], object] = lambda _: None, examine: Callable[[Path], object] = lambda _: None
    ) -> Path:
        """Write the merged model. The folder appears whole; what was finished before an interruption is kept and not done again.

        Args:
            out: the folder, which must not exist.
            progress: called with numbers of bytes that have been written since the last time.
            examine: called with the finished folder before it gets its name; what it raises undoes the merge.

        Raises:
            ValueError: the folder exists, or a weight would not be finite.
            OSError: there is no room on the disk.
        """
        out = Path(out)
        if out.exists():
            raise ValueError(f"{out} exists already; name a new folder.")
        self.check_space(out)
        folder = working_folder(out)
        folder.mkdir(parents=True, exist_ok=True)
        fingerprint = self.fingerprint()
        done = self._finished(folder, fingerprint)
        for name, shard in self.shards.items():
            shard.file = folder / name
            if name in done:
                progress(shard.size - len(shard.header))
        try:
            with self.files, Writing() as writing:
                self._write(lambda: self._note(folder, fingerprint, done), done, writing, progress)
        except (ValueError, TypeError):
            # It would not come out otherwise the next time.
            shutil.rmtree(folder, ignore_errors=True)
            raise
        finally:
            for shard in self.shards.values():
                shard.leave()
        self._write_others(folder)
        (folder / JOURNAL).unlink()
        try:
            examine(folder)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        folder.rename(out)
        return out

    def _finished(self, folder: Path, fingerprint: int) -> dict[str, int]:
        """The shards that an interrupted merge of the same things has finished; what else there is goes."""
        done: dict[str, int] = {}
        try:
            journal = json.loads((folder / JOURNAL).read_text(encoding="utf-8"))
            if journal["fingerprint"] == fingerprint:
                for name, check in journal["finished"].items():
                    self.shards[name].file = folder / name
                    if self.shards[name].is_whole(check):
                        done[name] = check
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            done = {}
        for path in folder.iterdir():
            if path.name not in done:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._note(folder, fingerprint, done)
        return done

    def _note(self, folder: Path, fingerprint: int, done: Mapping[str, int]) -> None:
        write_json(folder / JOURNAL, {"fingerprint": fingerprint, "finished": dict(done)})

    def _write(self, note: Callable[[], object], done: dict[str, int], writing: Writing, progress: Callable[[int], object]) -> None:
        """All tensors of the shards that are not finished, in the order of the base's bytes.

        Args:
            note: called whenever ``done`` has one more.
        """
        in_unit = {key: unit for unit in self.units for key in self._keys(unit)}
        left = {name: set(shard.at) for name, shard in self.shards.items() if name not in done}
        ready: set[int] = set()
        for name in self.shards:
            for keys in self._runs([k for k in self.shards[name].at if k in left.get(name, ()) and k not in in_unit]):
                self._copy(keys, writing, progress)
                left[name] -= set(keys)
            for key in self.shards[name].at:
                unit = in_unit.get(key)
                if unit is None or id(unit) in ready:
                    continue
                ready.add(id(unit))
                wanted = {k for k in self._keys(unit) if k in left.get(self.where[k], ())}
                if wanted:
                    self._merge(unit, wanted, writing, progress)
                    for k in wanted:
                        left[self.where[k]].discard(k)
            for file in [f for f, keys in left.items() if not keys]:
                writing.wait()
                self.shards[file].close()
                done[file] = self.shards[file].check()
                del left[file]
                note()

    def _keys(self, unit: Unit) -> list[str]:
        return [k for g in unit.groups for k in g.keys] + unit.new

    # -- what no adapter touches --
    def _runs(self, keys: Sequence[str]) -> Iterator[list[str]]:
        """Tensors that lie side by side in both files and stay as they are, together; others one by one."""
        run: list[str] = []
        for key in keys:
            entry = self.checkpoint.tensors[key]
            if run:
                last = self.checkpoint.tensors[run[-1]]
                shard = self.shards[self.where[key]]
                beside = last.start + last.nbytes == entry.start and shard.at[run[-1]] + last.nbytes == shard.at[key]
                size = entry.start + entry.nbytes - self.checkpoint.tensors[run[0]].start
                if not beside or self._cast(key) or self._cast(run[-1]) or size > AT_ONCE * 4:
                    yield run
                    run = []
            run.append(key)
        if run:
            yield run

    def _cast(self, key: str) -> bool:
        entry = self.checkpoint.tensors[key]
        return entry.dtype in DTYPES and self._dtype(DTYPES[entry.dtype]) != DTYPES[entry.dtype]

    def _copy(self, keys: Sequence[str], writing: Writing, progress: Callable[[int], object]) -> None:
        first, last = self.checkpoint.tensors[keys[0]], self.checkpoint.tensors[keys[-1]]
        shard = self.shards[self.where[keys[0]]]
        if self._cast(keys[0]):
            for rows in _slices(first.shape) if first.shape else (None,):
                part = self.files.read(first, rows).to(self._dtype(first.torch_dtype))
                self._put(shard, first.key, part, rows, writing, progress)
            return
        nbytes, source = last.start + last.nbytes - first.start, self.files.descriptor(first.file)

        def copy() -> None:
            shard.copy(keys[0], source, first.start, nbytes)
            progress(nbytes)

        writing.submit(copy, 0)

    def _put(self, shard: Shard, key: str, tensor: Tensor, rows: slice | None, writing: Writing, progress: Callable[[int], object]) -> None:
        skipped = 0 if rows is None or not len(tensor) else rows.start * (tensor.nbytes // len(tensor))

        def write() -> None:
            shard.put(key, tensor, skipped)
            progress(tensor.nbytes)

        writing.submit(write, tensor.nbytes)

    # -- what adapters touch --
    def _merge(self, unit: Unit, wanted: set[str], writing: Writing, progress: Callable[[int], object]) -> None:
        base = self.base

        def put(key: str, tensor: Tensor, rows: slice | None = None) -> None:
            if not _is_finite(tensor):
                raise ValueError(f"Merging gives values of {key!r} that are not finite; an adapter seems broken, or its weight too large.")
            if key in wanted:
                self._put(self.shards[self.where[key]], key, tensor, rows, writing, progress)

        with base.holding() as held, self._filled(unit):
            if (site := self._rowwise(unit)) is not None:
                place: Any = next(p for p in unit.places if isinstance(p, Place) and p.site is site)
                group = base.group_of[base.names[id(site.module._parameters[site.name])]]
                for other in unit.groups:
                    if other is not group and other.keys[0] in wanted:
                        self._copy(other.keys, writing, progress)
                entry = base.checkpoint.tensors[group.keys[0]]
                factors = [_Factors(place.adapters[n]) for n in place.here(self.order)]
                for rows in _slices(entry.shape):
                    put(entry.key, _added(site, self.files.read(entry, rows), rows, factors).to(self._dtype(entry.torch_dtype)), rows)
                return
            found = self._folded(unit)
            for name in unit.new:
                tensor = found[name] if name in found else base.fetch(base.canonical(name))
                put(name, tensor.to(self._dtype(tensor.dtype)))
            for group in unit.groups:
                tensors = {}
                for name in group.targets:
                    same = base.canonical(name) if name in self.following else name
                    source = found.get(same)
                    tensors[name] = base.fetch(base.canonical(name)) if source is None else source
                    held.pop(name, None)
                for key, tensor in group.revert(tensors, base.model, base.key_of(group)).items():
                    put(key, tensor.to(self._dtype(tensor.dtype)))

    @contextmanager
    def _filled(self, unit: Unit) -> Iterator[None]:
        """Within, the adapters of a unit have their values, and its hosts their biases."""
        before: list[tuple[dict[str, Any], dict[str, Any]]] = []

        def keep(table: dict[str, Any]) -> None:
            before.append((table, dict(table)))

        try:
            for place in unit.places:
                if isinstance(place, Place):
                    own, bias = place.site.module._parameters, place.site.bias_name
                    stored = own.get(bias) if bias is not None else None
                    if stored is not None and stored.device.type == "meta":
                        keep(own)
                        own[bias] = nn.Parameter(self.base.fetch(self.base.names[id(stored)]), requires_grad=False)  # type: ignore[index]
                elif self.combining is not None:
                    for module in place.module.modules():
                        keep(module._parameters)
                        for key, q in module._parameters.items():
                            if q is not None and id(q) in self.base.names:
                                module._parameters[key] = nn.Parameter(self.base.fetch(self.base.names[id(q)]), requires_grad=False)
            for place in unit.places:
                for p in place.adapters.values():
                    for module in p.modules():
                        keep(module._parameters)
                        keep(module._buffers)
                    for slot, adapter, key in self.slots.get(id(p), ()):
                        slot.put(adapter.read(key))
            for place in unit.places:
                for p in place.adapters.values():
                    if isinstance(p, Adapter):
                        p.materialise()
            yield
        finally:
            for table, old in reversed(before):
                table.clear()
                table.update(old)

    def _folded(self, unit: Unit) -> dict[str, Tensor]:
        """What becomes of a unit's tensors, by their names in the model."""
        if self.combining is not None:
            return self._combined(unit, self.combining)
        found: dict[str, Tensor] = {}
        for place in unit.places:
            base = f"{place.path}." if place.path else ""
            if isinstance(place, Retrained):
                for key, tensor in place.adapters[place.here(self.order)[-1]].state_dict().items():
                    found[base + key] = tensor.to(self._shape(base + key)[1])
                continue
            site = place.site
            if base + site.name in self.following:
                continue
            found |= _named(place, *place.fold(self.order))
        return found

    def _combined(self, unit: Unit, by: Combining) -> dict[str, Tensor]:
        """The same where all adapters become one change first."""
        effect = combined(effects(self.base.model, self.order, unit.places), by.weights, by.chosen, by.options, None, None, by.seed)
        for path, tokens in effect.tokens.items():
            effect.weights[path, tokens.site.name] = tokens.update(path)
        found: dict[str, Tensor] = {}
        for place in unit.places:
            if isinstance(place, Retrained):
                for key, change in effect.modules.get(place.path, {}).items():
                    module = place.module.get_submodule(key.rpartition(".")[0])
                    own: Any = (module._parameters | module._buffers)[key.rpartition(".")[2]]
                    found[f"{place.path}.{key}"] = (full(own) + change).to(own.dtype)
                continue
            key = (place.path, place.name)
            update = effect.weights.get(key)
            bias = update.bias if update is not None else effect.biases.get(key)
            w, b = place.site.read()
            w = full(w) if update is None else full(w) + full(update.matrix())
            found |= _named(place, w, b if bias is None else bias if b is None else full(b) + full(bias))
        return {name: tensor for name, tensor in found.items() if name not in self.following}

    def _rowwise(self, unit: Unit) -> Site | None:
        """The weight of a unit that low-rank updates are added to and nothing else, so that it can be done in slices."""
        if self.combining is not None:
            return None
        acting = [p for p in unit.places if not isinstance(p, Place) or f"{p.path}.{p.site.name}" not in self.following]
        if len(acting) != 1 or unit.new or not isinstance(place := acting[0], Place):
            return None
        site, base = place.site, self.base
        if type(site) not in (Linear, TransposedLinear, Embedding, Stack):
            return None
        name = base.names.get(id(site.module._parameters.get(site.name)))
        if name is None or name in base.values or name not in base.group_of or any(g.converter is not None for g in unit.groups):
            return None
        if sum(n in base.group_of for n in base.aliases.get(name, ())) > 1:
            return None
        return site if all(_only_adds(p) for p in place.adapters.values()) else None

    # -- the rest of the folder --
    def _write_others(self, folder: Path) -> None:
        for path in self.folder.iterdir():
            if path.is_file() and not path.name.startswith(".") and not path.name.endswith(OTHER_WEIGHTS):
                shutil.copyfile(path, folder / path.name)
        self._write_config(folder)
        with_tokenizer = (p for a in reversed(self.adapters) if ((p := Path(a.source)) / "tokenizer_config.json").is_file())
        trained = next(with_tokenizer, None)
        if trained is not None:
            for name in TOKENIZER:
                (folder / name).unlink(missing_ok=True)
                if (trained / name).is_file():
                    shutil.copyfile(trained / name, folder / name)
        if self.checkpoint.index is not None:
            metadata = {k: v for k, v in (self.checkpoint.index.get("metadata") or {}).items() if k != "total_parameters"}
            write_index(folder, self.where, [s.size - len(s.header) for s in self.shards.values()], metadata)

    def _write_config(self, folder: Path) -> None:
        changes = dict(self.config_changes)
        if self.out_dtype is not None:
            changes["dtype"] = str(self.out_dtype).removeprefix("torch.")
        if not changes:
            return
        config = dict(self.config)
        parts = [config, *(v for v in config.values() if isinstance(v, dict) and "hidden_size" in v)]
        if "dtype" in changes:
            dtype = changes.pop("dtype")
            for part in parts:
                for spelled in ("dtype", "torch_dtype"):
                    if spelled in part or (part is config and spelled == "dtype" and "torch_dtype" not in part):
                        part[spelled] = dtype
        if "vocab_size" in changes and "vocab_size" not in config and isinstance(config.get("text_config"), dict):
            config["text_config"]["vocab_size"] = changes.pop("vocab_size")
        if "tie_word_embeddings" in changes and "tie_word_embeddings" in (config.get("text_config") or {}):
            config["text_config"]["tie_word_embeddings"] = False
        write_json(folder / "config.json", config | changes)


def _named(place: Place, w: Tensor, b: Tensor | None) -> dict[str, Tensor]:
    """The weight and the bias of a place as the model keeps them, under their names.

    Raises:
        ValueError: there is a bias, and the base has no place for it.
    """
    site, prefix = place.site, f"{place.path}." if place.path else ""
    found = {prefix + site.name: site.raw(w).to(site.dtype)}
    own = site.bias()
    if b is not None and own is not None:
        found[f"{prefix}{site.bias_name}"] = b.to(own.dtype)
    elif b is not None and b.any():
        raise ValueError(
            f"An adapter gives {place.path!r} a bias, and the layers of this architecture have none: a merged file could not hold it. "
            "Keep base and adapter apart, or train without biases."
        )
    return found


def working_folder(out: Path) -> Path:
    """Where a merge is written before it is complete."""
    return out.parent / f".{out.name}.merging"


def _is_finite(tensor: Tensor) -> bool:
    """Infinities and what is no number show in the extremes, which are found many times faster than by looking at each."""
    return not (tensor.is_floating_point() and tensor.numel()) or all(bool(x.isfinite()) for x in torch.aminmax(tensor))


def _slices(shape: Sequence[int]) -> Iterator[slice]:
    """Rows of a tensor (slices of its first axis) that hold about as many numbers as are worth computing at once."""
    width = max(1, torch.Size(shape[1:]).numel())
    step = max(1, AT_ONCE // 4 // width)
    for start in range(0, max(1, shape[0]), step):
        yield slice(start, min(shape[0], start + step))


# ---- low-rank updates in slices ----------------------------------------------------------------------------------------------
def _only_adds(p: Adapter) -> bool:
    """Whether an adapter's fold is ``w + s B A`` and leaves the bias alone."""
    method = p.method
    if not isinstance(method, LowRank) or type(method).fold is not Additive.fold or type(method).delta is not LowRank.delta:
        return False
    return p.trained_bias is None and method.delta_bias(p) is None


class _Factors:
    """The factors of one adapter, and the slices of what they add."""

    def __init__(self, p: Adapter) -> None:
        method: Any = p.method
        self.a, self.b = map(full, method.factors(p))
        self.scaling, self.strength = method.scaling, p.strength

    def delta(self, site: Site, rows: slice) -> Tensor:
        """What is added to these rows of the host's tensor, as the matrix has it."""
        a, b = self.a, self.b
        if site.batch:
            a, b = a[rows], b[rows]
        elif isinstance(site, TransposedLinear):
            a = a[:, rows]
        else:
            b = b[rows]
        return (b @ a).mul_(self.scaling).mul_(self.strength)


def _added(site: Site, raw: Tensor, rows: slice, factors: Sequence[_Factors]) -> Tensor:
    """Rows of the host's tensor with the updates in them, in full precision. What was read is no longer needed."""
    w = full(site.matrix(raw))
    for f in factors:
        w.add_(f.delta(site, rows))
    return site.matrix(w)


__all__ = ["AdapterFile", "Change", "StreamMerge", "working_folder"]
