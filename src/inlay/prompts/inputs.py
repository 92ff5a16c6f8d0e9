"""Virtual tokens before the input of a model: what becomes of each of its arguments. Pure functions; nothing is patched.

Forward passes are those of HF peft, number by number: positions run through the virtual tokens and the input alike, padding
included; positions of the caller are left out, with a warning; outputs cover the virtual tokens.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

# Tasks whose models are given the type of each token; for the others it is left out, as HF peft does.
TYPED = ("SEQ_CLS", "TOKEN_CLS")
IGNORED_LABEL = -100
# Ways to generate that read the prompt as tokens, of which virtual ones have none.
TOKENS_ONLY = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size")


def rows_of(inputs: Mapping[str, Any]) -> int:
    """The size of the batch.

    Raises:
        ValueError: no argument tells it.
    """
    for name in ("input_ids", "inputs_embeds", "attention_mask"):
        if isinstance(inputs.get(name), Tensor):
            return inputs[name].shape[0]
    raise ValueError("The batch has no `input_ids` and no `inputs_embeds`; virtual tokens go before one of them.")


def before_forward(inputs: dict[str, Any], vectors: Tensor, words: nn.Module, task: str | None) -> dict[str, Any]:
    """The arguments of a forward pass with virtual tokens before the input.

    A cache that holds tokens is taken to begin with the virtual ones, and so are the outputs of an encoder: then only the
    mask, which is of the input's own tokens, is made to cover them.

    Args:
        inputs: the arguments by name.
        vectors: ``(batch, tokens, dim)``.
        words: embeds input tokens.
        task: a `TaskType`, or None; then labels tell by their shape whether they are of tokens.
    """
    inputs = dict(inputs)
    n = vectors.shape[1]
    begun = _holds_tokens(inputs.get("past_key_values")) or inputs.get("encoder_outputs") is not None
    drop(inputs, "position_ids")
    if inputs.get("attention_mask") is not None:
        inputs["attention_mask"] = mask_before(inputs["attention_mask"], n, begun=begun, causal=task in ("CAUSAL_LM", None))
    if task in TYPED:
        if inputs.get("token_type_ids") is not None and not begun:
            inputs["token_type_ids"] = before(inputs["token_type_ids"], n, 0)
    else:
        drop(inputs, "token_type_ids")
    if begun:
        return inputs
    embeds = embedded(inputs, words)
    if inputs.get("labels") is not None and _labels_tokens(inputs["labels"], embeds, task):
        inputs["labels"] = before(inputs["labels"], n, IGNORED_LABEL)
    return inputs | {"inputs_embeds": joined(vectors, embeds)}


def before_generate(inputs: dict[str, Any], vectors: Tensor, base: nn.Module) -> dict[str, Any]:
    """The arguments of the base's ``generate`` with virtual tokens before the input.

    The base is given tokens and embeddings: it reads the prompt from the embeddings and goes on with the tokens, so caches of
    every kind, beams and samples are its own affair. Positions follow the mask, as in a generation without a prompt: a row of
    a left-padded batch generates what it generates alone.

    Args:
        inputs: the arguments by name.
        vectors: ``(batch, tokens, dim)``.
        base: the model.

    Raises:
        ValueError: the generation is to be of a kind that reads the prompt as tokens.
    """
    inputs = dict(inputs)
    n = vectors.shape[1]
    if inputs.pop("encoder_outputs", None) is not None:
        warnings.warn("`encoder_outputs` were made without the virtual tokens; they are ignored.")
    refuse_settings(TOKENS_ONLY, inputs, base, "reads the prompt as tokens, and virtual tokens are embeddings: they would be lost")
    drop(inputs, "token_type_ids")
    ids = inputs.get("input_ids")
    words: nn.Module = base.get_input_embeddings()  # type: ignore[operator]
    embeds = embedded(inputs, words)
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = _mask_of(ids, inputs, base) if ids is not None else torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
    elif mask.ndim != 2:
        raise ValueError(f"attention_mask has {mask.ndim} axes; a generation takes (batch, length).")
    inputs |= {"inputs_embeds": joined(vectors, embeds), "attention_mask": before(mask, n, 1)}
    if getattr(base.config, "is_encoder_decoder", False):
        return inputs
    if inputs.get("position_ids") is not None:
        positions = inputs["position_ids"] + n
        inputs["position_ids"] = torch.cat((torch.arange(n, device=positions.device).expand(len(positions), n), positions), 1)
    if ids is not None:
        inputs["input_ids"] = ids
        _count_in_tokens(inputs, ids.shape[1], base)
    return inputs


def embedded(inputs: dict[str, Any], words: nn.Module) -> Tensor:
    """Take the input out of the arguments, as embeddings ``(batch, length, dim)``."""
    ids, embeds = inputs.pop("input_ids", None), inputs.pop("inputs_embeds", None)
    if embeds is not None:
        return embeds
    if ids is None:
        raise ValueError("The batch has no `input_ids` and no `inputs_embeds`; virtual tokens go before one of them.")
    return words(ids)


def joined(vectors: Tensor, embeds: Tensor) -> Tensor:
    """``(batch, tokens + length, dim)``, in the embeddings' dtype."""
    return torch.cat((vectors.to(embeds.device, embeds.dtype), embeds), 1)


