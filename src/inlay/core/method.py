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
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import CONFIGS, PeftConfig, nearest
from .site import Site

if TYPE_CHECKING:
    from .adapter import Adapter
    from .inner import Inner

Init = Callable[[Tensor, torch.Generator], Any]
Config = TypeVar("Config", bound=type[PeftConfig])


# ---- parameters ---------------------------------------------------------------------------------------------------------
def zeros(tensor: Tensor, _: torch.Generator) -> None:
    tensor.zero_()


def ones(tensor: Tensor, _: torch.Generator) -> None:
    tensor.fill_(1)


def constant(value: float) -> Init:
    return lambda tensor, _: tensor.fill_(value)


def normal(std: float = 1.0) -> Init:
    return lambda tensor, generator: tensor.normal_(0, std, generator=generator)


def kaiming_uniform(tensor: Tensor, generator: torch.Generator) -> None:
    """The default of ``nn.Linear``: uniform within ``1 / sqrt(fan_in)``, fan_in being the last axis."""
    bound = tensor.shape[-1] ** -0.5
    tensor.uniform_(-bound, bound, generator=generator)


@dataclass(frozen=True)
class Param:
    """The declaration of one tensor of an adapter; nothing is allocated by it.

    Args:
        axes: ``"out"``, ``"in"``, ``"channel"`` or numbers, behind the batch axes of the site.
        init: fills a float32 tensor in place, with a generator of its own.
        key: the end of its key in a file; None stands for the parameter's name.
        file_shape: its shape in a file, where the layout's own (`Site.in_file`) is not what HF writes.
        trainable: a parameter, or a buffer.
        persistent: goes to the file and the state dict.
        batched: the batch axes of the site go before the axes.
        dtype: a dtype of its own (indices); None follows the policy.
        optional: a file may lack it; `Method.derive` gives it then.
    """

    axes: tuple[str | int, ...]
    init: Init = zeros
    key: str | None = None
    file_shape: tuple[int, ...] | None = None
    trainable: bool = True
    persistent: bool = True
    batched: bool = True
    dtype: torch.dtype | None = None
    optional: bool = False

    def shape(self, site: Site) -> tuple[int, ...]:
        return (*(site.batch if self.batched else ()), *map(site.size, self.axes))

    def to_file(self, site: Site, tensor: Tensor) -> Tensor:
        if self.file_shape is not None:
            return tensor.reshape(self.file_shape)
        return site.in_file(self.axes, tensor) if self.batched else tensor

    def from_file(self, site: Site, tensor: Tensor) -> Tensor:
        if self.file_shape is not None or not self.batched:
            return tensor.reshape(self.shape(site))
        return site.from_file(self.axes, tensor)

    def shape_in_file(self, site: Site) -> tuple[int, ...]:
        return tuple(self.to_file(site, torch.empty(self.shape(site), device="meta")).shape)


def generator_for(seed: int | None, *path: str) -> torch.Generator:
    """A generator of its own for each tensor: it depends on the seed and the tensor's name, on nothing that ran before."""
    # torch's generator on the CPU looks at 32 bits of its seed, so all of it has to go into those.
    return torch.Generator().manual_seed(zlib.crc32("/".join((str(seed or 0), *path)).encode()))


# ---- methods ------------------------------------------------------------------------------------------------------------
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

    def rows_apart(self, site: Site) -> bool:
        """Whether the fold of some rows of the weight is those rows of the fold (of a stack: of some matrices), with the method's
        tensors cut as they are declared. Such a weight can be merged in pieces, see `core.part`."""
        return False

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


