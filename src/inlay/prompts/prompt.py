"""The tensors of one adapter on inputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..core.param import Param, generator_for
from ..formats.slots import Slot

if TYPE_CHECKING:
    from .method import PromptMethod


class Prompt(nn.Module):
    """The tensors that a method declared, on the meta device until `materialise` or a file gives them values.

    Attributes:
        method: the configuration, which declares the tensors.
    """

    def __init__(self, method: PromptMethod, dtype: torch.dtype) -> None:
        super().__init__()
        self.method = method
        for name, param in self.declared.items():
            holder, leaf = self._holder(name)
            tensor = torch.empty(tuple(map(int, param.axes)), dtype=param.dtype or dtype, device="meta")
            if param.trainable:
                holder.register_parameter(leaf, nn.Parameter(tensor))
            else:
                holder.register_buffer(leaf, tensor, persistent=param.persistent)

    @property
    def declared(self) -> dict[str, Param]:
        """The tensors by their names here; a dot in a name stands for a module of its own (``embedding.weight``)."""
        # Asked for each time: declarations hold functions, which a pickle could not.
        return self.method.params()

    def _holder(self, name: str) -> tuple[nn.Module, str]:
        """The module that has a tensor, made where it is absent, and the tensor's name in it."""
        *path, leaf = name.split(".")
        holder: nn.Module = self
        for part in path:
            if part not in holder._modules:
                holder.add_module(part, nn.Module())
            holder = holder.get_submodule(part)
        return holder, leaf

    def slots(self, live: str) -> list[Slot]:
        """The tensors that go to a file, with ``live`` in front of their live names."""
        return self.method.slots(self, live)

    def own_slots(self, live: str) -> list[Slot]:
        """As `slots`, each tensor as it is here."""
        return [Slot(p.key or name, live + name, *self._holder(name)) for name, p in self.declared.items() if p.persistent]

    def materialise(self, device: torch.device) -> None:
        """Give memory and their declared initial values to tensors that have none yet."""
        for name, param in self.declared.items():
            holder, leaf = self._holder(name)
            table = holder._parameters if param.trainable else holder._buffers
            old = table[leaf]
            assert old is not None
            if old.device.type != "meta":
                continue
            value = torch.empty(old.shape, dtype=param.dtype or torch.float32)
            param.init(value, generator_for(self.method.seed, name))
            value = value.to(device, old.dtype)
            table[leaf] = nn.Parameter(value, requires_grad=old.requires_grad) if param.trainable else value  # type: ignore[assignment]

    @torch.no_grad()
    def load_prompt_embeddings(self, prompt_embeddings: Tensor) -> None:
        """Set the vectors, by the one tensor that a file has of them.

        Raises:
            ValueError: a network makes the vectors, or the shape is another.
        """
        (slot,) = self.slots("")
        if slot.key != "prompt_embeddings" or slot.shape != tuple(prompt_embeddings.shape):
            raise ValueError(f"This prompt holds {slot.key} of {slot.shape}, and `prompt_embeddings` are {tuple(prompt_embeddings.shape)}.")
        slot.put(prompt_embeddings)

    def with_values(self, state: dict[str, Tensor]) -> Prompt:
        """The same adapter with the values of a state dict.

        Raises:
            RuntimeError: a tensor is absent or has another shape.
        """
        other = Prompt(self.method, next(self.parameters()).dtype)
        other.load_state_dict(state, assign=True)
        return other

    def extra_repr(self) -> str:
        return type(self.method).__name__
