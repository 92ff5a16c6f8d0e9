"""A base that stays on disk: its modules without values, and for each weight the tensors of the files that it is made of.

transformers reads files of several layouts into one model: renamed, stacked, split. Its own table of conversions says how, in both
directions, so experts that a file keeps one by one are merged as the stack that the model has, and written one by one again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..core.stores import Store
from ..formats.folder import read_json
from ..formats.packed import READABLE, Packed, packed, quantised
from ..formats.streaming import Checkpoint, Files
from ..quantize import quantizable

# Numbers that stand for others: a weight in them is packed, or comes with scales.
PACKED = {torch.uint8, torch.int8, torch.int32, torch.float8_e4m3fn, torch.float8_e5m2}


class OnDisk(Store):
    """A weight that is read from the files each time that someone wants its values."""

    def __init__(self, base: DiskBase) -> None:
        self.base = base

    def __deepcopy__(self, _: Any) -> OnDisk:
        return self

    def device(self, module: nn.Module, name: str) -> torch.device:
        return torch.device("cpu")

    def read(self, module: nn.Module, name: str) -> Tensor:
        stored = self.tensor(module, name)
        return self.base.fetch(self.base.names[id(stored)]) if stored.device.type == "meta" else stored


@dataclass
class Group:
    """Tensors of the files that become tensors of the model together; most often one that becomes one.

    Attributes:
        targets: of the model, by name, on the meta device.
        converter: what transformers does with them; None where they are taken as they are.
        first: the name by which the conversion is called.
        patterns: which of the conversion's patterns each key follows.
        kept_as: the keys in the files, where `keys` are others.
    """

    keys: list[str]
    targets: dict[str, Tensor] = field(default_factory=dict)
    converter: Any = None
    first: str = ""
    patterns: dict[str, str] = field(default_factory=dict)
    kept_as: dict[str, str] = field(default_factory=dict)

    def some(self, which: slice) -> Group:
        """Some matrices of a stack that the files keep one by one, under the keys of the first ones: a conversion counts from 0."""
        (name, target), by_pattern = next(iter(self.targets.items())), dict[str, list[str]]()
        for key in self.keys:
            by_pattern.setdefault(self.patterns[key], []).append(key)
        kept_as = {first: key for keys in by_pattern.values() for first, key in zip(keys, keys[which], strict=False)}
        patterns = {key: self.patterns[key] for key in kept_as}
        return Group(list(kept_as), {name: target[which]}, self.converter, self.first, patterns, kept_as)

    def is_stack(self, base: DiskBase) -> bool:
        """Whether `some` matrices can be converted without the others, there and back."""
        if self.converter is None or len(self.targets) != 1:
            return False
        count = next(iter(self.targets.values())).shape[0]
        if any(list(self.patterns.values()).count(pattern) != count for pattern in self.patterns.values()):
            return False
        one, tensors = self.some(slice(0, 1)), base.checkpoint.tensors
        try:
            found = one.convert(lambda key: tensors[key].meta(), base.model)
            back = one.revert(dict(found), base.model, base.key_of(one))
        except (NotImplementedError, RuntimeError, ValueError, KeyError, IndexError):
            return False
        fits = {name: t.shape for name, t in found.items()} == {name: t.shape for name, t in one.targets.items()}
        return fits and all(t.shape == tensors[one.kept_as[key]].shape for key, t in back.items())

    def convert(self, read: Callable[[str], Tensor], model: Any) -> dict[str, Tensor]:
        """The model's tensors from the files'.

        Args:
            read: gives one of them by its key in the files. The conversion lets go of each as soon as it can.
        """
        if self.converter is None:
            return {self.first: read(self.keys[0])}
        converter = copy.deepcopy(self.converter)
        for key in self.keys:
            converter.add_tensor(self.first, key, self.patterns[key], partial(read, self.kept_as.get(key, key)))
        return _single(converter.convert(self.first, model=model, config=model.config))

    def revert(self, tensors: dict[str, Tensor], model: Any, original: Callable[[str], str | None]) -> dict[str, Tensor]:
        """The files' tensors from the model's, which are taken out of the dictionary.

        Raises:
            ValueError: the conversion cannot be undone.
        """
        if self.converter is None:
            return {self.keys[0]: tensors.pop(self.first)}
        try:
            back, first = self.converter.reverse_transform(), ""
            for name in self.targets:
                renamed, pattern = back.rename_source_key(name)
                first = first or renamed
                back.add_tensor(renamed, name, pattern, tensors.pop(name))
            found = _single(back.convert(first, model=model, config=model.config))
        except (NotImplementedError, RuntimeError, ValueError, KeyError) as error:
            raise ValueError(self._one_way(error)) from error
        named = {original(name): t for name, t in found.items()}
        if set(named) != set(self.keys):
            raise ValueError(self._one_way("its names are others"))
        return named  # type: ignore[return-value]

    def _one_way(self, why: object) -> str:
        return (
            f"The way in which {self.keys[0]!r} is stored cannot be written again ({why}). Save the base in the layout of the model "
            "first: `AutoModelForCausalLM.from_pretrained(base).save_pretrained(other, save_original_format=False)`."
        )


def _single(found: Mapping[str, Any]) -> dict[str, Tensor]:
    return {k: v[0] if isinstance(v, list) else v for k, v in found.items()}


class DiskBase:
    """A model of transformers in a folder, its weights left where they are.

    Args:
        checkpoint: the model's files.
        model: the model without values, as its configuration makes it.
        files: opens what is read.
        other_shapes: names of tensors that an adapter brings in other shapes than the files have.

    Attributes:
        model: its modules, on the meta device, in the dtypes of the files.
        groups: which tensors of the files make which of the model.
        group_of: the group of each of the model's tensors.
        names: what the model calls a parameter or buffer, by its identity; tied ones have one name.
        aliases: all names of a tensor that has several, by that one name.
        values: what stands in for a tensor of the files.

    Raises:
        ValueError: the files do not fit the configuration.
    """

    def __init__(self, checkpoint: Checkpoint, model: Any, files: Files, other_shapes: Sequence[str] = ()) -> None:
        self.checkpoint, self.model, self.files = checkpoint, model, files
        self.values: dict[str, Callable[[], Tensor]] = {}
        self._held: dict[str, Tensor] | None = None
        self._renamings: list[Any] = []
        self.groups = self._grouped()
        self.group_of = {name: g for g in self.groups for name in g.targets}
        self.names: dict[int, str] = {}
        self.aliases: dict[str, list[str]] = {}
        self._in_dtypes_of_files(set(other_shapes))
        store = OnDisk(self)
        for module in self.model.modules():
            module.__dict__["_inlay_store"] = store

    # ---- names --------------------------------------------------------------------------------------------------------
    def _grouped(self) -> list[Group]:
        from transformers import core_model_loading as loading
        from transformers.conversion_mapping import get_model_conversion_mapping

        model: Any = self.model
        own = model.state_dict()
        transforms = get_model_conversion_mapping(model)
        self._renamings = renamings = [t for t in transforms if isinstance(t, loading.WeightRenaming)]
        converters = [t for t in transforms if isinstance(t, loading.WeightConverter)]
        by_pattern = {p: c for c in converters for p in c.source_patterns}
        prefix = model.base_model_prefix
        found: dict[str, Group] = {}
        tensors = self.checkpoint.tensors
        transposed = quantizable(model, []) if any(isinstance(e, Packed) for e in tensors.values()) else {}
        for key in sorted(tensors, key=loading.dot_natural_key):
            name, pattern = loading.rename_source_key(key, renamings, converters, prefix, own)
            if name not in own and key in own:
                name, pattern = loading.rename_source_key(key, [], [], base_model_prefix=prefix, meta_state_dict=own)
            if name not in own:
                # What the model has no use for stays in its file.
                continue
            if pattern is None:
                if isinstance(entry := tensors[key], Packed) and transposed.get(name):
                    tensors[key] = entry.turned()
                found[name] = Group([key], {name: self.checkpoint.tensors[key].meta()}, first=name)
                continue
            group = found.setdefault(name, Group([], converter=by_pattern[pattern], first=name))
            group.keys.append(key)
            group.patterns[key] = pattern
        for group in found.values():
            if group.converter is not None:
                group.targets = group.convert(lambda key: tensors[key].meta(), model)
        return list(found.values())

    def key_of(self, group: Group) -> Callable[[str], str | None]:
        """The key in the files by the name that undoing a conversion gives."""
        from transformers import core_model_loading as loading

        known = {loading.rename_source_key(key, self._renamings, [])[0]: key for key in group.keys} | {key: key for key in group.keys}
        prefix = f"{self.model.base_model_prefix}."

        def find(name: str) -> str | None:
            return known.get(name) or known.get(name.removeprefix(prefix)) or known.get(prefix + name)

        return find

    def _in_dtypes_of_files(self, other_shapes: set[str]) -> None:
        by_tensor: dict[int, list[str]] = {}
        tensors: dict[int, nn.Parameter] = {}
        for name, q in self.model.named_parameters(remove_duplicate=False):
            by_tensor.setdefault(id(q), []).append(name)
            tensors[id(q)] = q
        made: dict[int, nn.Parameter] = {}
        for key, names in by_tensor.items():
            old = tensors[key]
            name = next((n for n in names if n in self.group_of), names[0])
            dtype = old.dtype
            if name in self.group_of:
                stored = self.group_of[name].targets[name]
                dtype = stored.dtype
                if stored.shape != old.shape and not other_shapes & set(names):
                    raise ValueError(
                        f"{name!r} is {tuple(stored.shape)} in the files of {self.checkpoint.folder} and {tuple(old.shape)} by its "
                        "config.json; they belong to different models."
                    )
            if not dtype.is_floating_point or dtype in PACKED:
                raise ValueError(quantised(self.checkpoint.folder, f"{name!r} is stored as {str(dtype).removeprefix('torch.')}"))
            made[key] = nn.Parameter(torch.empty(old.shape, dtype=dtype, device="meta"), requires_grad=False)
            self.names[id(made[key])] = name
            if len(names) > 1:
                self.aliases[name] = names
        for module in self.model.modules():
            for key, q in module._parameters.items():
                if q is not None:
                    module._parameters[key] = made[id(q)]
        self._keep = made
        self.names |= {id(buffer): name for name, buffer in self.model.named_buffers()}

    def canonical(self, name: str) -> str:
        """The one name of a tensor that has several."""
        return next((c for c, names in self.aliases.items() if name in names), name)

    # ---- values -------------------------------------------------------------------------------------------------------
    def read(self, key: str) -> Tensor:
        """A tensor of the files."""
        return self.files.read(self.checkpoint.tensors[key])

    def fetch(self, name: str) -> Tensor:
        """A tensor of the model.

        Raises:
            ValueError: the files do not have it.
        """
        held = self._held
        if held is not None and name in held:
            return held[name]
        if name in self.values:
            found = {name: self.values[name]()}
        elif name in self.group_of:
            group = self.group_of[name]
            found = group.convert(self.read, self.model)
        else:
            raise ValueError(f"The files of {self.checkpoint.folder} lack {name!r}, which an adapter acts on.")
        if held is not None:
            held |= found
        return found[name]

    @contextmanager
    def holding(self) -> Iterator[dict[str, Tensor]]:
        """Within, what has been read is kept."""
        self._held = {}
        try:
            yield self._held
        finally:
            self._held = None


def quantisation_config(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """How a model is quantised, by its config.json; None where it is not."""
    return config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")


def quantisation(config: Mapping[str, Any]) -> str | None:
    """What a model is quantised by, by its config.json; None where it is not."""
    found = quantisation_config(config)
    return str(found.get("quant_method", "see quantization_config in its config.json")) if found else None


def read_config(folder: Path) -> dict[str, Any]:
    """The content of a model's config.json.

    Raises:
        ValueError: there is none.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} has no config.json, so it is no model's folder.")
    return read_json(folder / "config.json")


