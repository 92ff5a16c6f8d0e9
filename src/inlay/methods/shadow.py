"""ShadowPEFT: a small network walks beside the model, block by block, and corrects what goes into each.

    x  <-  x + alpha W_up W_down (x - s)        into a block, s being the shadow's state
    s  <-  (1 - g) s + g T(y),  g = sigmoid(G(y))        behind it, y being what came out

The state starts as what the shadow, a model of its own, makes of the same input. It goes on beside the blocks, so that they
hand tensors to each other as ever, and the shadow's keys and values lie behind the base's own layers in the cache of a
generation, where whatever happens to the cache happens to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from inspect import signature
from itertools import pairwise
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from ..core.config import PeftType, TaskType
from ..core.method import Method, Param, full, generator_for, kaiming_uniform, register, zeros
from ..core.rows import selector
from ..core.site import Site, Whole
from ..core.targets import base_modules

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner
    from ..core.session import Session

# What models call the list of their blocks, and their sizes.
BLOCKS = ("layers", "h", "single_transformer_blocks", "transformer_blocks", "blocks", "block", "layer")
DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
WIDTH = ("hidden_size", "n_embd", "d_model")
HEADS = ("num_attention_heads", "n_head", "num_heads")
INNER = ("intermediate_size", "ffn_dim", "n_inner")
# The options that set them in a mirror.
MIRRORED = ("shadow_num_hidden_layers", "shadow_hidden_size", "shadow_num_attention_heads", "shadow_intermediate_size")


def uniform_of(fan_in: int) -> Callable[[Tensor, torch.Generator], None]:
    """The default of the bias of an ``nn.Linear`` with as many inputs."""
    return lambda tensor, generator: tensor.uniform_(-(fan_in**-0.5), fan_in**-0.5, generator=generator)  # type: ignore[func-returns-value]


def _latest_loss(tuner: Any) -> Tensor | None:
    """The loss of the active shadow's own predictions in the last call in training, without its weight."""
    from ..core.inlaid import adapters_of

    return adapters_of(tuner.model, tuner.active_adapters[0])[0].shared.latest_loss


