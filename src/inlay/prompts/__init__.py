"""Methods that act on the inputs of the whole model. One file a method; importing this package registers them all."""

from __future__ import annotations

from . import cartridge, cpt, multitask, p_tuning, prefix_tuning, prompt_tuning
from .adapters import attach_prompt, load_prompt, prompt_tensors, show_trainable
from .method import PromptMethod
from .prompt import Prompt
from .running import forward_with_prompt, generate_with_prompt

__all__ = [
    "Prompt",
    "PromptMethod",
    "attach_prompt",
    "cartridge",
    "cpt",
    "forward_with_prompt",
    "generate_with_prompt",
    "load_prompt",
    "multitask",
    "p_tuning",
    "prefix_tuning",
    "prompt_tensors",
    "prompt_tuning",
    "show_trainable",
]
