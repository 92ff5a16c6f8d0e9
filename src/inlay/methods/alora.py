"""Activated LoRA: acts only from the tokens on that invoke it (Greenewald et al. 2025, arXiv 2504.12397), a variant of LoRA.

What comes before is the base's own, so that its cached keys and values serve the adapter as well.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..core.additive import add, meet
from ..core.site import Embedding, Site
from ..kernels.activated import linear_plus_tokens
from ..kernels.lowrank import takes_the_formula
from .lora import LoraConfig, is_linear

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

NEVER = 2**30


class ALora(LoraConfig):
    """LoRA with ``alora_invocation_tokens``."""

    unmergeable: ClassVar[str] = "An activated LoRA acts on some tokens only, and a weight acts on all."
    takes: ClassVar[tuple[str, ...]] = ("alora_offsets",)

    def refuses(self, site: Site) -> str | None:
        if not is_linear(site) and not isinstance(site, Embedding):
            return "its inputs are no tokens, and aLoRA acts from a token on"
        return super().refuses(site)

    def given(self, model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """``alora``: for each row where it starts to act and how long the row is, ``(rows, 2)``."""
        ids = next((t for t in (kwargs.get("input_ids"), kwargs.get("inputs"), *args[:1]) if isinstance(t, Tensor)), None)
        embedded = kwargs.get("inputs_embeds")
        offsets = kwargs.get("alora_offsets")
        if offsets is not None:
            shaped = ids if ids is not None else embedded
            device = None if shaped is None else shaped.device
            back = torch.tensor([0 if o is None else int(o) for o in offsets], device=device)
            # Embeddings may stand in the place of token ids.
            length = NEVER // 2 if shaped is None else shaped.shape[-2 if shaped.is_floating_point() else -1]
            start = torch.where(back > 0, length - back, NEVER)
        elif ids is not None and not ids.is_floating_point():
            ids = ids if ids.ndim > 1 else ids.unsqueeze(0)
            length, start = ids.shape[-1], self._starts(ids)
        else:
            warnings.warn("aLoRA looks for its invocation in `input_ids`, and none were given; pass `alora_offsets`. It does nothing.")
            return {}
        return {"alora": torch.stack((start, torch.full_like(start, length)), -1)}

    def _starts(self, ids: Tensor) -> Tensor:
        """Where the last invocation starts in each row ``(rows, tokens)``."""
        wanted = torch.tensor(self.alora_invocation_tokens, device=ids.device)
        if ids.shape[1] < len(wanted):
            return torch.full((len(ids),), NEVER, device=ids.device)
        hits = (ids.unfold(1, len(wanted), 1) == wanted).all(-1)
        last = (hits * torch.arange(1, hits.shape[1] + 1, device=ids.device)).amax(1) - 1
        return torch.where(last >= 0, last, NEVER)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if "alora" not in p.call:
            return inner(x)
        drops = self.dropout > 0 and p.training
        if inner.dense is not None and not drops and not self.lora_bias and not takes_the_formula(x, *inner.dense):
            return linear_plus_tokens(x, *inner.dense, *self.factors(p), self.scaling * p.strength, _tokens(p.call["alora"], x))
        y = inner(x)
        acts = _acting(p.call["alora"].to(y.device), y).unsqueeze(-1)
        x = F.dropout(x, self.dropout, p.training) if x.is_floating_point() else x
        x, a, b = meet(x, *self.factors(p))
        site, extra = inner.site, self.delta_bias(p)
        if extra is not None:
            y = add(y, acts * extra, p.strength)
        return add(y, site.up(site.down(x, a) * acts, b), self.scaling * p.strength)


def _tokens(rows: Tensor, x: Tensor) -> Tensor:
    """The tokens that are acted on, as positions in all tokens of an input ``(*, tokens, in)``. They are found once a call."""
    known: dict[Any, Tensor] = vars(rows).setdefault("tokens", {})
    key = x.shape[:-1], x.device
    if key not in known:
        known[key] = _acting(rows.to(x.device), x).flatten().nonzero().squeeze(1)
    return known[key]


def _acting(rows: Tensor, y: Tensor) -> Tensor:
    """Which tokens of an output ``(*, tokens, out)`` are acted on, ``(*, tokens)``.

    Where a cache holds the beginning of a row, the layer sees its end alone. A row may stand there several times (beams).
    """
    lead = y.shape[:-1]
    tokens = lead[-1] if len(lead) > 1 else lead[0] // len(rows)
    start, length = rows.unbind(-1)
    first = start - (length - tokens).clamp_min(0)
    acts = torch.arange(tokens, device=y.device) >= first.unsqueeze(1)
    return acts.repeat_interleave(lead.numel() // acts.numel(), 0).view(lead)