@register
@dataclass
class ShadowConfig(Method):
    """Correct what goes into each block by how far it is from a small network's own view of the input.

    Args:
        target_modules: whole blocks; where None, all of them.
        r: rank of the correction.
        shadow_alpha: strength of the correction.
        shadow_dropout: share of the difference that training leaves out.
        init_weights: start with no correction.
        shadow_model: ``"mirror"`` for a fresh model of the base's architecture (for others than those of transformers, an MLP on
            each token), or the folder or repository of a trained one.
        shadow_num_hidden_layers, shadow_hidden_size, shadow_num_attention_heads, shadow_intermediate_size: sizes of the mirror;
            the base's where None, with a single block.
        share_embeddings: a mirror as wide as the base reads the base's own embeddings.
        update_hidden_size: hidden width of the two networks that move the state on; ``r`` where None.
        auxiliary_loss_weight: weight of the loss of what the shadow predicts alone, in training.

    Raises:
        ValueError: sizes of a mirror are given for a trained shadow, or are not positive.
    """

    peft_type: str | None = PeftType.SHADOW
    r: int = field(default=8, metadata={"help": "Rank of the correction."})
    shadow_alpha: float = field(default=0.1, metadata={"help": "Strength of the correction."})
    shadow_dropout: float = field(default=0.2, metadata={"help": "Share of the difference that training leaves out."})
    init_weights: bool = field(default=True, metadata={"help": "Start with no correction."})
    shadow_model: str = field(default="mirror", metadata={"help": "'mirror', or where a trained shadow is."})
    shadow_num_hidden_layers: int | None = field(default=None, metadata={"help": "Blocks of the mirror; one where None."})
    shadow_hidden_size: int | None = field(default=None, metadata={"help": "Width of the mirror; the base's where None."})
    shadow_num_attention_heads: int | None = field(default=None, metadata={"help": "Heads of the mirror; the base's where None."})
    shadow_intermediate_size: int | None = field(default=None, metadata={"help": "Inner width of the mirror; the base's where None."})
    share_embeddings: bool = field(default=True, metadata={"help": "The mirror reads the base's embeddings."})
    update_hidden_size: int | None = field(default=None, metadata={"help": "Hidden width of what moves the state on."})
    auxiliary_loss_weight: float = field(default=0.05, metadata={"help": "Weight of the shadow's own loss."})

    prefix: ClassVar[str] = "shadow_"
    equation: ClassVar[str] = "block(x + alpha W_up W_down (x - s)), and s moves on with each block"
    count_formula: ClassVar[str] = "2·d·r + 2·(2·d·u + u + d) a block, u = update_hidden_size, and the shadow once"
    unmergeable: ClassVar[str] = (
        "A shadow corrects what goes into a block by the state of another network, which no weight of the block knows; "
        "`unload` gives the base back, `unload_shadow` the shadow as a model of its own."
    )
    on_model: ClassVar[tuple[str, ...]] = ("unload_shadow",)
    of_tuner: ClassVar[Mapping[str, Any]] = {"last_shadow_loss": property(_latest_loss)}

    def __post_init__(self) -> None:
        super().__post_init__()
        sizes = ("r", "update_hidden_size", *MIRRORED)
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value!r}: give a positive number.")
        if not 0 <= self.shadow_dropout < 1:
            raise ValueError(f"`shadow_dropout` is a share in [0, 1), not {self.shadow_dropout!r}.")
        given = [name for name in MIRRORED if getattr(self, name) is not None]
        if self.shadow_model != "mirror" and given:
            raise ValueError(f"{', '.join(given)}: a trained shadow has sizes of its own; leave these out, or use shadow_model='mirror'.")

    # -- which parameters, and where --
    def rebuild(self, base: nn.Module) -> Callable[[], None]:
        from ..core.targets import explain_targets

        self.prepare(base)
        targets = explain_targets(base, self).targets
        undo = Undo(self)
        if targets:
            holder = holder_of(base, targets[0].path)
            inside = list(signature(base.get_submodule(targets[0].path).forward).parameters)
            walk = Walk(self, list(signature(holder.forward).parameters), inside)
            first = base.get_submodule(targets[0].path)
            undo.hooks = [
                first.register_forward_pre_hook(walk.entering, with_kwargs=True),
                holder.register_forward_pre_hook(walk.before, with_kwargs=True),
                holder.register_forward_hook(walk.after, with_kwargs=True, always_call=True),
            ]
            # For `shared`, which is called next and is told of the blocks alone.
            self.__dict__["_around"] = base, holder
        return undo

    def prepare(self, base: nn.Module) -> None:
        if self.target_modules is None:
            path, count = blocks_of(base)
            self.target_modules = {f"{path}.{i}" for i in range(count)}
        self.__dict__["_width"] = width_of(getattr(base, "config", None), base)

    def at(self, path: str) -> Method:
        method = super().at(path)
        method.__dict__["_width"] = self.__dict__.get("_width", 0)
        return method

    def default_targets(self) -> dict[str, list[str] | str]:
        return {}

    def site_of(self, module: nn.Module) -> Site | None:
        return Whole(module)

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "init_weights=False draws the correction at random"

    def params(self, site: Site) -> dict[str, Param]:
        d, r = self.__dict__.get("_width", 0), self.r
        u = self.update_hidden_size or r
        found = {
            "shadow_down": Param((r, d), kaiming_uniform, key="shadow_down.default.weight"),
            "shadow_up": Param((d, r), zeros if self.init_weights else kaiming_uniform, key="shadow_up.default.weight"),
        }
        for name in ("transform", "gate"):
            own, key = f"shadow_{name}", f"shadow_update_{name}.default"
            found[f"{own}_in"] = Param((u, d), kaiming_uniform, key=f"{key}.0.weight")
            found[f"{own}_in_bias"] = Param((u,), uniform_of(d or 1), key=f"{key}.0.bias")
            found[f"{own}_out"] = Param((d, u), kaiming_uniform, key=f"{key}.2.weight")
            found[f"{own}_out_bias"] = Param((d,), uniform_of(u), key=f"{key}.2.bias")
        return found

    def shared(self, sites: Mapping[str, Site]) -> nn.Module:
        base, holder = self.__dict__.pop("_around")
        return Shadow(self, base, holder, list(sites))

    def bank_key(self, name: str) -> str:
        part, _, rest = name.partition(".")
        return f"base_model.{part}.default.{rest}"

    def as_read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # Files of HF have the embeddings of a mirror that reads the base's, where they go by another name than `embed_tokens`.
        unread = {f"base_model.shadow_backbone.default.{name}.weight" for name in ("wte", "embeddings.word_embeddings")}
        own_width = self.shadow_hidden_size in (None, self.__dict__.get("_width"))
        if self.shadow_model != "mirror" or not self.share_embeddings or not own_width:
            return tensors
        return {k: t for k, t in tensors.items() if k not in unread}

    # -- the mathematics --
    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Any:
        return self.behind(p, x, inner(self.ahead(p, x)))

    def ahead(self, p: Adapter, x: Tensor) -> Tensor:
        walk: Any = p.call.get("shadow")
        # A block that is called by itself has no shadow.
        return self.corrected(p, x, walk.state(p, x)) if isinstance(walk, Walked) else x

    def behind(self, p: Adapter, x: Tensor, y: Any) -> Any:
        walk: Any = p.call.get("shadow")
        if isinstance(walk, Walked) and p.path in p.shared.after:
            walk.go_on(p, self.moved_on(p, of_block(y, x), walk.state(p, x)))
        return y

    def corrected(self, p: Adapter, x: Tensor, state: Tensor) -> Tensor:
        """What goes into the block; both ``(batch, tokens, dim)``."""
        off = F.dropout((x - state.to(x.dtype)).to(p.shadow_down.dtype), self.shadow_dropout, p.training)
        change = F.linear(F.linear(off, p.shadow_down), p.shadow_up)
        return x + (self.shadow_alpha * p.strength * change).to(x.dtype)

    def moved_on(self, p: Adapter, y: Tensor, state: Tensor) -> Tensor:
        """The shadow's state behind the block that made ``y``."""
        y = y.to(p.shadow_down.dtype)

        def network(name: str) -> Tensor:
            into, out = getattr(p, f"shadow_{name}_in"), getattr(p, f"shadow_{name}_out")
            h = F.gelu(F.linear(y, into, getattr(p, f"shadow_{name}_in_bias")))
            return F.linear(h, out, getattr(p, f"shadow_{name}_out_bias"))

        return torch.lerp(state.to(y.dtype), network("transform"), network("gate").sigmoid()).to(state.dtype)

    # -- in training --
    def given(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"shadow": Seen(kwargs.get("labels"), kwargs.get("attention_mask"))}  # type: ignore[dict-item]

    def penalty(self, adapters: Sequence[Adapter]) -> Tensor | None:
        seen: Any = adapters[0].call.get("shadow")
        bank = adapters[0].shared
        bank.latest_loss = None
        if not isinstance(seen, Seen) or seen.labels is None or seen.start is None:
            return None
        loss = bank.loss(seen.start, seen.labels, seen.mask)
        if loss is None:
            return None
        bank.latest_loss = loss.detach()
        return self.auxiliary_loss_weight * loss if self.auxiliary_loss_weight > 0 else None

    # -- what users ask of the model --
    def unload_shadow(self, adapters: Sequence[Adapter], copy: bool = False) -> nn.Module:
        """The shadow as a model of its own: it predicts, and generates, without the base.

        Args:
            copy: take copies of the modules, embeddings and head of the base among them, as a checkpoint needs; else they are
                the same modules.
        """
        from ..operations.shadow import alone

        return alone(adapters[0].shared, copy)


