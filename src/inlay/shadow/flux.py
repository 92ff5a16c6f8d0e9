"""The shadow (`methods.shadow`) of a Flux2 transformer: a smaller one, cut out of the base, whose blocks of the joint stream walk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..core.place import host_class
from ..core.plan import pristine_copy

if TYPE_CHECKING:
    from ..methods.shadow import ShadowConfig

STEMS = ("x_embedder", "context_embedder", "time_guidance_embed", "pos_embed")
STREAMS = ("transformer_blocks", "single_transformer_blocks")
# What a trained shadow has in common with its base, and where it is no larger.
EQUAL = (
    "in_channels",
    "out_channels",
    "joint_attention_dim",
    "timestep_guidance_channels",
    "attention_head_dim",
    "axes_dims_rope",
    "guidance_embeds",
)
BOUNDED = ("num_attention_heads", "num_layers", "num_single_layers")
CACHED = ("kv_cache", "kv_cache_mode", "num_ref_tokens", "num_txt_tokens")


def is_flux(holder: nn.Module, first: str) -> bool:
    """Whether the walk begins in the joint stream of text and image, which is what the shadow has blocks for."""
    return host_class(holder).__name__ == "Flux2Transformer2DModel" and "single_transformer_blocks" in first.split(".")


class FluxShadow(nn.Module):
    """Flux2 from the inside: it takes what goes into a block of the joint stream, at its own width."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = model.config

    def forward(self, x: Tensor, call: Mapping[str, Any]) -> Tensor:
        """The state ``(batch, tokens, own width)``.

        Args:
            x: ``(batch, tokens, width)``.
            call: what the base's block was called with beside it.
        """
        own = _width(self.config)
        modulation = torch.cat([part[..., :own] for part in call["temb_mod"].chunk(3, -1)], -1).to(x.dtype)
        # The base's cache has its own keys and values alone.
        kwargs = {k: v for k, v in (call.get("joint_attention_kwargs") or {}).items() if k not in CACHED}
        x = x[..., :own]
        for block in self.model.single_transformer_blocks:
            x = block(x, None, modulation, call.get("image_rotary_emb"), kwargs)
        return x


def _width(config: Any) -> int:
    return int(config.num_attention_heads) * int(config.attention_head_dim)


def mirror(config: ShadowConfig, base: Any) -> FluxShadow:
    """A Flux2 of fewer, smaller blocks that starts as the leading rows, columns and heads of the base's.

    Raises:
        ValueError: it would be larger than the base, or its heads of another size.
    """
    was, depth = base.config, config.shadow_num_hidden_layers or 1
    head, width = int(was.attention_head_dim), _width(was)
    inner = int(width * float(was.mlp_ratio))
    own = config.shadow_hidden_size or (config.shadow_num_attention_heads or int(was.num_attention_heads)) * head
    heads = config.shadow_num_attention_heads or own // head
    own_inner = config.shadow_intermediate_size or inner
    if own != heads * head:
        raise ValueError(f"shadow_hidden_size={own} is not {heads} heads of {head}, which is the base's size of a head.")
    counts = {"transformer_blocks": depth, "single_transformer_blocks": 2 * depth}
    sizes = [("shadow_num_attention_heads", heads, int(was.num_attention_heads)), ("shadow_intermediate_size", own_inner, inner)]
    sizes += [("shadow_num_hidden_layers", depth, len(base.transformer_blocks))]
    sizes += [("shadow_num_hidden_layers (two blocks of the joint stream each)", 2 * depth, len(base.single_transformer_blocks))]
    for name, value, most in sizes:
        if value > most:
            raise ValueError(f"{name} comes to {value}, and this shadow is cut out of a base that has {most}.")
    smaller = {"num_layers": depth, "num_single_layers": 2 * depth, "num_attention_heads": heads, "mlp_ratio": own_inner / own}
    model: Any = host_class(base).from_config(dict(was) | smaller)  # type: ignore[attr-defined]
    shares = config.share_embeddings and own == width
    for name, part in model.named_children():
        if name in STREAMS:
            blocks = getattr(base, name)
            for block, index in zip(part, spread(len(blocks), counts[name]), strict=True):
                cut_out(block, pristine_copy(blocks[index]), name == STREAMS[1], (width, own), (inner, own_inner))
        elif name in STEMS and shares:
            # It walks from the first block on and never calls them.
            setattr(model, name, nn.Identity())
        else:
            cut_out(part, pristine_copy(getattr(base, name)), False, (width, own), (inner, own_inner))
    return FluxShadow(model)


def spread(total: int, count: int) -> list[int]:
    """As many indices, evenly from the first to the last; the last where one is wanted."""
    return [total - 1] if count == 1 else [round(i * (total - 1) / (count - 1)) for i in range(count)]


@torch.no_grad()
def cut_out(part: nn.Module, source: nn.Module, joint: bool, width: tuple[int, int], inner: tuple[int, int]) -> None:
    """Fill a module from the leading entries of a larger one. Where several matrices lie in one, from those of each."""
    given = source.state_dict()
    for key, target in part.state_dict().items():
        t, axis, pieces = given[key], 0, [(given[key].shape[0], target.shape[0])]
        if "to_qkv_mlp_proj" in key:
            pieces = [width] * 3 + [inner] * 2
        elif joint and "attn.to_out" in key:
            axis, pieces = 1, [width, inner]
        elif "linear_in" in key:
            pieces = [inner] * 2
        elif key == "linear.weight" and t.shape[0] % width[0] == 0:
            pieces = [width] * (t.shape[0] // width[0])
        parts = [p.narrow(axis, 0, n) for p, (_, n) in zip(t.split([m for m, _ in pieces], axis), pieces, strict=True)]
        whole = torch.cat(parts, axis)
        target.copy_(whole[tuple(slice(n) for n in target.shape)])


def frozen_stems(shadow: FluxShadow) -> FluxShadow:
    """The stems as buffers: in the file, and not trained."""
    for name in STEMS:
        for module in getattr(shadow.model, name).modules():
            for key in list(module._parameters):
                weight = module._parameters.pop(key)
                if weight is not None:
                    module.register_buffer(key, weight.detach())
    return shadow


def trained(source: str, base: Any) -> FluxShadow:
    """A trained Flux2 that is no larger than the base.

    Raises:
        ValueError: it does not fit.
    """
    model: Any = host_class(base).from_pretrained(source, torch_dtype=torch.float32, use_safetensors=True)  # type: ignore[attr-defined]
    mine, its = model.config, base.config
    plain = [(n, *(list(v) if isinstance(v := getattr(c, n), Sequence) else v for c in (mine, its))) for n in EQUAL]
    wrong = [(n, a, b) for n, a, b in plain if a != b]
    wrong += [(n, getattr(mine, n), getattr(its, n)) for n in BOUNDED if getattr(mine, n) > getattr(its, n)]
    if wrong:
        name, has, wanted = wrong[0]
        raise ValueError(f"shadow_model={source!r} has {name}={has!r} and the base {wanted!r}: a shadow has the base's, or fewer.")
    return frozen_stems(FluxShadow(model))


def start_of(projection: nn.Linear) -> nn.Linear:
    """A projection that hands the narrow state on as it is."""
    nn.init.eye_(projection.weight)
    return projection
