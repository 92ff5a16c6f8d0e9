"""Inlay sets small trainable adapters flush into a large frozen PyTorch model.

Names are loaded when they are first used, so that importing the package costs nothing.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "inlay.core.config": ("PeftConfig", "PeftType", "PromptLearningConfig", "TaskType"),
    "inlay.core.method": ("METHODS", "Additive", "LowRank", "Method", "Param", "register"),
    "inlay.core.targets": ("Explanation", "NoMatchingPeftModuleError", "explain_targets"),
    "inlay.formats.state": ("AdapterMismatch", "LoadReport"),
    "inlay.model": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PeftMixedModel", "PeftModel", "PeftModelForCausalLM", "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM", "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification", "cast_mixed_precision_params", "delete_adapter", "get_peft_config", "get_peft_model",
        "get_peft_model_state_dict", "inject_adapter_in_model", "load_peft_weights", "prepare_model_for_kbit_training",
        "set_peft_model_state_dict",
    ),
    "inlay.status": ("get_layer_status", "get_model_status"),
    "inlay.auto": (
        "AutoPeftModel", "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM", "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    ),
    "inlay.methods.lora": ("LoraConfig", "LoraRuntimeConfig"),
    "inlay.methods.ia3": ("IA3Config",),
    "inlay.methods.oft": ("OFTConfig",),
    "inlay.methods.hra": ("HRAConfig",),
    "inlay.methods.vera": ("VeraConfig",),
    "inlay.methods.trainable_tokens": ("TrainableTokensConfig",),
    "inlay.prompts.prompt_tuning": ("PromptTuningConfig", "PromptTuningInit"),
}  # fmt: skip
_HOME = {name: home for home, names in _HOMES.items() for name in names}

__all__ = sorted([*_HOME, "PEFT_TYPE_TO_CONFIG_MAPPING", "__version__"])


def __getattr__(name: str) -> Any:
    if name == "PEFT_TYPE_TO_CONFIG_MAPPING":
        from . import methods, prompts  # noqa: F401
        from .core.config import CONFIGS

        return CONFIGS
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module 'inlay' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


if TYPE_CHECKING:
    from .auto import (
        AutoPeftModel,
        AutoPeftModelForCausalLM,
        AutoPeftModelForFeatureExtraction,
        AutoPeftModelForQuestionAnswering,
        AutoPeftModelForSeq2SeqLM,
        AutoPeftModelForSequenceClassification,
        AutoPeftModelForTokenClassification,
    )
    from .core.config import CONFIGS as PEFT_TYPE_TO_CONFIG_MAPPING
    from .core.config import PeftConfig, PeftType, PromptLearningConfig, TaskType
    from .core.method import METHODS, Additive, LowRank, Method, Param, register
    from .core.targets import Explanation, NoMatchingPeftModuleError, explain_targets
    from .formats.state import AdapterMismatch, LoadReport
    from .methods.hra import HRAConfig
    from .methods.ia3 import IA3Config
    from .methods.lora import LoraConfig, LoraRuntimeConfig
    from .methods.oft import OFTConfig
    from .methods.trainable_tokens import TrainableTokensConfig
    from .methods.vera import VeraConfig
    from .model import (
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
        PeftMixedModel,
        PeftModel,
        PeftModelForCausalLM,
        PeftModelForFeatureExtraction,
        PeftModelForQuestionAnswering,
        PeftModelForSeq2SeqLM,
        PeftModelForSequenceClassification,
        PeftModelForTokenClassification,
        cast_mixed_precision_params,
        delete_adapter,
        get_peft_config,
        get_peft_model,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        load_peft_weights,
        prepare_model_for_kbit_training,
        set_peft_model_state_dict,
    )
    from .prompts.prompt_tuning import PromptTuningConfig, PromptTuningInit
    from .status import get_layer_status, get_model_status