# ---- the shadow ----------------------------------------------------------------------------------------------------------
class Shadow(nn.Module):
    """What the blocks have in common.

    Attributes:
        shadow_backbone: the small model.
        shadow_projection: from its width to that of the base.
        shadow_head: for classifications, predicts from the shadow's state.
        after: the name of the next adapted block by that of each.
        start: the name of the first.
        shares: the backbone reads embeddings of the base.
        latest_loss: of the shadow's own predictions in the last call in training, without its weight.
    """

    def __init__(self, config: ShadowConfig, base: nn.Module, holder: nn.Module, order: Sequence[str]) -> None:
        super().__init__()
        width = config.__dict__["_width"]
        self.start, self.after = order[0], dict(pairwise(order))
        self.task = str(config.task_type) if config.task_type is not None else None
        # Modules of the base are no parts of this one.
        self._around = base, holder
        self.shares, self.latest_loss = False, None
        seed = int(torch.randint(2**31, (1,), generator=generator_for(config.seed, "shadow")))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            from ..operations import flux

            self.reads_block = flux.is_flux(holder, order[0])
            self.shadow_backbone, projection = self._made(config, holder, width)
            own = width_of(self.shadow_backbone.config, self.shadow_backbone)
            if projection is None:
                projection = nn.Identity() if own == width else nn.Linear(own, width, bias=False)
                if self.reads_block and own != width:
                    projection = flux.start_of(projection)  # type: ignore[arg-type]
            if isinstance(projection, nn.Linear) and projection.weight.shape != (width, own):
                raise ValueError(
                    f"shadow_model={config.shadow_model!r} brings a projection from {projection.in_features} to "
                    f"{projection.out_features}, and the shadow and the base have widths {own} and {width}."
                )
            self.shadow_projection = projection
        if config.shadow_model == "mirror" and config.share_embeddings and own == width and reads_embeddings(holder):
            self.shares = True
            set_embeddings(self.shadow_backbone, nn.Identity())
        elif config.shadow_model != "mirror":
            # Those of a trained shadow stay as they are: buffers, in the file all the same.
            for embedding in embeddings(self.shadow_backbone):
                weight = embedding._parameters.pop("weight", None)
                if weight is not None:
                    embedding.register_buffer("weight", weight.detach())
        if self.task == TaskType.SEQ_CLS:
            from ..core.plan import HEADS as CLASSIFIERS
            from ..core.plan import pristine_copy

            head = next((m for n in CLASSIFIERS if isinstance(m := getattr(base, n, None), nn.Module)), None)
            if head is not None:
                self.shadow_head = pristine_copy(head)

    def _made(self, config: ShadowConfig, holder: nn.Module, width: int) -> tuple[nn.Module, nn.Module | None]:
        if reads_embeddings(holder):
            return (mirror(config, holder), None) if config.shadow_model == "mirror" else trained(config.shadow_model)
        if self.reads_block:
            from ..operations import flux

            return (flux.mirror(config, holder) if config.shadow_model == "mirror" else flux.trained(config.shadow_model, holder)), None
        if config.shadow_model != "mirror":
            raise ValueError(f"{type(holder).__name__} reads no tokens, so no trained shadow fits; use shadow_model='mirror'.")
        own = config.shadow_hidden_size or width
        return TokenMLP(width, own, config.shadow_num_hidden_layers or 1, config.shadow_intermediate_size or own), None

    @property
    def base(self) -> nn.Module:
        return self._around[0]

    @property
    def holder(self) -> Any:
        return self._around[1]

    @property
    def dtype(self) -> torch.dtype:
        return next(q.dtype for q in self.shadow_backbone.parameters() if q.is_floating_point())

    def first_state(self, call: Mapping[str, Any], cache: Any) -> Tensor:
        """The state before the first block ``(batch, tokens, dim)``.

        Args:
            call: the arguments of the base, by name.
            cache: the shadow's own.

        Raises:
            ValueError: the base was given embeddings and the shadow reads tokens.
        """
        inputs = {name: call[name] for name in ("attention_mask", "position_ids") if call.get(name) is not None}
        tokens, embedded = call.get("input_ids"), call.get("inputs_embeds")
        if self.shares and embedded is None:
            embedded = self.holder.get_input_embeddings()(tokens)
        if embedded is not None:
            if not self.shares and width_of(self.shadow_backbone.config, self.shadow_backbone) != embedded.shape[-1]:
                raise ValueError("This shadow has embeddings of its own width and reads tokens: give `input_ids`, not `inputs_embeds`.")
            inputs["inputs_embeds"] = embedded.to(self.dtype)
        else:
            inputs["input_ids"] = tokens
        inputs |= {} if cache is None else {"past_key_values": cache}
        return self.shadow_projection(self.shadow_backbone(**inputs, use_cache=cache is not None, return_dict=True).last_hidden_state)

    def first_state_of(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The same where all there is to see is what goes into the first block.

        Args:
            call: what that block was called with, by name.
        """
        further = (call,) if self.reads_block else ()
        return self.shadow_projection(self.shadow_backbone(x.to(self.dtype), *further)).to(x.dtype)

    def loss(self, state: Tensor, labels: Tensor, mask: Tensor | None) -> Tensor | None:
        """That of what the shadow predicts alone, from its first state."""
        if self.task == TaskType.CAUSAL_LM:
            head = self.base.get_output_embeddings()  # type: ignore[operator]
            logits = full(head(state.to(head.weight.dtype)))
            return F.cross_entropy(logits[..., :-1, :].flatten(0, -2), labels[..., 1:].flatten(), ignore_index=-100)
        if not hasattr(self, "shadow_head"):
            return None
        return classified(self.shadow_head(last_token(state, mask)), labels)


def last_token(hidden: Tensor, mask: Tensor | None) -> Tensor:
    """What stands at the last token that is no padding: ``(batch, dim)``."""
    if mask is None:
        return hidden[:, -1]
    last = (mask.ne(0) * torch.arange(mask.shape[-1], device=mask.device)).argmax(-1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def classified(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of a classification, of one number, or of several classes at once, by what the labels are."""
    if logits.shape[-1] == 1:
        return F.mse_loss(logits.squeeze(-1), labels.to(logits.dtype).flatten())
    if labels.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, labels)
    return F.cross_entropy(logits, labels.flatten())


