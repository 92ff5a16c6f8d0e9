"""GLoRA: ``W + W * A + B`` and ``b + b * D + E + W C`` with small A, B, C, D and E (Chavan et al. 2023, arXiv 2306.07967).

A scales the weight entry by entry and B adds to it; D and E do so with the bias, and C moves the bias by what the weight makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from ..core.additive import add, meet
from ..core.config import PeftType
from ..core.method import Method, full, register
from ..core.param import Param, kaiming_uniform, normal, zeros
from ..core.site import Site
from ..kernels.passing import linear_through

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.inner import Inner


def _form(of: str, *known: str) -> dict[str, Any]:
    return {"help": f"Form of {of}: {', '.join(known[:-1])} or {known[-1]}.", "known": known}


@register
@dataclass
class GloraConfig(Method):
    """Weight and bias, scaled and shifted.

    Args:
        r: rank of what is of low rank.
        config_A_B: the form of A and B: ``"lora"`` (low rank), ``"vector"`` (a number an output), ``"constant"`` or ``"none"``.
        config_C: the form of C, ``(in, 1)``: ``"lora"``, ``"vector"`` or ``"none"``.
        config_D_E: the form of D and E, ``(out,)``: ``"vector"``, ``"constant"`` or ``"none"``.
        init_weights: start from the base; False starts from random numbers, for tests.

    A layer without a bias has no C, D and E.

    Raises:
        ValueError: the rank is no positive integer, a form is unknown, or there would be nothing to train.
    """

    peft_type: str | None = PeftType.GLORA
    r: int = field(default=8, metadata={"help": "Rank of what is of low rank.", "positive": True})
    config_A_B: str = field(default="lora", metadata=_form("A and B", "lora", "vector", "constant", "none"))  # noqa: N815  HF's name
    config_C: str = field(default="lora", metadata=_form("C", "lora", "vector", "none"))  # noqa: N815  HF's name
    config_D_E: str = field(default="constant", metadata=_form("D and E", "vector", "constant", "none"))  # noqa: N815  HF's name
    init_weights: bool = field(default=True, metadata={"help": "Start from the base."})

    prefix: ClassVar[str] = "glora_"
    paper: ClassVar[str] = "2306.07967"
    count_formula: ClassVar[str] = "4·r·(in + out) at most, by what each part is configured to be"
    equation: ClassVar[str] = "W + W * A + B, b + b * D + E + W C"
    examples: ClassVar[dict[str, dict[str, Any]]] = {
        "": {"r": 2},
        "vector": {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector", "bias": "glora_only"},
        "constant": {"config_A_B": "constant", "config_C": "none", "config_D_E": "none"},
    }
    ours: ClassVar[frozenset[str]] = (Method.ours - {"bias"}) | {"exclude_modules", "layers_to_transform", "layers_pattern"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.config_A_B == self.config_C == self.config_D_E == "none":
            raise ValueError("config_A_B, config_C and config_D_E are all 'none', which leaves nothing to train.")

    def refuses(self, site: Site) -> str | None:
        idle = self.config_A_B == "none" and site.bias() is None
        return "it has no bias, and config_A_B='none' leaves the weight as it is" if idle else None

    def params(self, site: Site) -> dict[str, Param]:
        start, one = (zeros, zeros) if self.init_weights else (kaiming_uniform, normal(0.02))
        declared: dict[str, Param] = {}

        def declare(name: str, form: str, rows: str, columns: str | int) -> None:
            if form == "lora":
                declared[f"{name}_Xd"] = Param((rows, self.r), start, f"{name}.Xd")
                declared[f"{name}_Xu"] = Param((self.r, columns), kaiming_uniform, f"{name}.Xu")
            elif form == "vector":
                declared[f"{name}_X"] = Param((rows,) if columns == 0 else (rows, 1), start, f"{name}.X")
            elif form == "constant":
                declared[f"{name}_X"] = Param((1,), one, f"{name}.X")

        for name in ("glora_A", "glora_B"):
            declare(name, self.config_A_B, "out", "in")
        if site.bias() is not None:
            declare("glora_C", self.config_C, "in", 1)
            for name in ("glora_D", "glora_E"):
                declare(name, self.config_D_E, "channel", 0)
        return declared

    def as_read(self, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        # HF writes the zeros that stand for parts that are switched off.
        return {key: tensor for key, tensor in tensors.items() if not key.endswith(".zeros")}

    def apart(self, site: Site) -> tuple[str, ...]:
        return ("out",)

    def fold(self, p: Adapter, w: Tensor, b: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self._mixed(p.site, w, b, {name: full(q) for name, q in p.named_parameters(recurse=False) if name in p.declared})

    def _mixed(self, site: Site, w: Tensor, b: Tensor | None, tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        def path(name: str, constant_axes: int) -> Tensor | None:
            if f"{name}_Xd" in tensors:
                return tensors[f"{name}_Xd"] @ tensors[f"{name}_Xu"]
            x = tensors.get(f"{name}_X")
            # A constant stands for each entry of its matrix of the batch.
            return x.unsqueeze(-1) if x is not None and x.ndim == len(site.batch) + 1 and constant_axes == 2 else x

        scale, shift = path("glora_A", 2), path("glora_B", 2)
        new = w if scale is None or shift is None else torch.addcmul(w, w, scale).add_(shift)
        if b is None:
            return new, None
        # (*batch, channel)
        own = b.reshape(*site.batch, -1)
        scale, shift, column = path("glora_D", 1), path("glora_E", 1), path("glora_C", 2)
        moved = own if scale is None or shift is None else own + own * scale + shift
        if column is not None:
            # The rows that share a bias move it together.
            moved = moved + (w @ column).reshape(*own.shape, -1).sum(-1)
        return new, moved.reshape(b.shape)

    def around(self, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        if inner.dense is None:
            y, (w, b) = inner(x), inner.params()
            w, b = full(w), None if b is None else full(b)
            new_w, new_b = self.fold(p, w, b)
            x, change = meet(x, new_w - w)
            return add(y, inner.site.apply(x, change, None if b is None or new_b is None else (new_b - b).to(change.dtype)), 1.0)
        tensors = {name: q for name, q in p.named_parameters(recurse=False) if name in p.declared}

        def fold(w: Tensor, b: Tensor | None, *params: Tensor) -> tuple[Tensor, Tensor | None]:
            return self._mixed(p.site, w, b, dict(zip(tensors, params, strict=True)))

        return linear_through(x, *inner.dense, fold, *tensors.values())
