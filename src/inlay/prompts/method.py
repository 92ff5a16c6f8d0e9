"""Methods on the inputs of the whole model. As with methods on weights, the configuration is the method.

A method declares its tensors (`params`), says which vectors it makes of them (`vectors`), and how the base runs with these
(`forward`, `generate`: they go before the embeddings of the input, unless it says otherwise). Adapters, files, tasks, rows of a
batch and threads are written once, for all of them.

Such a method is no function of any weight, so there is nothing to merge.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from inspect import Parameter, signature
from typing import Any, ClassVar

from torch import Tensor, nn

from ..core.config import PromptLearningConfig, TaskType
from ..core.param import Param
from ..formats.slots import Slot
from .inputs import before_forward, before_generate
from .prompt import Prompt


@dataclass
class PromptMethod(PromptLearningConfig):
    """The options that all methods on inputs have in common, and what each of them has to say.

    Args:
        seed: of the initial values, which depend on nothing else that is random.
    """

    seed: int | None = field(default=None, metadata={"help": "Seed of the initial values."})

    ours: ClassVar[frozenset[str]] = frozenset({"seed"})
    paper: ClassVar[str] = ""
    # Arguments of a forward pass that are the method's own, such as the task of each row.
    options: ClassVar[tuple[str, ...]] = ()
    # The loss is the method's, and not that of the base's logits and labels.
    own_loss: ClassVar[bool] = False

    # -- what it is made of --
    def prepare(self, base: nn.Module) -> None:
        """Fill in what depends on the base: its sizes.

        Raises:
            ValueError: the base cannot take prompts, or a size does not fit it.
        """
        if not self.num_virtual_tokens or self.num_virtual_tokens < 1:
            raise ValueError(f"num_virtual_tokens={self.num_virtual_tokens}: say how many virtual tokens to learn, such as 20.")
        self.check(base)
        width = self.width(base)
        if self.token_dim is None:
            self.token_dim = width
        if self.token_dim != width:
            raise ValueError(f"token_dim={self.token_dim}, but the base asks for {width}; leave it out to follow the base.")
        if self.num_transformer_submodules is None:
            self.num_transformer_submodules = 2 if self.task_type == TaskType.SEQ_2_SEQ_LM else 1
        sizes: Any = getattr(base, "config", None)
        if hasattr(sizes, "text_config"):
            sizes = sizes.text_config
        if self.num_layers is None:
            self.num_layers = getattr(sizes, "num_hidden_layers", None)
        if self.num_attention_heads is None:
            self.num_attention_heads = getattr(sizes, "num_attention_heads", None)

    def check(self, base: nn.Module) -> None:
        """
        Raises:
            ValueError: the base cannot run with the vectors.
        """
        check_takes_embeddings(base)

    def width(self, base: nn.Module) -> int:
        """The width of a virtual token in this base."""
        return embedding_width(words_of(base))

    def params(self) -> dict[str, Param]:
        """The tensors of one adapter, declared by their live names below it; axes are numbers."""
        raise NotImplementedError

    def start(self, p: Prompt, words: nn.Module) -> None:
        """Set initial values that depend on the embedding of words; called once all tensors are there, without gradients."""

    def become(self, cls: type[PromptMethod]) -> PromptMethod:
        """The same fields under the mathematics of another class."""
        other = copy.copy(self)
        other.__class__ = cls  # type: ignore[assignment]
        return other

    def settled(self) -> PromptMethod:
        """The method of an adapter that comes from a file: where files hold vectors and not the network that makes them, it
        learns the vectors themselves."""
        return self

    def loaded(self, p: Prompt) -> None:
        """Called once a file's tensors are in; sets what no file has, without gradients."""

    def slots(self, p: Prompt, live: str) -> list[Slot]:
        """The tensors by their names in a file, with ``live`` in front of their live names."""
        return p.own_slots(live)

    def in_file(self, p: Prompt) -> dict[str, Tensor]:
        """The tensors as a file has them."""
        return {slot.key: slot.tensor for slot in p.slots("")}

    # -- what it does --
    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        """What enters the model: ``(tokens, dim)``, or ``(batch, tokens, dim)`` where the options differ by row."""
        raise NotImplementedError

    def forward(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor, options: Mapping[str, Any]) -> Any:
        """The base on the caller's arguments with ``vectors (batch, tokens, dim)``."""
        return base(**before_forward(inputs, vectors, words_of(base), self.task_type))

    def generate(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor) -> Any:
        """A generation of the base with ``vectors (batch, tokens, dim)``."""
        return base.generate(**before_generate(inputs, vectors, base))  # type: ignore[operator]


def words_of(base: nn.Module) -> nn.Module:
    """The embedding of a model's input tokens."""
    return base.get_input_embeddings()  # type: ignore[operator]


def check_takes_embeddings(base: nn.Module) -> None:
    """
    Raises:
        ValueError: a model has no embedding of input tokens, or takes none in place of tokens.
    """
    name = type(base).__name__
    if not isinstance(getattr(base, "get_input_embeddings", lambda: None)(), nn.Module):
        raise ValueError(f"{name} has no embedding of input tokens, which virtual tokens would go beside.")
    taken = signature(base.forward).parameters
    if "inputs_embeds" not in taken and all(p.kind is not Parameter.VAR_KEYWORD for p in taken.values()):
        raise ValueError(f"{name}.forward takes no `inputs_embeds`, so virtual tokens cannot be put before its input.")


def embedding_width(words: nn.Module) -> int:
    width = getattr(words, "embedding_dim", None)
    return width if width is not None else words.weight.shape[-1]  # type: ignore[return-value, union-attr]