class TokenMLP(nn.Module):
    """A shadow that sees one token at a time: residual blocks, after a change of width."""

    def __init__(self, width: int, own: int, depth: int, inner: int) -> None:
        super().__init__()
        self.config = Sizes(own)
        self.proj_in = nn.Linear(width, own)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(own), nn.Linear(own, inner), nn.GELU(), nn.Linear(inner, own)) for _ in range(depth)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj_in(x)
        for block in self.blocks:
            x = x + block(x)
        return x


@dataclass
class Sizes:
    hidden_size: int


def mirror(config: ShadowConfig, holder: nn.Module) -> nn.Module:
    """A fresh model of the base's architecture, with fewer blocks.

    Raises:
        ValueError: the configuration of the base lacks a size that is to be set.
    """
    import copy

    from ..core.place import host_class

    sizes = copy.deepcopy(holder.config)
    depth = config.shadow_num_hidden_layers or 1
    wanted = [(DEPTH, depth), (WIDTH, config.shadow_hidden_size), (HEADS, config.shadow_num_attention_heads)]
    for names, value in [*wanted, (INNER, config.shadow_intermediate_size)]:
        name = next((n for n in names if hasattr(sizes, n)), None)
        if name is None and value is not None:
            raise ValueError(f"{type(holder).__name__}'s configuration has none of {', '.join(names)}: a mirror of it cannot be sized.")
        if value is not None:
            setattr(sizes, name, value)  # type: ignore[arg-type]
    kinds = getattr(sizes, "layer_types", None)
    if kinds:
        sizes.layer_types = [*kinds, *[kinds[-1]] * depth][:depth]  # type: ignore[union-attr]
    if getattr(sizes, "max_window_layers", None):
        sizes.max_window_layers = min(sizes.max_window_layers, depth)  # type: ignore[union-attr, type-var]
    return host_class(holder)(sizes)


