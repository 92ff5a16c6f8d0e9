"""(IA)^3: ``diag(l) W`` in attention, ``W diag(l)`` before the last layer of a feed-forward block (Liu et al. 2022, arXiv 2205.05638)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from ..core.config import PeftType
from ..core.method import Method, register
from ..core.param import Param, normal, ones
from ..core.site import AnyConv, Embedding, Linear, Site, TransposedLinear
from ..core.targets import architecture, target_for

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

# By `model_type` of the base: what is scaled at its output, and what at its input.
_QV, _KV = "q_proj v_proj", "k_proj v_proj"
_DEFAULTS: dict[str, tuple[str, str]] = {
    "t5": ("k v", "wo"), "mt5": ("k v wi_1", ""), "gpt2": ("c_attn", "mlp.c_proj"), "gpt_bigcode": ("c_attn", "mlp.c_proj"),
    "gptj": (_QV, "fc_out"), "gpt_neo": (_QV, "c_proj"), "gpt_neox": ("query_key_value", "dense_4h_to_h"),
    "bloom": ("query_key_value", "mlp.dense_4h_to_h"), "falcon": ("query_key_value", "dense_4h_to_h"),
    "RefinedWeb": ("query_key_value", "dense_4h_to_h"), "RefinedWebModel": ("query_key_value", "dense_4h_to_h"),
    "bert": ("key value", "output.dense"), "roberta": ("key value", "output.dense"), "deberta": ("in_proj", "output.dense"),
    "deberta-v2": ("key_proj value_proj", "output.dense"), "opt": ("q_proj k_proj", "fc2"), "bart": (_QV, "fc2"), "phi": (_QV, "fc2"),
    "llama": (_KV, "down_proj"), "llama4": (_QV, "down_proj"), "mistral": (_KV, "down_proj"), "mixtral": (_KV, "w2"),
    "gemma": (_QV, "down_proj"), "gemma2": (_QV, "down_proj"), "gemma3_text": (_QV, "down_proj"), "qwen2": (_QV, "down_proj"),
    "qwen3": (_QV, "down_proj"),
}  # fmt: skip


@register
@dataclass
class IA3Config(Method):
    """Learned gains on activations.

    Args:
        feedforward_modules: those of the adapted modules that are scaled at their input, by name or regex; where None, the
            defaults of the base's architecture, and none where it has no defaults.
        fan_in_fan_out: for HF's signature; the layout of a layer is known from its type.
        init_ia3_weights: start from gains of one; False starts from random ones, for tests.

    Raises:
        ValueError: a feed-forward module is not among the target modules.
    """

    peft_type: str | None = PeftType.IA3
    feedforward_modules: list[str] | set[str] | str | None = field(default=None, metadata={"help": "Modules to scale at their input."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Ignored: a layer's layout is known from its type."})
    init_ia3_weights: bool = field(default=True, metadata={"help": "Start from gains of one."})

    prefix: ClassVar[str] = "ia3_"
    paper: ClassVar[str] = "2205.05638"
    equation: ClassVar[str] = "diag(l) W, or W diag(l) in feed-forward modules"
    examples: ClassVar[dict[str, dict[str, Any]]] = {"": {"feedforward_modules": []}, "feedforward": {"feedforward_modules": r".*host.*"}}
    ours: ClassVar[frozenset[str]] = Method.ours | {"layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.feedforward_modules, (list, tuple)):
            self.feedforward_modules = set(self.feedforward_modules)
        if isinstance(self.feedforward_modules, set) and isinstance(self.target_modules, set):
            lost = sorted(self.feedforward_modules - self.target_modules)
            if lost:
                raise ValueError(f"feedforward_modules {lost} are not among the target_modules.")

    def default_targets(self) -> dict[str, list[str] | str]:
        return {base: f"{outputs} {inputs}".split() for base, (outputs, inputs) in _DEFAULTS.items()}

    def prepare(self, base: nn.Module) -> None:
        if self.feedforward_modules is None:
            _, inputs = _DEFAULTS.get(str(architecture(base)), ("", ""))
            self.feedforward_modules = set(inputs.split())

    def at(self, path: str) -> Method:
        method = super().at(path)
        return method.become(FeedForward) if target_for(self.feedforward_modules or (), path) else method

    def params(self, site: Site) -> dict[str, Param]:
        return {"ia3_l": self._gains("channel", site)}

    def _gains(self, axis: str, site: Site) -> Param:
        shape = None
        if isinstance(site, AnyConv):
            shape = (1, -1, *(1 for _ in site.kernel))
        elif isinstance(site, (Linear, TransposedLinear)):
            shape = (-1, 1) if axis == "channel" else (1, -1)
        return Param((axis,), ones if self.init_ia3_weights else normal(), file_shape=shape)

    def apart(self, site: Site) -> tuple[str, ...]:
        return "out", "in"

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        gains = p.ia3_l.to(w.dtype)
        return p.site.spread(gains).unsqueeze(-1) * w, None if b is None else gains.reshape(b.shape) * b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        return (y * inner.site.rows(p.ia3_l)).to(y.dtype)


class FeedForward(IA3Config):
    """(IA)^3 at the input of a layer: ``W diag(l)``."""

    def params(self, site: Site) -> dict[str, Param]:
        return {"ia3_l": self._gains("feature", site)}

    def apart(self, site: Site) -> tuple[str, ...]:
        # A column of a convolution is one place in the kernel of a feature.
        return ("out",) if site.kernel else ("out", "in")

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return w * p.site.spread_in(p.ia3_l.to(w.dtype)).unsqueeze(-2), b

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if isinstance(inner.site, Embedding):
            return Method.around(self, p, inner, x)
        return inner((x * inner.site.rows(p.ia3_l)).to(x.dtype))
