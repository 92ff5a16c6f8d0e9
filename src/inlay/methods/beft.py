"""BEFT: a trained bias on top of the value projections, ``b + v`` (2025, arXiv 2509.15974)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, normal, zeros
from ..core.site import AnyConv, Embedding, Site

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

_DEFAULTS = {
    "v": "t5 mt5", "value": "bert roberta", "value_proj": "deberta-v2", "v_lin": "distilbert",
    "v_proj": "opt gptj gpt_neo bart llama llama4 mistral mixtral phi gemma gemma2 gemma3_text qwen2 qwen3",
}  # fmt: skip


@register
@dataclass
class BeftConfig(Method):
    """A vector that is added to what a layer gives out, whether or not the layer has a bias.

    Args:
        init_weights: start from zero; False starts from random values, for tests.
    """

    peft_type: str | None = PeftType.BEFT
    init_weights: bool = field(default=True, metadata={"help": "Start from zero."})

    prefix: ClassVar[str] = "beft_"
    paper: ClassVar[str] = "2509.15974"
    equation: ClassVar[str] = "b + v"
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {}, "random": {"init_weights": False}}
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_to_transform", "layers_pattern"}

    def default_targets(self) -> dict[str, list[str] | str]:
        return {base: [name] for name, bases in _DEFAULTS.items() for base in bases.split()}

    @property
    def never_identity(self) -> str:
        return "" if self.init_weights else "it starts from random values (init_weights=False)"

    def refuses(self, site: Site) -> str | None:
        return "it reads no bias that could be changed" if site.reads and site.bias() is None else None

    def params(self, site: Site) -> dict[str, Param]:
        in_file = None if site.batch else (1, -1)
        return {"beft_bias": Param(("channel",), zeros if self.init_weights else normal(), file_shape=in_file)}

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        v = p.beft_bias.to(w.dtype)
        if isinstance(p.site, Embedding):
            # Each token looks up exactly one column, so a bias is that vector on all of them.
            return w + v.unsqueeze(-1), b
        v = v.flatten() if isinstance(p.site, AnyConv) else v
        return w, v if b is None else b + v

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is not None and inner.dense[0].dtype == p.beft_bias.dtype and not torch.is_autocast_enabled(x.device.type):
            w, b = inner.dense
            return F.linear(x, w, p.beft_bias if b is None else b + p.beft_bias)
        y, v = inner(x), p.beft_bias
        v = inner.site.scaled(v) if isinstance(inner.site, Embedding) else inner.site.rows(v)
        return (y + v).to(y.dtype)