def trained(source: str) -> tuple[nn.Module, nn.Module | None]:
    """A trained shadow from a folder or a repository, with the projection that it may bring: a configuration and safetensors,
    of an architecture that transformers has."""
    import json

    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel
    from transformers.utils.hub import cached_file

    found = cached_file(source, "config.json")
    with open(str(found), encoding="utf-8") as file:
        plain = json.load(file)
    if plain.get("model_type") != "causal_lm_with_hidden_projection":
        return AutoModel.from_pretrained(source, trust_remote_code=False, use_safetensors=True, dtype=torch.float32), None
    inner = dict(plain["shadow_model_config"])
    model = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner), trust_remote_code=False)
    tensors = load_file(str(cached_file(source, "model.safetensors")))
    model.load_state_dict({k.removeprefix("shadow_model."): t for k, t in tensors.items() if k.startswith("shadow_model.")})
    weight = tensors.get("shadow_hidden_projection.weight")
    if weight is None:
        raise ValueError(f"shadow_model={source!r} says that it has a projection, and there is no 'shadow_hidden_projection.weight'.")
    projection = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    projection.weight = nn.Parameter(weight.float())
    return model, projection


# ---- the base --------------------------------------------------------------------------------------------------------------
def blocks_of(base: nn.Module) -> tuple[str, int]:
    """The path of the list of blocks, and their number.

    Raises:
        ValueError: there is none that is known by its name.
    """
    decoder = getattr(base, "get_decoder", lambda: None)()
    paths = {m: p for p, m in base_modules(base)}
    for root in (decoder, base):
        if root is None or root not in paths:
            continue
        lists = [(p, m) for p, m in base_modules(root) if isinstance(m, nn.ModuleList) and len(m)]
        known = [(p, m) for p, m in lists if p.rpartition(".")[2] in BLOCKS]
        if known:
            # The least deep, and of those side by side the one that comes first in the table.
            path, blocks = min(known, key=lambda named: (named[0].count("."), BLOCKS.index(named[0].rpartition(".")[2])))
            return ".".join(filter(None, (paths[root], path))), len(blocks)
    raise ValueError(
        f"No list of blocks ({', '.join(BLOCKS)}) was found in {type(base).__name__}: name the blocks, such as "
        "target_modules=r'.*\\.layers\\.\\d+'."
    )


