"""Virtual tokens that are keys and values: they are in the cache of every layer before the input comes.

The vectors of a token hold its keys and values at all layers: ``(batch, tokens, layers * 2 * heads * head_dim)``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

from torch import Tensor, nn

from .generation import for_rows, generating, tokens_in, twin
from .inputs import TYPED, drop, mask_before, refuse_settings, rows_of
from .method import PromptMethod, words_of

# Generations that ask for positions of their own in what is a cache's first part here.
REFUSED = ("prefill_chunk_size",)


@dataclass
class CachedMethod(PromptMethod):
    """What prefixes in the cache have in common."""

    # -- sizes --
    def check(self, base: nn.Module) -> None:
        name = type(base).__name__
        config = getattr(base, "config", None)
        if config is None:
            raise ValueError(f"{name} has no configuration that tells the shape of its keys and values.")
        if getattr(sizes_of(base), "kv_lora_rank", None) is not None:
            raise ValueError(f"{name} compresses its keys and values; a prefix of {self.peft_type} has them whole. Use PROMPT_TUNING.")
        holder_of_cache(base)

    def prepare(self, base: nn.Module) -> None:
        self.check(base)
        heads, dim = key_shape(base)
        if self.token_dim is None or not layer_shapes(base):
            self.token_dim, self.num_attention_heads = heads * dim, heads
        super().prepare(base)

    def width(self, base: nn.Module) -> int:
        # A layer takes its part of what is there, so that the widths need not be equal.
        return self.token_dim or 0

    # -- what it does --
    def forward(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor, options: Mapping[str, Any]) -> Any:
        inputs = dict(inputs)
        n, decoder = vectors.shape[1], bool(getattr(base.config, "is_encoder_decoder", False))
        if base.training and any(m.training and getattr(m, "gradient_checkpointing", False) for m in base.modules()):
            raise ValueError(
                f"{self.peft_type} has its tokens in the cache, which gradient checkpointing throws away in training: call "
                "`model.gradient_checkpointing_disable()` (a prefix needs few activations beside the base's), or use PROMPT_TUNING or "
                "P_TUNING, which go with checkpointing."
            )
        rows_of(inputs)
        if inputs.get("position_ids") is not None:
            inputs["position_ids"] = inputs["position_ids"] + n
        if self.task_type not in TYPED:
            drop(inputs, "token_type_ids")
        mask = "decoder_attention_mask" if decoder else "attention_mask"
        if inputs.get(mask) is not None:
            inputs[mask] = mask_before(inputs[mask], n, begun=True, causal=True)
        cache = inputs.pop("past_key_values", None)
        if not tokens_in(cache):
            cache = self.filled(cache, base, vectors)
        return holder_of_cache(base)(cache)(**inputs)

    def generate(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor) -> Any:
        refuse_settings(REFUSED, inputs, base, "is not possible with a cache that begins with virtual tokens")
        n, decoder = vectors.shape[1], bool(getattr(base.config, "is_encoder_decoder", False))
        mask, positions = ("decoder_attention_mask", "decoder_position_ids") if decoder else ("attention_mask", "position_ids")

        def prepare(own: Callable[..., dict[str, Any]], input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
            # Without a cache, models hand on the one that they were given all the same.
            cache = kwargs.get("past_key_values") if kwargs.get("use_cache", True) else None
            if not tokens_in(cache):
                kwargs["past_key_values"] = self.filled(cache, base, for_rows(vectors, len(input_ids)))
            elif kwargs.get("is_first_iteration") and kwargs.get("next_sequence_length") is not None:
                # Counted against a cache that holds more than the tokens which the caller shows.
                kwargs["next_sequence_length"] += n
            if kwargs.get(mask) is not None:
                kwargs[mask] = mask_before(kwargs[mask], n, begun=True, causal=True)
            if kwargs.get(positions) is not None:
                kwargs[positions] = kwargs[positions] + n
            return own(input_ids, **kwargs)

        model: Any = generating(base, n, prepare)
        return model.generate(**inputs)

    def filled(self, cache: Any, base: nn.Module, vectors: Tensor) -> Any:
        """A cache that begins with the virtual tokens: the caller's empty one, or a new one.

        Raises:
            ValueError: no layer of the base has keys and values that fit.
        """
        from transformers.cache_utils import CacheLayerMixin, DynamicCache, EncoderDecoderCache

        config: Any = base.config
        if cache is None:
            text = config.get_text_config(decoder=True)
            cache = DynamicCache(config=text)
            if getattr(config, "is_encoder_decoder", False):
                cache = EncoderDecoderCache(cache, DynamicCache(config=text))
        own: Any = getattr(cache, "self_attention_cache", cache)
        layers = getattr(own, "layers", [])
        vectors = vectors.to(next(words_of(base).parameters()).dtype)
        shapes = layer_shapes(base)
        devices = _devices(base)
        passed = []
        for i, (keys, values) in enumerate(self.layers_of(vectors, len(layers) or self.num_layers or 0)):
            if i < len(layers) and not isinstance(layers[i], CacheLayerMixin):
                continue  # it has no keys: a state-space layer, or one that looks at another layer's
            if i < len(shapes):
                heads, dim = shapes[i]
                if heads > keys.shape[1] or dim > keys.shape[3]:
                    passed.append(i)
                    continue
                keys, values = keys[:, :heads, :, :dim], values[:, :heads, :, :dim]
            device = devices.get(i, keys.device)
            own.update(keys.to(device), values.to(device), i)
        if not tokens_in(cache):
            raise ValueError(
                f"No layer of {type(base).__name__} has keys of {self.num_attention_heads} heads of "
                f"{(self.token_dim or 0) // (self.num_attention_heads or 1)}; leave out `token_dim` and `num_attention_heads`."
            )
        if passed:
            warnings.warn(f"The keys of layers {passed} are wider than the prefix, which leaves these layers out.")
        return cache

    def layers_of(self, vectors: Tensor, count: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, ``(batch, heads, tokens, head_dim)``.

        Files with two submodules (encoder-decoder models) have their layers in HF's order: decoder layer ``i`` reads the block
        ``2 i``, counted round, and the others are never read.
        """
        size = (self.num_layers or 0) * 2
        # In one go: the gradient of each taken out by itself would be as large as all of them.
        blocks = vectors.unflatten(-1, (size, self.num_attention_heads or 1, -1)).permute(2, 0, 3, 1, 4).unbind()
        step = 2 * (self.num_transformer_submodules or 1)
        for i in range(count):
            at = step * i % size
            yield blocks[at], blocks[at + 1]


