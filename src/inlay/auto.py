"""Base and adapter in one call, from the adapter's folder alone."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from .core.config import PeftConfig, nearest
from .formats.folder import hub_options
from .model import (
    PeftModel,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

# Libraries whose classes an adapter's file may name as its base; nothing else is ever imported because a file asks for it.
TRUSTED_LIBRARIES = ("transformers", "diffusers", "sentence_transformers")

AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}


class AutoPeftModel:
    """Loads the base that an adapter's file names, and the adapter into it."""

    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel
    _task: ClassVar[str | None] = None

    def __init__(self, *_: Any, **__: Any) -> None:
        raise OSError(f"{type(self).__name__} is made by {type(self).__name__}.from_pretrained(path).")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        quantization: str | Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """
        Args:
            pretrained_model_name_or_path: the adapter's folder or repository.
            adapter_name: what to call the adapter.
            is_trainable: train it; else it is frozen.
            config: a configuration in place of the file's.
            revision: the adapter's revision on a hub.
            quantization: ``"nf4"``, ``"fp4"``, ``"int4"`` or ``"int8"`` for the base, or a mapping with ``to`` and further options of
                `inlay.from_pretrained_quantized`; each tensor is quantised as it is read.
            kwargs: for the base's ``from_pretrained`` (``dtype``, ``device_map``, ...), and ``subfolder``, ``strict``,
                ``allow_pickle`` for the adapter.

        Raises:
            ValueError: the file does not say what its base is, or is of another task than this class; the quantisation is unknown.
        """
        own = {k: kwargs.pop(k) for k in ("subfolder", "strict", "allow_pickle") if k in kwargs}
        hub = hub_options(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(pretrained_model_name_or_path, subfolder=own.get("subfolder"), revision=revision, **hub)
        if not config.base_model_name_or_path:
            raise ValueError(
                f"{pretrained_model_name_or_path} does not name its base model; load the base and use PeftModel.from_pretrained."
            )
        task = str(config.task_type) if config.task_type is not None else None
        if cls._task is not None and task is not None and task != cls._task:
            raise ValueError(f"The adapter is for the task {task}, not {cls._task}; use AutoPeftModel, which goes by the file.")
        base_class = _base_class(cls._task or task, config)
        source, kwargs = config.base_model_name_or_path, {"revision": config.revision} | kwargs
        base = (
            base_class.from_pretrained(source, **kwargs) if quantization is None else _quantized(base_class, source, quantization, kwargs)
        )
        _fit_vocabulary(base, Path(pretrained_model_name_or_path))
        return cls._target_peft_class.from_pretrained(
            base, pretrained_model_name_or_path, adapter_name, is_trainable, config, revision=revision, **own, **hub
        )


def _base_class(task: str | None, config: PeftConfig) -> Any:
    if task is not None:
        return getattr(importlib.import_module("transformers"), AUTO_CLASSES[task])
    mapping = config.auto_mapping or {}
    library, name = str(mapping.get("parent_library", "")), str(mapping.get("base_model_class", ""))
    if library.partition(".")[0] not in TRUSTED_LIBRARIES or not name.isidentifier():
        raise ValueError(
            f"The adapter has no task_type and its base is {library + '.' + name if name else 'not named'}; "
            "load the base yourself and use PeftModel.from_pretrained."
        )
    return getattr(importlib.import_module(library), name)


def _quantized(base_class: Any, source: str, quantization: str | Mapping[str, Any], kwargs: dict[str, Any]) -> Any:
    from .quantize import from_pretrained_quantized

    options = {"to": quantization} if isinstance(quantization, str) else dict(quantization)
    known = ("to", "skip", "double", "block", "compute_dtype")
    if unknown := [name for name in options if name not in known]:
        raise ValueError(f"quantization has {unknown[0]!r}; its options are {', '.join(known)}.{nearest(unknown[0], known)}")
    return from_pretrained_quantized(source, auto_class=base_class, **options, **kwargs)


def _fit_vocabulary(base: Any, folder: Path) -> None:
    """Make room for tokens that were added with the adapter, where its folder has a tokenizer with more than the base knows."""
    if not (folder / "tokenizer_config.json").is_file() or not hasattr(base, "resize_token_embeddings"):
        return
    tokenizer = importlib.import_module("transformers").AutoTokenizer.from_pretrained(folder)
    if len(tokenizer) > base.get_input_embeddings().weight.shape[0]:
        base.resize_token_embeddings(len(tokenizer))


class AutoPeftModelForCausalLM(AutoPeftModel):
    _target_peft_class = PeftModelForCausalLM
    _task = "CAUSAL_LM"


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    _target_peft_class = PeftModelForSeq2SeqLM
    _task = "SEQ_2_SEQ_LM"


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    _target_peft_class = PeftModelForSequenceClassification
    _task = "SEQ_CLS"


class AutoPeftModelForTokenClassification(AutoPeftModel):
    _target_peft_class = PeftModelForTokenClassification
    _task = "TOKEN_CLS"


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    _target_peft_class = PeftModelForQuestionAnswering
    _task = "QUESTION_ANS"


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    _target_peft_class = PeftModelForFeatureExtraction
    _task = "FEATURE_EXTRACTION"
