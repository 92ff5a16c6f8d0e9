"""Small networks that make prompts, as declared tensors under the names that torch's modules give theirs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..core.param import Init, Param, kaiming_uniform
from .prompt import Prompt


def uniform(bound: float) -> Init:
    return lambda tensor, generator: tensor.uniform_(-bound, bound, generator=generator)


def linear(name: str, inputs: int, outputs: int, zero: bool = False) -> dict[str, Param]:
    """An ``nn.Linear`` with its default start, or zero."""
    if zero:
        return {f"{name}.weight": Param((outputs, inputs)), f"{name}.bias": Param((outputs,))}
    return {f"{name}.weight": Param((outputs, inputs), kaiming_uniform), f"{name}.bias": Param((outputs,), uniform(inputs**-0.5))}


def chain(p: Prompt, names: Sequence[str], between: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Linear layers one behind another: ``(tokens, inputs)`` to ``(tokens, outputs)``."""
    for i, name in enumerate(names):
        x = F.linear(x if i == 0 else between(x), p.get_parameter(f"{name}.weight"), p.get_parameter(f"{name}.bias"))
    return x


def lstm(name: str, inputs: int, hidden: int, layers: int) -> dict[str, Param]:
    """An ``nn.LSTM`` that reads in both directions."""
    start, found = uniform(hidden**-0.5), {}
    for layer in range(layers):
        for end in ("", "_reverse"):
            seen = inputs if layer == 0 else 2 * hidden
            shapes = {
                "weight_ih": (4 * hidden, seen),
                "weight_hh": (4 * hidden, hidden),
                "bias_ih": (4 * hidden,),
                "bias_hh": (4 * hidden,),
            }
            found |= {f"{name}.{part}_l{layer}{end}": Param(shape, start) for part, shape in shapes.items()}
    return found


def run_lstm(p: Prompt, name: str, x: Tensor, layers: int, dropout: float) -> Tensor:
    """``(tokens, inputs)`` to ``(tokens, 2 * hidden)``."""
    weights: list[Tensor] = list(p.get_submodule(name).parameters())
    hidden = weights[1].shape[1]
    state = x.new_zeros(2 * layers, 1, hidden)
    out, _, _ = torch.lstm(x[None], (state, state), weights, True, layers, dropout, dropout > 0, True, True)
    return out[0]