@dataclass
class Additive(Method):
    """A method that adds to the weight: it gives `delta`, and may give `delta_bias`.

    Args:
        use_dora: train the lengths of the adapted weight's rows apart from their directions (see `core.decomposed`).
        input_dropout: share of inputs that the added path leaves out in training, in [0, 1).
    """

    use_dora: bool = field(default=False, metadata=_help("Train the rows' magnitudes apart.") | {"ours": True})
    input_dropout: float = field(default=0.0, metadata=_help("Share of inputs that the update leaves out in training.") | {"ours": True})

    scales_itself: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.input_dropout < 1:
            raise ValueError(f"`input_dropout` is a share in [0, 1), not {self.input_dropout!r}.")
        if self.input_dropout and type(self).dropout is not Additive.dropout:
            raise ValueError(f"{type(self).__name__} has a dropout of its own; set that in place of `input_dropout`.")

    def variant(self) -> Method:
        from .decomposed import decomposed

        return self.become(decomposed(type(self))) if self.use_dora else self

    def delta(self, p: Adapter) -> Tensor:
        """What is added to the weight, ``(*batch, out, in)``, at strength 1."""
        raise NotImplementedError

    def delta_bias(self, p: Adapter) -> Tensor | None:
        """What is added to the bias, ``(out,)``."""
        return None

    @property
    def dropout(self) -> float:
        """The share of inputs that the added path leaves out in training."""
        return self.input_dropout

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        extra = self.delta_bias(p)
        if extra is not None:
            extra = p.strength * full(extra)
            b = extra if b is None else b + extra
        return self.plus_delta(p, w), b

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        """The weight with `delta` at the adapter's strength, where there is a cheaper way than to add the two."""
        return torch.add(w, full(self.delta(p)), alpha=p.strength)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return self.with_delta(p, inner, x, self.delta(p))

    def with_delta(self, p: Adapter, inner: Inner, x: Tensor, delta: Tensor) -> Tensor:
        """The layer on ``x`` with this update: `delta`, or what training draws from it."""
        y = inner(x)
        extra = self.delta_bias(p)
        x, delta = meet(F.dropout(x, self.dropout, p.training) if x.is_floating_point() else x, delta)
        return add(y, inner.site.apply(x, delta, extra), p.strength)

    def thinned(self, p: Adapter, change: Tensor) -> Tensor:
        """What training keeps of the change ``(*batch, out, in)`` of a weight that its host reads itself. The host's inputs are
        out of reach, so dropout takes whole input features, for all rows of the batch alike."""
        if not self.dropout:
            return change
        kept = torch.rand(change.shape[-1], device=change.device) >= self.dropout
        return change * kept / (1 - self.dropout)


class LowRank(Additive):
    """A method whose delta is ``scaling * B A``: it gives `factors`."""

    @property
    def scaling(self) -> float:
        return 1.0

    def factors(self, p: Adapter) -> tuple[Tensor, Tensor]:
        """``A (*batch, r, in)`` and ``B (*batch, out, r)``."""
        raise NotImplementedError

    def delta(self, p: Adapter) -> Tensor:
        a, b = self.factors(p)
        return self.scaling * (full(b) @ full(a))

    def plus_delta(self, p: Adapter, w: Tensor) -> Tensor:
        if w.ndim > 2 or type(self).delta is not LowRank.delta:
            return super().plus_delta(p, w)
        a, b = (full(t).to(w.dtype) for t in self.factors(p))
        return torch.addmm(w, b, a, alpha=self.scaling * p.strength)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        return self.with_factors(p, inner, x, *self.factors(p), self.trained(p))

    def trained(self, p: Adapter) -> tuple[Tensor, Tensor] | None:
        """A and B of a lower rank whose product differs from that of `factors` by a constant, where there are such: what is
        constant then costs nothing in the backward pass."""
        return None

    def with_factors(
        self, p: Adapter, inner: Inner, x: Tensor, a: Tensor, b: Tensor, trained: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """The layer on ``x`` with this update: `factors`, or what training draws from them."""
        from ..kernels.lowrank import linear_plus_low_rank, restoring_pays

        extra = self.delta_bias(p)
        scale = self.scaling * p.strength
        rate = self.dropout if p.training else 0.0
        dense = inner.dense
        if dense is not None and extra is None:
            return linear_plus_low_rank(x, *dense, a, b, scale, rate, trained)
        if inner.stored is not None and extra is None and restoring_pays(x, a, inner.site.dtype):
            return linear_plus_low_rank(x, *inner.stored, a, b, scale, rate, trained)
        y = inner(x)
        if rate and x.is_floating_point():
            x = F.dropout(x, rate)
        x, a, b = meet(x, a, b)
        if extra is not None:
            y = add(y, inner.site.rows(extra), p.strength)
        return add(y, inner.site.up(inner.site.down(x, a), b), scale)


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


def meet(x: Tensor, *params: Tensor) -> tuple[Tensor, ...]:
    """Input and parameters in one dtype: that of the parameters, or autocast's, which then does it without a copy of ours."""
    if not x.is_floating_point():
        return x, *params
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        return x.to(dtype), *(q.to(dtype) for q in params)
    return x.to(params[0].dtype), *params


def add(y: Tensor, h: Tensor, scale: float) -> Tensor:
    """``y + scale * h`` in the dtype of ``y``, rounded once."""
    return torch.add(y, h, alpha=scale).to(y.dtype)


def count(declared: dict[str, Param], site: Site) -> int:
    """How many numbers the trainable parameters hold."""
    return sum(prod(q.shape(site)) for q in declared.values() if q.trainable)