def holder_of(base: nn.Module, path: str) -> nn.Module:
    """The module whose call is one walk through the blocks: the innermost around them that reads tokens, or the base."""
    while path:
        path = path.rpartition(".")[0]
        module = base.get_submodule(path)
        if hasattr(module, "config") and reads_embeddings(module):
            return module
    return base


def reads_embeddings(module: nn.Module) -> bool:
    return "inputs_embeds" in signature(module.forward).parameters


def width_of(config: Any, module: nn.Module) -> int:
    """The width of what goes from block to block.

    Raises:
        ValueError: the configuration does not tell.
    """
    for text in (config, getattr(config, "text_config", None)):
        for name in WIDTH:
            if isinstance(getattr(text, name, None), int):
                return getattr(text, name)
    try:
        return int(config.num_attention_heads) * int(config.attention_head_dim)
    except AttributeError:
        raise ValueError(f"The configuration of {type(module).__name__} tells no width ({', '.join(WIDTH)}).") from None


def embeddings(model: Any) -> list[nn.Module]:
    """Those of tokens, in and out."""
    found = (getattr(model, name, lambda: None)() for name in ("get_input_embeddings", "get_output_embeddings"))
    return [module for module in found if isinstance(module, nn.Module)]


def set_embeddings(model: Any, module: nn.Module) -> None:
    """Put another module where a model has its embeddings of tokens."""
    own = model.get_input_embeddings()
    path = next(p for p, m in model.named_modules() if m is own)
    model.set_submodule(path, module)


