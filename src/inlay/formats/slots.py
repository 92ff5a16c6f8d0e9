"""An adapter's tensors by the names that HF peft gives them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..core.adapter import Adapter
from ..core.inlaid import places
from ..core.param import Param
from ..core.plan import Biases, Part
from ..core.site import Site
from ..core.targets import base_modules, end_of, tied_paths
from ..methods.trainable_tokens import TrainableTokensConfig

PREFIX = "base_model.model."


EMBEDDING_LAYER_NAMES = ("embed_tokens", "lm_head")


class Slot(NamedTuple):
    """One tensor of an adapter: where it is and what it is called in a file.

    Attributes:
        key: in a file, without the prefix.
        live: in the model's own state dict.
        holder, name: the module that has it, and as what.
        param, site: how it was declared; None for tensors that are written as they are.
    """

    key: str
    live: str
    holder: nn.Module
    name: str
    param: Param | None = None
    site: Site | None = None

    @property
    def tensor(self) -> Tensor:
        found = self.holder._parameters.get(self.name)
        return self.holder._buffers[self.name] if found is None else found  # type: ignore[return-value]

    def to_file(self, tensor: Tensor) -> Tensor:
        return tensor if self.param is None or self.site is None else self.param.to_file(self.site, tensor)

    def from_file(self, tensor: Tensor) -> Tensor:
        return tensor if self.param is None or self.site is None else self.param.from_file(self.site, tensor)

    @property
    def shape(self) -> tuple[int, ...]:
        """In a file."""
        if self.param is None or self.site is None:
            return tuple(self.tensor.shape)
        return self.param.shape_in_file(self.site)

    def put(self, tensor: Tensor) -> None:
        """Set the value, from a file's tensor; a tensor on the meta device gets its memory here."""
        old = self.tensor
        value = self.from_file(tensor.detach())
        if old.device.type == "meta":
            device = self.site.device if self.site is not None else tensor.device
            made = value.to(device, old.dtype, copy=True).contiguous()
            if self.name in self.holder._parameters:
                self.holder._parameters[self.name] = nn.Parameter(made, requires_grad=old.requires_grad)
            else:
                self.holder._buffers[self.name] = made
        else:
            with torch.no_grad():
                old.copy_(value)


def slots(path: str, in_file: str, site_name: str, adapter: nn.Module, name: str) -> Iterator[Slot]:
    """The tensors of one adapter at one place."""
    base, live = f"{path}." if path else "", _live(path, site_name, name)
    if not isinstance(adapter, Adapter):
        for key in adapter.state_dict(keep_vars=True):
            yield Slot(base + key, live + key, *_held(adapter, key))
        return
    # Tokens beside a method have a name of their own, whichever adapter was first at this place.
    as_part = isinstance(adapter.method, TrainableTokensConfig) and adapter.method.as_part
    in_file = f"{path}.token_adapter" if as_part else in_file.removesuffix(".token_adapter")
    for own, param in adapter.declared.items():
        if param.persistent:
            yield Slot(f"{in_file}.{param.key or own}".lstrip("."), live + own, adapter, own, param, adapter.site)
    if adapter.trained_bias is not None:
        inside = "" if isinstance(adapter.method, Biases) else "base_layer."
        # A host may have a bias for each of its raw parameters.
        leaf = adapter.site.bias_name or "bias"
        yield Slot(f"{base}{inside}{leaf}", f"{live}trained_bias", adapter, "trained_bias")
    if adapter.shared is None:
        return
    bank, bank_live = adapter.shared, f"{live if adapter.bank_at is None else _live(*adapter.bank_at, name)}bank."
    for leaf, key in adapter.method.repeated(adapter).items():
        yield Slot(f"{in_file}.{leaf}", bank_live + key, *_held(bank, key))
    if adapter.bank_at is None:
        for key in bank.state_dict():
            # The bank belongs to the whole adapter, one level above the model.
            in_bank = adapter.method.bank_key(key)
            if in_bank is not None:
                yield Slot(in_bank, bank_live + key, *_held(bank, key))


def _live(path: str, site_name: str, name: str) -> str:
    """Where an adapter's tensors are in the model's own state dict."""
    return (f"{path}." if path else "") + f"adapters.{name}." + (f"{site_name}." if site_name not in ("", "weight") else "")


def _held(module: nn.Module, key: str) -> tuple[nn.Module, str]:
    """The module that has a tensor, and as what."""
    owner, _, leaf = key.rpartition(".")
    return module.get_submodule(owner), leaf


def slots_of_parts(parts: Sequence[Part], name: str) -> list[Slot]:
    return [s for p in parts for s in slots(p.path, p.in_file or p.path, p.site.name if p.site is not None else "", p.adapter, name)]


def slots_of_model(model: nn.Module, name: str) -> list[Slot]:
    found = []
    for place in places(model):
        if name in place.adapters:
            found += slots(place.path, place.in_file, place.name, place.adapters[name], name)
    return found


def key_in_file(slot: Slot, prefix: str = PREFIX) -> str:
    return slot.key if slot.key.startswith("base_model.") else prefix + slot.key


def said_twice(model: nn.Module, key: str, given: Mapping[str, tuple[str, Tensor]]) -> bool:
    """Keys of HF's files that repeat what other keys say: a tied head's factors, a retrained bias under its wrappers' names."""
    if ".original_module." in key or ".modules_to_save." in key:
        return True
    repeats = {"lora_A.weight": "lora_embedding_B", "lora_B.weight": "lora_embedding_A", "trainable_tokens_delta": "trainable_tokens_delta"}
    for path, source in tied_paths(model).items():
        for leaf, of in repeats.items():
            first = given.get(f"{source}.{of}")
            if key == f"{path}.{leaf}" and first is not None:
                return torch.equal(given[key][1], first[1] if leaf == of else first[1].mT)
    return False


def embedding_leaves(model: nn.Module) -> set[str]:
    ends = [end_of(model, g) for g in ("get_input_embeddings", "get_output_embeddings")]
    return {p.rpartition(".")[2] for p, m in base_modules(model) if any(m is e for e in ends if e is not None)} | set(EMBEDDING_LAYER_NAMES)


def bare_key(key: str) -> str:
    return key.removeprefix("_orig_mod.").removeprefix(PREFIX)


def named_in_file(key: str, name: str) -> str:
    """The key as it is in a live state dict of HF: with the adapter's name behind the tensor's."""
    head, _, leaf = key.rpartition(".")
    if leaf in ("weight", "bias") and re.search(r"(lora|vera|oft|hra|ia3|boft|hada|lokr)_\w+$", head):
        return f"{head}.{name}.{leaf}"
    return f"{key}.{name}"
