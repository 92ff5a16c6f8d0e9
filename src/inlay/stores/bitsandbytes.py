"""bitsandbytes: ``Linear4bit`` (NF4 and FP4, plain and double quantisation), ``Linear8bitLt``, and their embeddings."""

from __future__ import annotations

import copy
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..core.stores import Store, store


def _functional() -> Any:
    return sys.modules["bitsandbytes"].functional


@store("Params4bit")
class FourBit(Store):
    """Two codes a byte with a scale a block, in a ``Params4bit`` whose ``quant_state`` says the rest."""

    dense = False
    backend = "bitsandbytes"

    def held(self, module: nn.Module, name: str) -> Any:
        q: Any = module._parameters[name]
        # What FSDP has gathered knows only numbers; the layer keeps the rest.
        if getattr(q, "quant_state", None) is None:
            q.quant_state = getattr(module, "quant_state", None)
        return q

    def shape(self, module: nn.Module, name: str) -> torch.Size:
        q = self.held(module, name)
        return q.shape if q.quant_state is None else torch.Size(q.quant_state.shape)

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        q = self.held(module, name)
        stored = q.dtype if q.quant_state is None else q.quant_state.dtype
        return getattr(module, "compute_dtype", None) or stored

    def read_tensor(self, stored: Any) -> Tensor:
        state = stored.quant_state
        if state is None:
            return stored.detach()
        return dequantized(*unpacked(stored.data, state))

    def put(self, module: nn.Module, name: str, held: Any) -> None:
        module._parameters[name] = held
        module.quant_state = held.quant_state

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        old: Any = module._parameters[name]
        state = old.quant_state
        new = type(old)(
            weight.detach().to(old.device, torch.float32),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested or getattr(state, "original_nested", False),
            quant_type=state.quant_type,
            quant_storage=getattr(state, "original_storage_type", old.quant_storage),
            module=module,
        ).to(old.device)
        new.quant_state.dtype = getattr(state, "original_dtype", state.dtype)
        self.put(module, name, new)

    def adopt(self, module: nn.Module) -> None:
        # On some CPUs the layer packs its weight anew in its first call for inference. It rounds the scales by that, and passes no
        # gradient from then on.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            vars(module)["support_avx512bf16_for_cpu"] = False
        q: Any = module._parameters.get("weight")
        if q is not None and getattr(q.quant_state, "packing_format_for_cpu", False):
            q.data, q.quant_state = unpacked(q.data, q.quant_state)
            module.quant_state = q.quant_state

    def exact(self, module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)


def unpacked(codes: Tensor, state: Any) -> tuple[Tensor, Any]:
    """Codes and scales in the order of the weight, where the layer has packed them for inference on a CPU."""
    if not getattr(state, "packing_format_for_cpu", False):
        return codes, state
    return _functional()._convert_weight_packed_for_cpu_inverse(codes, copy.copy(state))


def dequantized(codes: Tensor, state: Any) -> Tensor:
    """The weight in the dtype that it had before."""
    return _functional().dequantize_4bit(codes, state)


class Held8(NamedTuple):
    """An ``Int8Params`` with its codes and scales, which wander from it to the layer's state in the layer's first call."""

    q: Any
    codes: Tensor | None
    scales: Tensor | None
    wandered: bool = False


@store("Int8Params")
class EightBit(Store):
    """Rows of whole numbers with a scale each, in an ``Int8Params`` and the layer's ``state``."""

    dense = False
    backend = "bitsandbytes"

    def dtype(self, module: nn.Module, name: str) -> torch.dtype:
        q, bias = module._parameters[name], module._parameters.get("bias")
        if q is not None and q.is_floating_point():
            return q.dtype
        if bias is not None and bias.is_floating_point():
            return bias.dtype
        return torch.float32 if q is None or q.device.type == "cpu" else torch.float16

    def held(self, module: nn.Module, name: str) -> Held8:
        q: Any = module._parameters[name]
        state: Any = getattr(module, "state", None)
        codes, scales = getattr(q, "CB", None), getattr(q, "SCB", None)
        if scales is None and state is not None:
            return Held8(q, state.CB, state.SCB, True)
        return Held8(q, codes, scales)

    def read_tensor(self, stored: Any) -> Tensor:
        if stored.q.is_floating_point():
            return stored.q.detach()
        return stored.q.detach().float().mul_(stored.scales.float().unsqueeze(-1) / 127)

    def put(self, module: nn.Module, name: str, held: Any) -> None:
        module._parameters[name] = held.q
        if held.wandered:
            state: Any = module.state
            state.CB, state.SCB = held.codes, held.scales
        else:
            # The layer takes them into its state in its next call.
            held.q.CB, held.q.SCB = held.codes, held.scales

    @torch.no_grad()
    def write(self, module: nn.Module, name: str, weight: Tensor) -> None:
        old: Any = module._parameters[name]
        if old.is_floating_point():
            super().write(module, name, weight)
            return
        # Quantised here and not by the library, which would round to half precision first.
        weight = weight.detach().to(old.device, torch.float32)
        scales = weight.abs().amax(-1)
        codes = (weight * (127 / scales.clamp(min=1e-30)).unsqueeze(-1)).round_().to(torch.int8)
        self.put(module, name, Held8(type(old)(codes, requires_grad=False), codes, scales))
