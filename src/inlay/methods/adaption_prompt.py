"""LLaMA-Adapter: attention looks at learned tokens as well, through a gate that starts shut (arXiv 2303.16199)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, normal
from ..core.site import Site, Whole
from ..core.targets import architecture

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

SEPARATE, PACKED = ("q_proj", "k_proj", "v_proj", "o_proj"), ("c_attn",)


@register
@dataclass
class AdaptionPromptConfig(Method):
    """Let the attention of the last blocks look at learned tokens.

    Args:
        target_modules: the name of the attention modules.
        adapter_len: how many tokens.
        adapter_layers: in how many blocks, counted from the last.

    Raises:
        ValueError: a number is absent, or several names are given.
    """

    peft_type: str | None = PeftType.ADAPTION_PROMPT
    adapter_len: int | None = field(default=None, metadata={"help": "The number of learned tokens."})
    adapter_layers: int | None = field(default=None, metadata={"help": "In how many blocks, from the last."})

    prefix: ClassVar[str] = "adaption_"
    paper: ClassVar[str] = "2303.16199"
    equation: ClassVar[str] = "attention(x) + g softmax(q K^T) V, K and V of learned tokens"
    count_formula: ClassVar[str] = "adapter_len·hidden + 1, in adapter_layers blocks"
    unmergeable: ClassVar[str] = "An adaption prompt is what attention looks at, and no function of any weight."
    ours: ClassVar[frozenset[str]] = Method.ours | {"exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save"}

    @property
    def is_adaption_prompt(self) -> bool:
        return True

    def prepare(self, base: nn.Module) -> None:
        for name in ("adapter_len", "adapter_layers"):
            if not getattr(self, name) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: say how many, such as adapter_len=10, adapter_layers=30.")
        if self.target_modules is None:
            self.target_modules = self.default_targets().get(str(architecture(base)), "self_attn")
        if isinstance(self.target_modules, str):
            self.target_modules = {self.target_modules}
        if len(self.target_modules) != 1:
            raise ValueError(f"target_modules={sorted(self.target_modules)}: give the one name that attention has, such as 'self_attn'.")

    def chosen(self, paths: list[str]) -> list[str]:
        layers = self.adapter_layers or 0
        if len(paths) < layers:
            (name,) = self.target_modules or ("",)
            raise ValueError(f"adapter_layers={layers}, and the base has {len(paths)} modules called {name!r}.")
        return paths[-layers:]

    def to_file(self) -> dict[str, Any]:
        plain = super().to_file()
        if isinstance(plain["target_modules"], list):
            (plain["target_modules"],) = plain["target_modules"]
        return plain

    def default_targets(self) -> dict[str, list[str] | str]:
        return {"llama": "self_attn", "mistral": "self_attn", "gpt2": "attn"}

    def site_of(self, module: nn.Module) -> Site | None:
        known = any(all(isinstance(getattr(module, n, None), nn.Module) for n in names) for names in (SEPARATE, PACKED))
        return Whole(module) if known else None

    def params(self, site: Site) -> dict[str, Param]:
        module: Any = site.module
        width = module.embed_dim if hasattr(module, "c_attn") else _features(module.q_proj, "in_features")
        return {"adaption_prompt": Param((1, self.adapter_len or 0, width), normal()), "adaption_gate": Param((1,))}

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Any:
        module: Any = p.site.module
        if hasattr(module, "c_attn"):
            return _plus(inner(x), _packed(module, p, x))
        if torch.compiler.is_compiling() or not (_plain(module.q_proj) and _plain(module.o_proj)):
            return _plus(inner(x), _behind(module, _found(module, p, inner.kwargs, module.q_proj(x))))
        with _Within(module, p, inner.kwargs, x) as within:
            y: Any = inner(x)
        return y if within.added else _plus(y, _behind(module, within.found()))


class _Within(TorchFunctionMode):
    """While an attention runs in this thread, its own queries look at the learned tokens, and what they find goes through its last
    layer together with its own.

    Attributes:
        added: that has happened.
    """

    def __init__(self, module: Any, p: Adapter, kwargs: Mapping[str, Any], x: Tensor) -> None:
        super().__init__()
        self.added = False
        self._module, self._p, self._kwargs, self._x = module, p, kwargs, x
        self._queries: Tensor | None = None

    def found(self) -> Tensor:
        queries = self._module.q_proj(self._x) if self._queries is None else self._queries
        return _found(self._module, self._p, self._kwargs, queries)

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        if func is F.linear and len(args) > 1:
            if args[0] is self._x and args[1] is self._module.q_proj.weight:
                self._queries = func(*args, **(kwargs or {}))
                return self._queries
            if args[1] is self._module.o_proj.weight and not self.added:
                found = self.found()
                if found.shape == args[0].shape:
                    self.added, args = True, (args[0] + found.to(args[0].dtype), *args[1:])
        return func(*args, **(kwargs or {}))


def _plain(layer: Any) -> bool:
    """Whether a layer is a product with its weight and nothing else."""
    return type(layer) is nn.Linear and not (layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer))


def _plus(y: Any, found: Tensor) -> Any:
    """An attention's output, alone or the first of several, with what was found."""
    if isinstance(y, tuple):
        return (_plus(y[0], found), *y[1:])
    return y + found.to(y.dtype)


