"""Multitask prompt tuning: one prompt, scaled by a matrix of low rank for each task (arXiv 2303.02861)."""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..core.config import PeftType
from ..core.method import register
from ..core.param import Param, normal
from .generation import for_rows, generating, tokens_in
from .inputs import IGNORED_LABEL, before, before_forward, before_generate, joined, mask_before
from .method import words_of
from .prompt import Prompt
from .prompt_tuning import PromptTuningConfig


class MultitaskPromptTuningInit(enum.StrEnum):
    """What the prompt starts from: words of a text, the normal distribution, or prompts that were trained on other tasks: their
    tasks' mean, one of their tasks, or what the tasks share."""

    TEXT = "TEXT"
    RANDOM = "RANDOM"
    AVERAGE_SOURCE_TASKS = "AVERAGE_SOURCE_TASKS"
    EXACT_SOURCE_TASK = "EXACT_SOURCE_TASK"
    ONLY_SOURCE_SHARED = "ONLY_SOURCE_SHARED"


_FROM_FILE = ("AVERAGE_SOURCE_TASKS", "EXACT_SOURCE_TASK", "ONLY_SOURCE_SHARED")


@register
@dataclass
class MultitaskPromptTuningConfig(PromptTuningConfig):
    """Learn one prompt and its scales for each task; each row of a batch says its task by ``task_ids``. An encoder-decoder model
    has virtual tokens before the encoder's input and, with two submodules, before the decoder's.

    Args:
        prompt_tuning_init: one of `MultitaskPromptTuningInit`.
        prompt_tuning_init_state_dict_path: the file of the source's tensors.
        prompt_tuning_init_task: which of the source's tasks to start from.
        num_ranks: the rank of the scales.
        num_tasks: how many tasks.

    Raises:
        ValueError: options contradict each other.
    """

    peft_type: str | None = PeftType.MULTITASK_PROMPT_TUNING
    prompt_tuning_init: MultitaskPromptTuningInit | str = field(  # type: ignore[assignment]
        default=MultitaskPromptTuningInit.RANDOM, metadata={"help": f"{', '.join(MultitaskPromptTuningInit)}."}
    )
    prompt_tuning_init_state_dict_path: str | None = field(default=None, metadata={"help": "The file of the source's tensors."})
    prompt_tuning_init_task: int | None = field(default=0, metadata={"help": "The task of the source to start from."})
    num_ranks: int | None = field(default=1, metadata={"help": "The rank of the scales."})
    num_tasks: int | None = field(default=1, metadata={"help": "The number of tasks."})

    paper: ClassVar[str] = "2303.02861"
    options: ClassVar[tuple[str, ...]] = ("task_ids",)
    inits: ClassVar[type[enum.StrEnum]] = MultitaskPromptTuningInit

    def params(self) -> dict[str, Param]:
        tasks, rank, dim = self.num_tasks or 1, self.num_ranks or 1, self.token_dim or 0
        found = super().params()
        tokens = found["embedding.weight"].axes[0]
        return found | {
            "prefix_task_cols": Param((tasks, tokens, rank), normal(0.02)),
            "prefix_task_rows": Param((tasks, rank, dim), normal(0.02)),
        }

    def start(self, p: Prompt, words: nn.Module) -> None:
        if self.prompt_tuning_init not in _FROM_FILE or self.inference_mode:
            super().start(p, words)
            return
        source = _read(self.prompt_tuning_init_state_dict_path, str(self.prompt_tuning_init))
        values = {"embedding.weight": source["prompt_embeddings"]}
        for name in ("prefix_task_cols", "prefix_task_rows"):
            if self.prompt_tuning_init == MultitaskPromptTuningInit.AVERAGE_SOURCE_TASKS:
                values[name] = source[name].mean(0, keepdim=True)
            elif self.prompt_tuning_init == MultitaskPromptTuningInit.EXACT_SOURCE_TASK:
                values[name] = source[name][self.prompt_tuning_init_task or 0][None]
        for name, value in values.items():
            own = p.get_parameter(name)
            # One task of the source is where all of ours start.
            if own.shape[-2:] != value.shape[-2:]:
                raise ValueError(
                    f"{self.prompt_tuning_init_state_dict_path} has {name} of {tuple(value.shape)}, and this adapter {tuple(own.shape)}; "
                    "`num_virtual_tokens`, `num_ranks` and the base must be the source's."
                )
            own.copy_(value)

    def vectors(self, p: Prompt, options: Mapping[str, Any]) -> Tensor:
        tasks = options.get("task_ids")
        if tasks is None and self.num_tasks == 1:
            # All rows are of the one task.
            return self.vectors(p, {"task_ids": torch.zeros(1, dtype=torch.long)})[0]
        if tasks is None:
            raise ValueError(
                f"{self.peft_type} needs `task_ids`, the task of each row: a tensor of {self.num_tasks} numbers at most, from 0."
            )
        embedding = p.get_parameter("embedding.weight")
        tasks = tasks.to(embedding.device)
        scales = p.get_parameter("prefix_task_cols")[tasks] @ p.get_parameter("prefix_task_rows")[tasks]
        prompts = embedding * scales
        # Those of the decoder go beside those of the encoder, so that prompts can follow each other.
        return torch.cat(prompts.split(self.num_virtual_tokens or 0, 1), -1)

    def forward(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor, options: Mapping[str, Any]) -> Any:
        if not self._before_decoder:
            return super().forward(base, inputs, vectors[..., : self.token_dim], options)
        words = words_of(base)
        encoder, decoder = vectors.split(self.token_dim or 0, -1)
        inputs = before_forward(inputs, encoder, words, self.task_type)
        if tokens_in(inputs.get("past_key_values")):
            return base(**inputs)
        n, labels = vectors.shape[1], inputs.get("labels")
        ids, embeds = inputs.pop("decoder_input_ids", None), inputs.pop("decoder_inputs_embeds", None)
        if embeds is None:
            if ids is None and labels is None:
                raise ValueError("Virtual tokens go before the decoder's input: give `labels` or `decoder_input_ids`.")
            embeds = words(ids if ids is not None else base.prepare_decoder_input_ids_from_labels(labels))  # type: ignore[operator]
        if labels is not None:
            inputs["labels"] = before(labels, n, IGNORED_LABEL)
        if inputs.get("decoder_attention_mask") is not None:
            inputs["decoder_attention_mask"] = before(inputs["decoder_attention_mask"], n, 1)
        return base(**inputs, decoder_inputs_embeds=joined(decoder, embeds))

    def generate(self, base: nn.Module, inputs: dict[str, Any], vectors: Tensor) -> Any:
        encoder = vectors[..., : self.token_dim]
        if not self._before_decoder:
            return super().generate(base, inputs, encoder)
        words, n, decoder = words_of(base), vectors.shape[1], vectors[..., self.token_dim :]

        def prepare(own: Callable[..., dict[str, Any]], input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
            if kwargs.get("decoder_attention_mask") is not None:
                kwargs["decoder_attention_mask"] = mask_before(kwargs["decoder_attention_mask"], n, begun=True, causal=True)
            fresh = not kwargs.get("use_cache", True) or not tokens_in(kwargs.get("past_key_values"))
            if not fresh:
                return own(input_ids, **kwargs)
            if kwargs.get("next_sequence_length") is not None:
                kwargs["next_sequence_length"] += n
            # The base counts tokens for its masks; those in the place of virtual ones are not looked at.
            inputs = own(before(input_ids, n, 0), **kwargs)
            del inputs["decoder_input_ids"]
            inputs["decoder_inputs_embeds"] = joined(for_rows(decoder, len(input_ids)), words(input_ids))
            return inputs

        model: Any = generating(base, n, prepare)
        return model.generate(**before_generate(inputs, encoder, base))

    @property
    def _before_decoder(self) -> bool:
        return self.task_type == "SEQ_2_SEQ_LM" and self.num_transformer_submodules == 2


def _read(path: str | None, init: str) -> dict[str, Tensor]:
    if path is None:
        raise ValueError(f"prompt_tuning_init={init!r} needs `prompt_tuning_init_state_dict_path`.")
    if path.endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)