def of_block(y: Any, x: Tensor) -> Tensor:
    """The hidden states in what a block returned: tensors, of which the one like its input is meant."""
    if isinstance(y, Tensor):
        return y
    if not isinstance(y, tuple):
        y = tuple(getattr(y, name) for name in ("hidden_states", "last_hidden_state") if getattr(y, name, None) is not None)
    return next((t for t in y if isinstance(t, Tensor) and t.shape == x.shape), y[0])


# ---- one walk through the blocks -------------------------------------------------------------------------------------------
@dataclass
class Seen:
    """What the model's call knew, for the loss: it stands in for a tensor with the batch in front.

    Attributes:
        start: the shadow's first state, once there is one.
    """

    labels: Tensor | None
    mask: Tensor | None
    start: Tensor | None = None

    def __getitem__(self, rows: list[int]) -> Seen:
        return self


@dataclass
class Walked:
    """The states of the shadow before each block, of all rows of a batch.

    Blocks that are computed again in the backward pass find the state that they found before.

    Attributes:
        states: by the name of the block.
        rows: which rows of the batch the blocks are on; all where None.
        count: of the rows for which adapters were named; a row may have several entries.
        call: what the first block was called with, by name.
    """

    states: dict[str, Tensor] = field(default_factory=dict)
    rows: tuple[int, ...] | None = None
    count: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    def __getitem__(self, rows: list[int]) -> Walked:
        own = range(self.count) if self.rows is None else self.rows
        return Walked(self.states, tuple(own[i] for i in rows), self.count, self.call)

    def state(self, p: Adapter, x: Tensor) -> Tensor:
        """The state before a block on ``x``."""
        found = self.states.get(p.path)
        if found is None:
            return p.shared.first_state_of(x, self.call if self.rows is None else tree_map(lambda v: self._of_rows(v, x), self.call))
        return (found if self.rows is None else found[self._mine(x)]).to(x.device)

    def go_on(self, p: Adapter, state: Tensor) -> None:
        """Keep the state behind a block for the next one."""
        following = p.shared.after[p.path]
        if self.rows is not None:
            whole = self.states.get(following, self.states.get(p.path))
            if whole is None:
                whole = state.new_zeros(self.count * (len(state) // len(self.rows)), *state.shape[1:])
            mine = self._mine(state)
            index = torch.arange(len(whole), device=state.device)[mine]
            state = whole.to(state).index_copy(0, index, state)
        self.states[following] = state

    def _of_rows(self, value: Any, x: Tensor) -> Any:
        """Of what has the batch in front, that of the rows in ``x``."""
        assert self.rows is not None
        whole = self.count * (len(x) // len(self.rows))
        return value[self._mine(x)] if isinstance(value, Tensor) and value.ndim and len(value) == whole else value

    def _mine(self, x: Tensor) -> Any:
        assert self.rows is not None
        return selector(self.rows, len(x) // len(self.rows), x.device)


_entered: ContextVar[tuple[Any, ...]] = ContextVar("inlay_shadow_walks", default=())


@dataclass
class Walk:
    """Hooks of the module that holds the blocks: the shadow looks at the input first.

    Attributes:
        config: of the adapter.
        names: of the module's arguments.
        inside: of those of the first block.
    """

    config: ShadowConfig
    names: list[str]
    inside: list[str]

    def entering(self, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from ..core.inlaid import session_of

        session = session_of(block)
        name = None if session is None else self._name(session)
        walked = None if session is None or name is None else session.call.get(name, {}).get("shadow")
        if isinstance(walked, Walked):
            walked.call = dict(zip(self.inside, args, strict=False)) | kwargs

    def before(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entry = None
        try:
            entry = self._entry(holder, args, kwargs)
        finally:
            # `after` is called whatever happens.
            _entered.set((*_entered.get(), entry))

    def _entry(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What the end of the walk has to know; None where this adapter does not act."""
        from ..core.inlaid import session_of
        from ..core.session import carry_choices

        session = session_of(holder)
        name = None if session is None else self._name(session)
        if session is None or name is None:
            return None
        bank, call = _bank(holder, name), dict(zip(self.names, args, strict=False)) | kwargs
        rows = session.choice().rows
        walked, shadows = Walked(count=0 if rows is None else len(rows)), None
        if call.get("input_ids") is not None or call.get("inputs_embeds") is not None:
            shadows = _cache(call, name, bank, holder)
            walked.states[bank.start] = bank.first_state(call, shadows)
        given = session.call.get(name, {})
        if isinstance(given.get("shadow"), Seen):
            given["shadow"].start = walked.states.get(bank.start)  # type: ignore[attr-defined]
        if torch.is_grad_enabled() and getattr(holder, "is_gradient_checkpointing", False):
            carry_choices(holder, session)
        context = session.calling({**session.call, name: {**given, "shadow": walked}})  # type: ignore[dict-item]
        context.__enter__()
        return context, name, shadows, call.get("past_key_values")

    def after(self, holder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        *rest, entered = _entered.get()
        _entered.set(tuple(rest))
        if entered is None:
            return
        context, name, shadows, cache = entered
        context.__exit__(None, None, None)
        cache = getattr(output, "past_key_values", None) if cache is None else cache
        if shadows is not None and cache is not None and name not in vars(cache).setdefault("_inlay_shadows", {}):
            vars(cache)["_inlay_shadows"][name] = len(cache.layers), len(cache.layers) + len(shadows.layers)
            cache.layers.extend(shadows.layers)

    def _name(self, session: Session) -> str | None:
        """The adapter's, if it acts here and now."""
        return next((n for n in session.choice().all if session.configs[n] is self.config), None)


def _bank(holder: nn.Module, name: str) -> Shadow:
    from ..core.adapter import Adapter
    from ..core.inlaid import places

    return next(p for place in places(holder) if isinstance(p := place.adapters.get(name), Adapter) and p.shared is not None).shared


def _cache(call: Mapping[str, Any], name: str, bank: Shadow, holder: nn.Module) -> Any:
    """The shadow's part of a cache, which lies behind the base's own layers; None where nothing is kept.

    Raises:
        ValueError: the cache has tokens that the shadow has not seen.
    """
    cache, wanted = call.get("past_key_values"), call.get("use_cache")
    if wanted is None:
        wanted = getattr(holder.config, "use_cache", False) and not holder.training
    if cache is None and not wanted:
        return None
    from transformers.cache_utils import Cache, DynamicCache, StaticCache

    if cache is None:
        return DynamicCache(config=bank.shadow_backbone.config)  # type: ignore[arg-type]
    found = vars(cache).get("_inlay_shadows", {}).get(name)
    if found is not None:
        return Cache(layers=cache.layers[slice(*found)])
    if cache.get_seq_length():
        raise ValueError(f"The cache holds tokens that the shadow of {name!r} has not seen; fill it with this adapter active.")
    lengths = [layer.max_cache_len for layer in cache.layers if hasattr(layer, "max_cache_len")]
    if lengths:
        return StaticCache(config=bank.shadow_backbone.config, max_cache_len=max(lengths))  # type: ignore[arg-type]
    return DynamicCache(config=bank.shadow_backbone.config)  # type: ignore[arg-type]


class Undo:
    """Takes the hooks out again."""

    def __init__(self, config: ShadowConfig) -> None:
        self.config, self.hooks = config, []

    def __call__(self) -> None:
        self.config.__dict__.pop("_around", None)
        for hook in self.hooks:
            hook.remove()
