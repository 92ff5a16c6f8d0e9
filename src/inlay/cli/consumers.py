"""What the programs that load adapters make of a given one: read it, refuse it, or get it silently wrong.

Facts about each program, as of November 2026; one function each, so that a new release changes one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

Verdict = Literal["reads", "check", "wrong", "refuses"]
SEVERITY: tuple[Verdict, ...] = ("reads", "check", "wrong", "refuses")


@dataclass(frozen=True)
class AdapterFacts:
    """What the files say: the config, and the name and shape of every tensor."""

    config: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]

    @property
    def method(self) -> str:
        return str(self.config.get("peft_type", "")).upper()

    @property
    def dora(self) -> bool:
        return bool(self.config.get("use_dora")) or any("lora_magnitude_vector" in name for name in self.shapes)

    @property
    def rslora(self) -> bool:
        return bool(self.config.get("use_rslora"))

    @property
    def biases(self) -> bool:
        return self.config.get("bias", "none") != "none" or bool(self.config.get("lora_bias"))

    @property
    def retrained(self) -> bool:
        return bool(self.config.get("modules_to_save")) or bool(self.config.get("trainable_token_indices"))

    @property
    def embeddings(self) -> bool:
        return any("lora_embedding_" in name for name in self.shapes)

    @property
    def patterns(self) -> list[str]:
        return [name for name in ("rank_pattern", "alpha_pattern") if self.config.get(name)]

    @property
    def largest_rank(self) -> int:
        return max((shape[0] for name, shape in self.shapes.items() if name.endswith("lora_A.weight")), default=0)


Remark = tuple[Verdict, str]


def _vllm(adapter: AdapterFacts) -> Iterator[Remark]:
    if adapter.dora:
        yield "refuses", "DoRA"
    if adapter.retrained:
        yield "refuses", "retrained modules or tokens"
    if adapter.biases:
        yield "refuses", "bias"
    if adapter.patterns:
        yield "check", f"older versions ignore {' and '.join(adapter.patterns)}"
    if adapter.largest_rank > 16:
        yield "check", f"needs --max-lora-rank {adapter.largest_rank}"


def _sglang(adapter: AdapterFacts) -> Iterator[Remark]:
    if adapter.patterns:
        yield "refuses", " and ".join(adapter.patterns)
    if adapter.dora:
        yield "refuses", "DoRA"
    if adapter.rslora:
        yield "wrong", "ignores use_rslora, so the scale is too small"


def _llama_cpp(adapter: AdapterFacts) -> Iterator[Remark]:
    if adapter.dora:
        yield "refuses", "DoRA"
    if adapter.embeddings:
        yield "refuses", "adapted embeddings"
    if adapter.retrained or adapter.biases:
        yield "refuses", "tensors that are no lora_A or lora_B"
    if adapter.rslora:
        yield "wrong", "takes alpha / rank for the scale, not use_rslora's"
    if adapter.config.get("alpha_pattern"):
        yield "wrong", "ignores alpha_pattern"


def _ollama(adapter: AdapterFacts) -> Iterator[Remark]:
    alpha = adapter.config.get("lora_alpha")
    if isinstance(alpha, float) and not alpha.is_integer():
        yield "refuses", f"lora_alpha {alpha} is no whole number"
    yield from _llama_cpp(adapter)
    yield "check", "llama and gemma2 bases only"


def _lorax(adapter: AdapterFacts) -> Iterator[Remark]:
    if adapter.patterns:
        yield "wrong", f"ignores {' and '.join(adapter.patterns)}"
    if adapter.dora:
        yield "wrong", "ignores DoRA's magnitudes"


def _mlx(adapter: AdapterFacts) -> Iterator[Remark]:
    yield "refuses", "has a format of its own: convert the adapter, or merge it"


CONSUMERS: dict[str, Callable[[AdapterFacts], Iterator[Remark]]] = {
    "vLLM": _vllm,
    "SGLang": _sglang,
    "llama.cpp": _llama_cpp,
    "Ollama": _ollama,
    "LoRAX": _lorax,
    "mlx-lm": _mlx,
}


def _transformers(adapter: AdapterFacts) -> Iterator[Remark]:
    if not adapter.config.get("base_model_name_or_path"):
        yield "check", "the config names no base model; name it when loading"


def verdicts(adapter: AdapterFacts) -> list[dict[str, str]]:
    """``[{"consumer", "verdict", "why"}, ...]``: the gravest verdict of each, with all its reasons."""
    rows = []
    for name, remarks in {"transformers, peft, TRL": _transformers, **CONSUMERS}.items():
        found: list[Remark]
        if name in CONSUMERS and adapter.method != "LORA":
            found = [("refuses", f"reads LoRA only, this is {adapter.method or 'unknown'}; merge it or convert it")]
        else:
            found = list(remarks(adapter))
        worst = max((verdict for verdict, _ in found), key=SEVERITY.index, default="reads")
        rows.append({"consumer": name, "verdict": worst, "why": "; ".join(dict.fromkeys(why for _, why in found))})
    return rows
