"""The law: a method is a pure map on a matrix. Everything else is written once, for all methods.

    around(p, inner, x) == site.apply(x, *fold(p, *inner.params()))

`fold` says what becomes of weight and bias and is enough: forward, merge, mixed batch, stacking and conversion follow from
it. `around` is the same map on the way through the layer, where there is a cheaper one. A method that is no function of the
weight has no `fold`, and merging it is refused with its reason.

The configuration is the method: the dataclass that users know carries the mathematics.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from .config import CONFIGS, PeftConfig, nearest
from .param import Param
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner

Config = TypeVar("Config", bound=type[PeftConfig])


METHODS: dict[str, type[Method]] = {}


def register(cls: Config) -> Config:
    """Class decorator: make a configuration known by its ``peft_type``. A method becomes part of every table and every test."""
    name = cls.__dataclass_fields__["peft_type"].default  # type: ignore[attr-defined]
    CONFIGS[str(name)] = cls
    if issubclass(cls, Method):
        METHODS[str(name)] = cls
    return cls


def _help(text: str) -> dict[str, Any]:
    return {"help": text}


@dataclass
class Method(PeftConfig):
    """The options that all methods on weights have in common, and the law that they obey.

    Args:
        target_modules: suffixes of module names, or one regular expression for whole names, or ``"all-linear"``; where None,
            the defaults of the base's architecture.
        exclude_modules: as above, taken out again.
        layers_to_transform: only in the blocks of these indices.
        layers_pattern: the name of the list of blocks that the indices count.
        bias: ``"none"``, ``"all"`` or ``"<method>_only"``: retrain the biases of all, or of the adapted, layers.
        modules_to_save: modules to retrain and save as a whole.
        target_parameters: names of raw ``nn.Parameter`` to adapt, such as stacks of experts.
        trainable_token_indices: rows of the embedding to retrain beside the method.
        ensure_weight_tying: give weights that are tied in the base one adapter in common.
        overrides: other values of any field by pattern of module names, ``{"layers.0.*q_proj": {"r": 16}}``.
        seed: of the initial values, which depend on it and on the names of the modules alone.
        strength: with which the adapter acts once it is set in: 0 is the base, 1 the adapter, 2 doubles what it does.
        strength_pattern: other strengths by pattern of module names.
    """

    target_modules: list[str] | set[str] | str | None = field(default=None, metadata=_help("Names or regex of the modules to adapt."))
    exclude_modules: list[str] | set[str] | str | None = field(default=None, metadata=_help("Names or regex of modules to leave out."))
    layers_to_transform: list[int] | int | None = field(default=None, metadata=_help("Indices of the blocks to adapt."))
    layers_pattern: list[str] | str | None = field(default=None, metadata=_help("Name of the list of blocks."))
    bias: str = field(default="none", metadata=_help("Which biases to retrain: none, all or <method>_only."))
    modules_to_save: list[str] | None = field(default=None, metadata=_help("Modules to retrain and save as a whole."))
    target_parameters: list[str] | None = field(default=None, metadata=_help("Names of raw parameters to adapt."))
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(default=None, metadata=_help("Embedding rows to retrain."))
    ensure_weight_tying: bool = field(default=False, metadata=_help("One adapter for weights that are tied in the base."))
    overrides: dict[str, dict[str, Any]] | None = field(default=None, metadata=_help("Other values of any field by module pattern."))
    seed: int | None = field(default=None, metadata=_help("Seed of the initial values.") | {"in_file": False})
    strength: float = field(default=1.0, metadata=_help("How much of the adapter acts: 0 is the base, 1 all of it.") | {"ours": True})
    strength_pattern: dict[str, float] | None = field(default=None, metadata=_help("Other strengths by module pattern.") | {"ours": True})

    # How the tensors' names start; the paper's number at arXiv; what becomes of the weight, in one line.
    prefix: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    equation: ClassVar[str] = ""
    # How many numbers a layer trains, in its sizes and the options, where that does not show in the declared tensors.
    count_formula: ClassVar[str] = ""
    # Sets of options by name, the plain one ("") first: what the tests of the law run on, for small layers.
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {}}
    # Arguments of the model's call that are the method's and not the base's.
    takes: ClassVar[tuple[str, ...]] = ()
    # Methods of the configuration that users call as `model.base_model.<name>(...)`; the adapters go in front of the arguments.
    on_model: ClassVar[tuple[str, ...]] = ()
    # What HF's class of the adapted model (`LoraModel`) has for this method alone, by name.
    of_tuner: ClassVar[Mapping[str, Any]] = {}
    ours: ClassVar[frozenset[str]] = frozenset(
        {"target_parameters", "trainable_token_indices", "ensure_weight_tying", "overrides", "seed", "bias"}
    )
    # Why the method cannot be merged; empty where it has a fold.
    unmergeable: ClassVar[str] = ""
    # Whether `fold` and `around` heed the adapter's strength by themselves.
    scales_itself: ClassVar[bool] = False
    # The patterns that stand for one field each: {"rank_pattern": "r"}.
    patterns: ClassVar[dict[str, str]] = {}
    # The option that says how large the tensors are. An adapter can take the place of a larger one, see `padded`.
    size_option: ClassVar[str] = "r"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (list, tuple)):
                setattr(self, name, set(value))
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("`layers_pattern` counts the blocks for `layers_to_transform`; set that too.")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise ValueError("`layers_to_transform` cannot be combined with a regex in `target_modules`; put the indices in the regex.")
        only = f"{self.prefix.partition('_')[0]}_only"
        if self.bias not in ("none", "all", only):
            raise ValueError(f"bias={self.bias!r} is not one of 'none', 'all', {only!r}.{nearest(self.bias, ['none', 'all', only])}")
        for pattern, fields in (self.overrides or {}).items():
            for name in fields:
                if name not in self.field_names():
                    raise ValueError(f"overrides[{pattern!r}]: unknown field {name!r}.{nearest(name, self.field_names())}")

    # -- which parameters, and where --
    def prepare(self, base: nn.Module) -> None:
        """Fill in the options whose defaults depend on the base, before modules are looked for."""

    def rebuild(self, base: nn.Module) -> Callable[[], None] | None:
        """Change the structure of the base, before modules are looked for; returns what undoes it, called when the adapter leaves."""
        return None

    def site_of(self, module: nn.Module) -> Site | None:
        """Where the method acts in a module that is targeted; None stands for the module's weight."""
        return None

    def chosen(self, paths: list[str]) -> Collection[str]:
        """Which of the modules that the options mean get an adapter; they come in their order in the model."""
        return paths

    def refuses(self, site: Site) -> str | None:
        """The mathematical reason why the method cannot act on a site, or None."""
        return None

    def params(self, site: Site) -> dict[str, Param]:
        """The tensors that the method keeps for a site, declared."""
        raise TypeError(f"{type(self).__name__} declares no parameters")

    def shared(self, sites: Mapping[str, Site]) -> nn.Module | None:
        """What the layers of one adapter have in common. It hangs on the first of them and reaches the others as ``p.shared``.

        Args:
            sites: by name, in the order of the modules.
        """
        return None

    def shared_to_fold(self, sites: Mapping[str, Site]) -> nn.Module | None:
        """`shared` where the layers are only folded, by a file: it need not hold more than they use, nor values that a file has."""
        return self.shared(sites)

    def to_fold(self, site: Site) -> Method:
        """The method where it is only folded, by a file: it need not keep what `fold` does without."""
        return self

    def bank_key(self, name: str) -> str | None:
        """What a file calls a tensor of `shared`; None leaves it out."""
        return f"base_model.{name}"

    def repeated(self, p: Adapter) -> dict[str, str]:
        """Tensors of `shared` that a file repeats at each layer: their name in the bank by their key behind the layer's name."""
        return {}

    def written(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What a file holds in place of the adapter's tensors, by key."""
        return tensors

    def as_read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The inverse of `written`."""
        return tensors

    def at(self, path: str) -> Method:
        """The method as it is for the module of this name: patterns applied, and the variant that the options ask for."""
        return self.patterned(path).acting()

    def patterned(self, path: str) -> Method:
        """The method with the values that patterns give its fields at the module of this name."""
        changes: dict[str, Any] = {}
        for attribute, name in {**self.patterns, "strength_pattern": "strength"}.items():
            hit = next((v for k, v in (getattr(self, attribute) or {}).items() if matches(k, path)), None)
            if hit is not None:
                changes[name] = hit
        for pattern, fields in (self.overrides or {}).items():
            if matches(pattern, path):
                changes |= fields
        return replace(self, **changes) if changes else self

    @property
    def follows_ties(self) -> bool:
        """Whether weights that are tied in the base get one adapter in common."""
        return self.ensure_weight_tying

    @property
    def heavy(self) -> str:
        """Why to merge it on disk takes more memory than a few times the weight; empty where it does not."""
        return ""

    @property
    def never_identity(self) -> str:
        """Why an adapter with these options cannot start as the base; empty where it does."""
        return ""

    def acting(self) -> Method:
        """`variant`, under a name that no option of a method has."""
        return self.variant()

    def variant(self) -> Method:
        """The class that carries the mathematics of the options that are set."""
        return self

    def become(self, cls: type[Method]) -> Method:
        """The same fields under the mathematics of another class."""
        other = copy.copy(self)
        other.__class__ = cls  # type: ignore[assignment]
        return other

    def derive(self, p: Adapter) -> None:
        """Set what follows from the base and is in no file: the buffers that are not persistent. Called before `start`, and for
        an adapter from a file as well."""

    def refilled(self, adapters: Sequence[Adapter], saved: Callable[[], PeftConfig]) -> Callable[[], None]:
        """Called before adapters that are there get the values of a file; what is returned takes it back, if the file does not fit.

        Args:
            saved: reads the configuration that the file has beside it.
        """
        return lambda: None

    def start(self, p: Adapter) -> None:
        """Set what the initial values of single tensors cannot know: called once all of them are there."""

    def default_targets(self) -> dict[str, list[str] | str]:
        """The modules to adapt where none are named, by ``model_type`` of the base."""
        from .targets import DEFAULT_TARGETS

        return DEFAULT_TARGETS

    # -- in the place of a larger adapter --
    def padded(self, p: Adapter, small: Adapter) -> dict[str, Tensor]:
        """Values for ``p`` under which it does what ``small`` does, an adapter of the same method and of no larger rank. What is
        in no file stays as it is. Whoever calls this sees to a factor in front of the update, and to whether it is right.

        Raises:
            ValueError: there are none, for a reason of the mathematics.
        """
        if set(p.declared) != set(small.declared):
            raise ValueError(f"one of them consists of {', '.join(sorted(p.declared))}, the other of {', '.join(sorted(small.declared))}")
        return {name: padded(getattr(small, name), getattr(p, name).shape) for name, param in p.declared.items() if param.persistent}

    def padded_shared(self, shared: nn.Module, small: nn.Module) -> dict[str, Tensor]:
        """The same for what the layers share, by name."""
        found = small.state_dict()
        if found.keys() != shared.state_dict().keys():
            raise ValueError("what the layers share has other parts")
        return {name: padded(found[name], tensor.shape) for name, tensor in shared.state_dict().items()}

    # -- in training --
    def given(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the layers need to know of the model's call: tensors with the batch in front, which reach them as ``p.call``."""
        return {}

    @property
    def listens(self) -> bool:
        """Whether it takes something from the model's call."""
        return bool(self.takes) or type(self).given is not Method.given

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        """A term of the loss, of the adapters of one name at all their layers."""
        return None

    def stepped(self, adapters: Sequence[Adapter], optimizer: torch.optim.Optimizer) -> None:
        """Called after each step of an optimiser that holds parameters of these adapters; their gradients are still there."""

    # -- the law --
    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the method makes of the weight ``(*batch, out, in)`` and the bias. Half precision comes in as float32."""
        raise TypeError(self.unmergeable or f"{type(self).__name__} is not a function of the weight")

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        """The adapted layer on ``x``, given the layer so far."""
        w, b = inner.params()
        w, b = folded(p, w, b)
        dtype = inner.site.dtype
        return inner.site.apply(x, w.to(dtype), None if b is None else b.to(dtype))

    def apart(self, site: Site) -> tuple[str, ...]:
        """Along which axes a weight can be folded, and so merged, in pieces (see `core.part`): ``"out"`` where the fold of some rows is
        those rows of the fold, ``"in"`` where that holds for columns, with the method's tensors cut as they are declared. For the
        matrices of a stack any answer stands but none."""
        return ("batch",) if site.batch else ()

    # -- on whole modules --
    def ahead(self, p: Adapter, x: Tensor) -> Tensor:
        """What goes into the module. With `behind`, for a method that is no more than these two around it, and has them as its
        `around`: a module that writes into a cache is then called once for all rows of a batch."""
        return x

    def behind(self, p: Adapter, x: Tensor, y: Any) -> Any:
        """What becomes of the module's output ``y``; ``x`` is what came, before `ahead`."""
        return y


def matches(pattern: str, path: str) -> bool:
    """HF's rule for ``rank_pattern`` and its like: the pattern is the end of the name, from a dot on; ``^`` anchors it."""
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def full(t: Tensor) -> Tensor:
    """At least single precision: products of half-precision factors lose digits that a merge would keep for ever."""
    return t.float() if t.dtype in (torch.bfloat16, torch.float16) or t.dtype.itemsize == 1 else t


def lengths(w: Tensor) -> Tensor:
    """The length of each row of a matrix: ``(*batch, out)``."""
    # Counted from the front: of a last axis of length one, the compiler of torch 2.11 believes that ``norm(dim=-1)`` keeps it.
    return w.norm(dim=w.ndim - 1)


def folded(p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`Method.fold` in full precision and at the adapter's strength: 0 is the base, 1 the adapter."""
    w, b = full(w), None if b is None else full(b)
    new_w, new_b = p.method.fold(p, w, b)
    if p.strength != 1 and not p.method.scales_itself:
        new_w = torch.lerp(w, new_w, p.strength)
        if new_b is not None:
            new_b = torch.lerp(torch.zeros_like(new_b) if b is None else b, new_b, p.strength)
    return new_w, new_b


def biased(p: Adapter, b: Tensor | None) -> Tensor | None:
    """The bias so far, or the adapter's retrained one at the adapter's strength."""
    if p.trained_bias is None:
        return b
    new = full(p.trained_bias)
    return new if b is None or p.strength == 1 else torch.lerp(b.to(new.dtype), new, p.strength)


def padded(tensor: Tensor, shape: Sequence[int], parts: int = 1, axis: int = -1) -> Tensor:
    """A tensor in a corner of zeros of another shape; or its parts along an axis, each in the corner of its own.

    Raises:
        ValueError: it is larger.
    """
    if parts > 1:
        whole = list(shape)
        axis = axis % len(whole)
        within = [*whole[:axis], parts, whole[axis] // parts, *whole[axis + 1 :]]
        return padded(tensor.unflatten(axis, (parts, -1)), within).flatten(axis, axis + 1)
    if tensor.ndim != len(shape) or any(a > b for a, b in zip(tensor.shape, shape, strict=True)):
        raise ValueError(f"{tuple(tensor.shape)} does not go into {tuple(shape)}")
    found = tensor.new_zeros(tuple(shape))
    found[tuple(slice(n) for n in tensor.shape)] = tensor.detach()
    return found