def open_checkpoint(checkpoint: Checkpoint, config: Mapping[str, Any], files: Files) -> Checkpoint:
    """The files of a model, where quantised weights look like dense ones.

    Raises:
        ValueError: they are quantised in a way that cannot be read.
    """
    how = quantisation(config)
    if how is None:
        return checkpoint
    if how not in READABLE:
        raise ValueError(quantised(checkpoint.folder, how))
    text = config.get("text_config") or {}
    named = next((str(d) for d in (config.get("dtype"), config.get("torch_dtype"), text.get("dtype")) if d), "float32")
    return packed(checkpoint, quantisation_config(config) or {}, files, getattr(torch, named.removeprefix("torch.")))


def base_on_disk(folder: Path, files: Files) -> DiskBase:
    """The model of a folder, of the class that its configuration names.

    Raises:
        ValueError: the folder cannot be read, or its model is quantised in a way that cannot be.
    """
    as_read = read_config(folder)
    checkpoint = open_checkpoint(Checkpoint.open(folder), as_read, files)
    import transformers
    from transformers import AutoConfig

    try:
        config: Any = AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder}: its config.json cannot be read: {' '.join(str(error).split())}") from error
    cls: Any = getattr(transformers, (config.architectures or [""])[0], None) or transformers.AutoModel
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = cls.from_config(config) if cls.__name__.startswith("Auto") else cls._from_config(config)
    return DiskBase(checkpoint, model, files)