# ---- the base ------------------------------------------------------------------------------------------------------------
def sizes_of(base: nn.Module) -> Any:
    """The configuration of the part of a model that reads text."""
    config: Any = base.config
    return config.text_config if hasattr(config, "text_config") else config


def key_shape(base: nn.Module) -> tuple[int, int]:
    """Heads and width of the keys in the cache; of the widest layer where layers differ."""
    shapes = layer_shapes(base)
    if shapes:
        return max(shapes, key=lambda s: s[1])
    return _shape_in(sizes_of(base))


def layer_shapes(base: nn.Module) -> list[tuple[int, int]]:
    """`key_shape` by layer, for models whose layers differ; empty for others."""
    sizes = sizes_of(base)
    if not getattr(sizes, "is_heterogeneous", False):
        return []
    return [_shape_in(layer) for layer in sizes.per_layer_config]


def _shape_in(sizes: Any) -> tuple[int, int]:
    heads = getattr(sizes, "decoder_attention_heads", None) or sizes.num_attention_heads
    dim = getattr(sizes, "head_dim", None) or getattr(sizes, "d_kv", None) or sizes.hidden_size // heads
    if getattr(sizes, "multi_query", False) and not getattr(sizes, "new_decoder_architecture", False):
        return 1, dim
    return getattr(sizes, "num_key_value_heads", None) or getattr(sizes, "num_kv_heads", None) or heads, dim


def holder_of_cache(base: nn.Module) -> Callable[[Any], Callable[..., Any]]:
    """A function from a cache to the model's forward with it. Classifiers of encoders hand theirs to the encoder inside.

    Raises:
        ValueError: neither the model nor the model in it takes a cache.
    """
    if "past_key_values" in signature(base.forward).parameters:
        return lambda cache: partial(base, past_key_values=cache)
    name = getattr(base, "base_model_prefix", "")
    inside = base._modules.get(name)
    if inside is None or "past_key_values" not in signature(inside.forward).parameters:
        raise ValueError(
            f"{type(base).__name__}.forward takes no `past_key_values`, so keys and values cannot be put before its input; "
            "use PROMPT_TUNING or P_TUNING."
        )

    def holding(cache: Any) -> Callable[..., Any]:
        other = twin(base, _modules={**base._modules, name: twin(inside, forward=partial(inside.forward, past_key_values=cache))})
        # What accelerate puts around a forward runs the base itself; its hooks inside go on to run.
        vars(other).pop("forward", None)
        return other

    return holding


def _devices(base: nn.Module) -> dict[int, Any]:
    """The device of each layer, of a model that was spread over several."""
    found = {}
    for name, device in (getattr(base, "hf_device_map", None) or {}).items():
        last = name.rpartition(".")[2]
        if last.isdigit() and device != "disk":
            found[int(last)] = device if device != "cpu" else "cpu"
    return found
