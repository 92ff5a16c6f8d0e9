"""The small network, which all blocks share: what it makes of the input, and what it predicts by itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.config import TaskType
from ..core.method import full
from ..core.param import generator_for
from . import flux
from .base import WIDTH, embeddings, reads_embeddings, set_embeddings, width_of

if TYPE_CHECKING:
    from ..methods.shadow import ShadowConfig

# What models call their other sizes.
DEPTH = ("num_hidden_layers", "n_layer", "num_layers")
HEADS = ("num_attention_heads", "n_head", "num_heads")
INNER = ("intermediate_size", "ffn_dim", "n_inner")


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