def _features(layer: Any, name: str) -> int:
    return getattr(layer, name, None) or layer.weight.shape[1]


def _looked(p: Adapter, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What queries ``(batch, heads, length, dim)`` find in learned tokens ``(1, heads, tokens, dim)``: ``(batch, length, heads * dim)``."""
    scores = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1, dtype=torch.float32)
    return (((p.strength * p.adaption_gate) * scores).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def _heads(t: Tensor, dim: int) -> Tensor:
    """``(batch, length, heads * dim)`` to ``(batch, heads, length, dim)``."""
    return t.unflatten(-1, (-1, dim)).transpose(1, 2)


def _found(module: Any, p: Adapter, kwargs: Mapping[str, Any], queries: Tensor) -> Tensor:
    """What goes into the attention's last layer."""
    tokens, dim = p.adaption_prompt.to(queries.dtype), module.head_dim
    q, k, v = _heads(queries, dim), _heads(module.k_proj(tokens), dim), _heads(module.v_proj(tokens), dim)
    if hasattr(module, "q_norm"):
        q, k = module.q_norm(q), module.k_norm(k)
    if kwargs.get("position_embeddings") is not None:
        q = _turned(q, *kwargs["position_embeddings"])
    times = q.shape[1] // k.shape[1]
    return _looked(p, q, k.repeat_interleave(times, 1), v.repeat_interleave(times, 1))


def _behind(module: Any, found: Tensor) -> Tensor:
    """What the attention's last layer makes of it."""
    out = module.o_proj(found)
    # The bias is in the layer's own output already; with a gate that is shut nothing is added.
    bias = getattr(module.o_proj, "bias", None)
    return out if bias is None else out - bias


def _turned(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, on the first ``cos.shape[-1]`` features."""
    cos, sin, size = cos.unsqueeze(1), sin.unsqueeze(1), cos.shape[-1]
    part, rest = q[..., :size], q[..., size:]
    first, second = part.chunk(2, -1)
    return torch.cat((part * cos + torch.cat((-second, first), -1) * sin, rest), -1)


def _packed(module: Any, p: Adapter, x: Tensor) -> Tensor:
    # HF's files for GPT-2 mean what is found as it is, behind the attention's last layer.
    tokens, dim = p.adaption_prompt.to(x.dtype), module.head_dim
    q = module.c_attn(x).split(module.split_size, 2)[0]
    _, k, v = module.c_attn(tokens).split(module.split_size, 2)
    return _looked(p, _heads(q, dim), _heads(k, dim), _heads(v, dim))
