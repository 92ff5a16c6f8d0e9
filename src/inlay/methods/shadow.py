"""ShadowPEFT: a small network walks beside the model, block by block, and corrects what goes into each.

    x  <-  x + alpha W_up W_down (x - s)        into a block, s being the shadow's state
    s  <-  (1 - g) s + g T(y),  g = sigmoid(G(y))        behind it, y being what came out

The state starts as what the shadow, a model of its own, makes of the same input. It goes on beside the blocks, so that they
hand tensors to each other as ever, and the shadow's keys and values lie behind the base's own layers in the cache of a
generation, where whatever happens to the cache happens to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import add
from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, kaiming_uniform, zeros
from ..core.site import Site, Whole
from ..shadow.base import blocks_of, holder_of, width_of
from ..shadow.network import Shadow
from ..shadow.walk import Seen, Undo, Walk, Walked, of_block

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

# The sizes of a mirror.
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
    shadow_dropout: float = field(default=0.2, metadata={"help": "Share of the difference that training leaves out.", "share": True})
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
    paper: ClassVar[str] = "2604.19254"
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
        return add(x, change, self.shadow_alpha * p.strength)

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
        from ..shadow.alone import alone

        return alone(adapters[0].shared, copy)
