"""A LoRA of the difference between two full models on disk, read tensor by tensor: neither model is ever loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..core.method import full
from ..core.plan import Plan
from ..core.site import Site, Stack
from ..core.targets import Target, base_modules, site_at
from ..formats.slots import PREFIX, key_in_file, slots_of_parts
from ..formats.streaming import Files
from ..methods.lora import LoraConfig
from .adapter_of import config_for, put
from .convert import Converted
from .cutting import check_rank, cut
from .disk_base import DiskBase, base_on_disk
from .effects import Effect, Update, nothing


@dataclass(frozen=True)
class Left:
    """A tensor that differs and that no product of two factors stands for: a bias, a norm.

    Attributes:
        norm: of the difference.
        kept: the adapter brings it along.
    """

    name: str
    shape: tuple[int, ...]
    norm: float
    kept: bool


@dataclass
class Extraction:
    """An adapter that was extracted: configuration, tensors by their keys in a file, and what became of each weight.

    Attributes:
        layers: the weights that LoRA stands for, with the error of each.
        others: what else differs.
        same: how many tensors are the same in both models.
    """

    config: LoraConfig
    tensors: dict[str, Tensor]
    layers: list[Converted] = field(default_factory=list)
    others: list[Left] = field(default_factory=list)
    same: int = 0


@torch.no_grad()
def extract(
    base: Path, tuned: Path, rank: float, *, retrain_others: bool = False, progress: Callable[[int, int], object] | None = None
) -> Extraction:
    """What training changed of a model, as LoRA of a rank.

    Args:
        base, tuned: folders of two models of one architecture, in safetensors files.
        rank: of the LoRA, or the share in (0, 1] of the squared norm that is to stay at each weight.
        retrain_others: bring along what is no matrix: biases as such, other modules as a whole (``modules_to_save``).
        progress: called with the number of tensors that are done, and of all.

    Raises:
        ValueError: the rank is no such number, a folder cannot be read, the models are of different shapes, or they are the same.
    """
    check_rank(rank)
    with Files() as files:
        one, other = base_on_disk(base, files), base_on_disk(tuned, files)
        _check_tensors(one, other)
        return _Extractor(one, other, rank, retrain_others).run(progress)


def _check_tensors(base: DiskBase, tuned: DiskBase) -> None:
    """
    Raises:
        ValueError: one of the models has tensors that the other lacks.
    """
    own, its = ({name for name, _ in disk.model.named_parameters(remove_duplicate=False)} for disk in (base, tuned))
    if own != its:
        folder = (tuned if its - own else base).checkpoint.folder
        raise ValueError(f"The models are of different shapes: only {folder} has {min((its - own) or (own - its))!r}.")


class _Extractor:
    def __init__(self, base: DiskBase, tuned: DiskBase, rank: float, retrain_others: bool) -> None:
        self.base, self.tuned, self.rank, self.retrain_others = base, tuned, rank, retrain_others
        self.effect, self.layers, self.others, self.same = Effect(), [], [], 0
        self.modules: list[str] = []

    def run(self, progress: Callable[[int, int], object] | None) -> Extraction:
        modules = list(base_modules(self.base.model))
        tensors = [(path, module, leaf) for path, module in modules for leaf, q in module._parameters.items() if q is not None]
        # Weights that both models tie are one; where only one of them does, each has a change of its own.
        seen: set[tuple[str, str]] = set()
        for done, (path, module, leaf) in enumerate(tensors, 1):
            name = f"{path}.{leaf}" if path else leaf
            pair = self.base.canonical(name), self.tuned.canonical(name)
            # A model may have more than its files, such as a pooler that was not trained.
            if pair not in seen and (pair[0] in self.base.group_of or pair[1] in self.tuned.group_of):
                seen.add(pair)
                change = self._change(*pair)
                if change is None:
                    self.same += 1
                else:
                    self._take(path, module, leaf, name, change)
            if progress is not None:
                progress(done, len(tensors))
        if not self.effect.weights:
            bring = "bring along what is a bias with `retrain_others`" if not self.retrain_others else "norms alone are no LoRA"
            why = f"no matrix differs, but {self.others[0].name!r} does: {bring}" if self.others else "the two are the same"
            raise ValueError(f"There is nothing to extract: {why}.")
        return self._written()

    def _change(self, name: str, of_tuned: str) -> Tensor | None:
        """What is added to a tensor; None where nothing is."""
        old, new = self.base.fetch(name), self.tuned.fetch(of_tuned)
        if old.shape != new.shape:
            raise ValueError(f"{name!r} is {tuple(old.shape)} in the base and {tuple(new.shape)} in the tuned model.")
        if torch.equal(old, new):
            return None
        change = full(new) - full(old)
        if not change.isfinite().all():
            raise ValueError(f"{name!r} holds values that are not finite in one of the models.")
        return change

    def _take(self, path: str, module: Any, leaf: str, name: str, change: Tensor) -> None:
        site = _matrix_at(module, leaf)
        if site is not None:
            before = self.effect.weights.get((path, leaf))
            found, error = cut(Update(Target(path, site).name, site, dense=site.matrix(change)), self.rank)
            # What was cut off is freed here; only the factors stay.
            made = replace(found, bias=None if before is None else before.bias)
            self.effect.weights[path, leaf] = made
            self.effect.ties = self.effect.ties or self._tied(name)
            self.layers.append(Converted(name, made.rank or 0, float(change.norm()), error))
            return
        self.others.append(Left(name, tuple(change.shape), float(change.norm()), self.retrain_others))
        if not self.retrain_others:
            return
        site = _matrix_at(module, "weight")
        if leaf == "bias" and site is not None:
            update = self.effect.weights.get((path, "weight")) or nothing(path, site)
            self.effect.weights[path, "weight"] = replace(update, bias=change)
        elif path not in self.modules:
            self.modules.append(path)

    def _tied(self, name: str) -> bool:
        """Whether both models tie a tensor."""
        return all(base.canonical(name) in base.aliases for base in (self.base, self.tuned))

    def _written(self) -> Extraction:
        model: Any = self.base.model
        task = "CAUSAL_LM" if str(model.config.architectures).endswith("ForCausalLM']") else None
        like = LoraConfig(task_type=task, base_model_name_or_path=str(self.base.checkpoint.folder))
        r = self.rank if isinstance(self.rank, int) else None
        config = config_for(model, self.effect, [like], r)
        assert isinstance(config, LoraConfig)
        parts = Plan(model, config, True, True).parts()
        put(parts, self.effect, model)
        tensors = {key_in_file(s, PREFIX): s.to_file(s.tensor.detach()).contiguous() for s in slots_of_parts(parts, "default")}
        inside = dict(base_modules(model))
        for path in self.modules:
            for leaf, q in inside[path]._parameters.items():
                if q is not None:
                    tensors[f"{PREFIX}{path}.{leaf}"] = self.tuned.fetch(self.tuned.canonical(f"{path}.{leaf}"))
        config = replace(config, modules_to_save=self.modules or None, inference_mode=True)
        return Extraction(config, tensors, self.layers, self.others, self.same)


def _matrix_at(module: Any, leaf: str) -> Site | None:
    """The site of a tensor that is a matrix, or several of them, which LoRA acts on: a weight, or a stack of experts."""
    q = module._parameters.get(leaf)
    if q is None or q.ndim < 2:
        return None
    site = site_at(module)
    if leaf == "weight" and site is not None:
        return None if site.reads or site.unfit else site
    return Stack(module, leaf) if q.ndim == 3 and site is None else None