def before(tensor: Tensor, n: int, value: int) -> Tensor:
    """``(batch, n + length)``: a value for each virtual token, then the tensor."""
    return torch.cat((tensor.new_full((len(tensor), n), value), tensor), 1)


def mask_before(mask: Tensor, n: int, begun: bool, causal: bool) -> Tensor:
    """A mask that shows the virtual tokens to all others.

    Args:
        mask: ``(batch, length)`` of ones and zeros, or ``(batch, heads, queries, keys)``: booleans, or what is added to scores.
        n: the number of virtual tokens.
        begun: the virtual tokens are behind, in a cache, and query nothing any more. This and the next matter to four axes.
        causal: virtual tokens see those before them only; else also each other and whatever any token sees.
    """
    if mask.ndim == 2:
        return before(mask, n, 1)
    if mask.ndim != 4:
        raise ValueError(f"attention_mask has {mask.ndim} axes; give (batch, length) or (batch, heads, queries, keys).")
    if not mask.is_floating_point():
        mask = mask.bool()
    shown, hidden = (True, False) if mask.dtype == torch.bool else (0, torch.finfo(mask.dtype).min)
    batch, heads, queries, keys = mask.shape
    old = torch.cat((mask.new_full((batch, heads, queries, n), shown), mask), 3)
    if begun:
        return old
    own = mask.new_full((n, n), shown)
    if causal:
        own = own.masked_fill(torch.ones(n, n, dtype=torch.bool, device=mask.device).triu(1), hidden)
        new = torch.cat((own.expand(batch, heads, n, n), mask.new_full((batch, heads, n, keys), hidden)), 3)
    else:
        new = torch.cat((own.expand(batch, heads, n, n), mask.amax(2, keepdim=True).expand(batch, heads, n, keys)), 3)
    return torch.cat((new, old), 2)


def _holds_tokens(cache: Any) -> bool:
    return cache is not None and (not hasattr(cache, "get_seq_length") or int(cache.get_seq_length()) > 0)


def _labels_tokens(labels: Tensor, embeds: Tensor, task: str | None) -> bool:
    """Whether there is a label for each token of a sequence that the virtual tokens become part of."""
    if task is None:
        return labels.shape[:2] == embeds.shape[:2] and not labels.is_floating_point()
    return task in ("CAUSAL_LM", "TOKEN_CLS")


def drop(inputs: dict[str, Any], name: str) -> None:
    if inputs.pop(name, None) is not None:
        warnings.warn(f"`{name}` cannot be combined with virtual tokens here; it is ignored.")


def refuse_settings(names: Sequence[str], inputs: Mapping[str, Any], base: nn.Module, why: str) -> None:
    """
    Raises:
        ValueError: one of these settings of a generation is made.
    """
    for name in names:
        if setting(name, inputs, inputs.get("generation_config"), base) is not None:
            raise ValueError(f"`{name}` {why}. Leave it out.")


def setting(name: str, inputs: Mapping[str, Any], given: Any, base: nn.Module) -> Any:
    """A setting of a generation: of the call, of the configuration that was passed, of the base, in this order."""
    for value in (inputs.get(name), getattr(given, name, None), getattr(getattr(base, "generation_config", None), name, None)):
        if value is not None:
            return value
    return None


def _mask_of(ids: Tensor, inputs: Mapping[str, Any], base: nn.Module) -> Tensor:
    """The mask that ``generate`` makes of tokens where it gets none: padding is hidden, unless its token also ends a text."""
    given = inputs.get("generation_config")
    pad, eos = (setting(name, inputs, given, base) for name in ("pad_token_id", "eos_token_id"))
    ends = eos if isinstance(eos, (list, tuple)) else [eos]
    return torch.ones_like(ids) if pad is None or pad in ends else ids.ne(pad).long()


def _count_in_tokens(inputs: dict[str, Any], length: int, base: nn.Module) -> None:
    """Bounds on the whole length as bounds on what is new: next to embeddings the base counts lengths in another way."""
    given = inputs.get("generation_config")
    if given is not None:
        inputs["generation_config"] = given = copy.copy(given)
    for bound in ("max", "min"):
        whole, new = f"{bound}_length", f"{bound}_new_tokens"
        value = setting(whole, inputs, given, base)
        count = setting(new, inputs, given, base)
        inputs.pop(whole, None)
        if given is not None:
            setattr(given, whole, None)
        if value and count is None:
            count = max(value - length, 0)
            if given is None:
                inputs[new] = count
            else:
                setattr(given, new, count)
