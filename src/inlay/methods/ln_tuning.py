"""LayerNorm tuning: scale and shift of the norms are trained as they are, and nothing else (Zhao et al. 2023, arXiv 2312.11420)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor, nn

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param
from ..core.site import Linear, Site
from ..core.targets import architecture

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner

_BLOCK = "input_layernorm post_attention_layernorm"
_GEMMA = f"{_BLOCK} pre_feedforward_layernorm post_feedforward_layernorm norm"
_DEFAULTS = {
    "llama": f"{_BLOCK} norm", "bloom": f"{_BLOCK} ln_f", "t5": "layer_norm final_layer_norm", "mt5": "layer_norm final_layer_norm",
    "bart": "self_attn_layer_norm encoder_attn_layer_norm final_layer_norm", "gpt2": "ln_1 ln_2 ln_f", "gptj": "ln_1 ln_f",
    "blip-2": "layernorm LayerNorm final_layer_norm self_attn_layer_norm", "falcon": f"{_BLOCK} ln_f", "mistral": f"{_BLOCK} norm",
    "phi": "input_layernorm final_layernorm", "gemma": f"{_BLOCK} norm", "gemma2": _GEMMA, "gemma3_text": _GEMMA,
    "qwen2": "post_attention_layernorm", "qwen3": "post_attention_layernorm", "bert": "LayerNorm", "roberta": "LayerNorm",
    "distilbert": "sa_layer_norm output_layer_norm LayerNorm", "gpt_neox": f"{_BLOCK} final_layer_norm",
    "opt": "self_attn_layer_norm final_layer_norm", "llava": f"multi_modal_projector {_BLOCK} norm embed_tokens lm_head",
}  # fmt: skip


class Whole(Param):
    """A tensor that a file has in the shape in which the host keeps its own."""

    def to_file(self, site: Site, tensor: Tensor) -> Tensor:
        return site.raw(tensor)

    def from_file(self, site: Site, tensor: Tensor) -> Tensor:
        return site.matrix(tensor)


@register
@dataclass
class LNTuningConfig(Method):
    """Retrained norms. Any other layer that is named is retrained as it is, likewise.

    Of several adapters on one norm, the last one decides.

    Raises:
        ValueError: ``bias`` is set; the biases of the adapted layers are retrained anyway.
    """

    peft_type: str | None = PeftType.LN_TUNING

    prefix: ClassVar[str] = "ln_tuning_"
    paper: ClassVar[str] = "2312.11420"
    count_formula: ClassVar[str] = "as many as the layer has"
    equation: ClassVar[str] = "W', b' in place of W, b"
    ours: ClassVar[frozenset[str]] = Method.ours | {"layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias != "none":
            raise ValueError(f"bias={self.bias!r}: LN tuning retrains the biases of its layers anyway; leave `bias` at 'none'.")

    def default_targets(self) -> dict[str, list[str] | str]:
        return {base: names.split() for base, names in _DEFAULTS.items()}

    def prepare(self, base: nn.Module) -> None:
        if self.target_modules is None and architecture(base) == "llava":
            # The projector has no weight of its own; those of its two layers are meant.
            self.target_modules = {"linear_1", "linear_2", *_DEFAULTS["llava"].split()} - {"multi_modal_projector"}

    def params(self, site: Site) -> dict[str, Param]:
        declared: dict[str, Param] = {"ln_tuning_weight": Whole(("out", "in"), key="ln_tuning_layers.weight")}
        bias = site.bias()
        if bias is not None:
            declared["ln_tuning_bias"] = Param(("channel",), key="ln_tuning_layers.bias", file_shape=tuple(bias.shape))
        return declared

    def start(self, p: Adapter) -> None:
        w, b = p.site.read()
        p.ln_tuning_weight.data.copy_(w)
        if b is not None:
            p.ln_tuning_bias.data.copy_(b.view_as(p.ln_tuning_bias))

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        # A bias that another adapter has given to a layer without one is not ours to replace.
        own = b is not None and "ln_tuning_bias" in p.declared
        return p.ln_tuning_weight.to(w.dtype), p.ln_tuning_bias.to(w.dtype).view_as(b) if own else b

    def apart(self, site: Site) -> tuple[str, ...]:
        return "out", "in"

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if not isinstance(inner.site, Linear) or inner.dense is not None:
            return super().around(p, inner, x)
        # Someone may have put a forward of their own on the layer, which has to run.
        w, b = inner.params()
        new_w, new_b = self.fold(p, full(w), b)
        x_, change = meet(x, new_w - w)
        return add(inner(x), inner.site.apply(x_, change, None if b is None or new_b is None else new_b - b), 1.0)
