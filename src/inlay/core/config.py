"""What every configuration of HF peft can do: to a dictionary and back, to a folder and back, checked field by field."""

from __future__ import annotations

import difflib
import enum
import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

# The version of HF peft whose names, files and numbers this package speaks.
PEFT_VERSION = "0.21.2"


class PeftType(str, enum.Enum):
    """The names of the methods in ``adapter_config.json``."""

    PROMPT_TUNING = "PROMPT_TUNING"
    MULTITASK_PROMPT_TUNING = "MULTITASK_PROMPT_TUNING"
    P_TUNING = "P_TUNING"
    PREFIX_TUNING = "PREFIX_TUNING"
    LORA = "LORA"
    ADALORA = "ADALORA"
    BOFT = "BOFT"
    ADAPTION_PROMPT = "ADAPTION_PROMPT"
    IA3 = "IA3"
    LOHA = "LOHA"
    LOKR = "LOKR"
    OFT = "OFT"
    POLY = "POLY"
    LN_TUNING = "LN_TUNING"
    VERA = "VERA"
    FOURIERFT = "FOURIERFT"
    XLORA = "XLORA"
    HRA = "HRA"
    VBLORA = "VBLORA"
    CPT = "CPT"
    BONE = "BONE"
    MISS = "MISS"
    RANDLORA = "RANDLORA"
    ROAD = "ROAD"
    TRAINABLE_TOKENS = "TRAINABLE_TOKENS"
    SHIRA = "SHIRA"
    C3A = "C3A"
    WAVEFT = "WAVEFT"
    OSF = "OSF"
    DELORA = "DELORA"
    GRALORA = "GRALORA"
    CARTRIDGE = "CARTRIDGE"
    ADAMSS = "ADAMSS"
    PVERA = "PVERA"
    PSOFT = "PSOFT"
    LILY = "LILY"
    PEANUT = "PEANUT"
    TINYLORA = "TINYLORA"
    BEFT = "BEFT"
    HIRA = "HIRA"
    GLORA = "GLORA"
    FROD = "FROD"
    UNILORA = "UNILORA"
    DEFT = "DEFT"
    SUPERTUNING = "SUPERTUNING"
    SHADOW = "SHADOW"

    __str__ = str.__str__


class TaskType(str, enum.Enum):
    """What the base model is for; it chooses the class that `get_peft_model` returns."""

    SEQ_CLS = "SEQ_CLS"
    SEQ_2_SEQ_LM = "SEQ_2_SEQ_LM"
    CAUSAL_LM = "CAUSAL_LM"
    TOKEN_CLS = "TOKEN_CLS"
    QUESTION_ANS = "QUESTION_ANS"
    FEATURE_EXTRACTION = "FEATURE_EXTRACTION"

    __str__ = str.__str__


def nearest(word: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for a near miss, else an empty string."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""


CONFIGS: dict[str, type[PeftConfig]] = {}
# HF's name for it.
PEFT_TYPE_TO_CONFIG_MAPPING = CONFIGS


def config_class(peft_type: str) -> type[PeftConfig]:
    """The configuration class of a method's name as in a file.

    Raises:
        ValueError: no such method is registered.
    """
    from .. import methods, prompts  # noqa: F401  registering is their import

    found = CONFIGS.get(str(peft_type))
    if found is None:
        raise ValueError(f"Unknown peft_type {str(peft_type)!r}.{nearest(str(peft_type), CONFIGS)} Known: {', '.join(sorted(CONFIGS))}.")
    return found


@dataclass
class PeftConfig:
    """What every configuration holds.

    Args:
        task_type: one of `TaskType`, or None.
        peft_type: the method's name; set by the class.
        auto_mapping: for models of no known task, the class and library of the base.
        peft_version: the version of the file format.
        base_model_name_or_path: where the base came from.
        revision: the base's revision on a hub.
        inference_mode: the adapter was saved for inference; loading it does not make it trainable.

    Raises:
        ValueError: the task type is unknown, or an option is out of the range that its field declares.
    """

    task_type: str | None = field(default=None, metadata={"help": "The type of task."})
    peft_type: str | None = field(default=None, metadata={"help": "The method's name in a file."})
    auto_mapping: dict[str, Any] | None = field(default=None, metadata={"help": "Class and library of a base of no known task."})
    peft_version: str | None = field(default=None, metadata={"help": "The version of the file format."})
    base_model_name_or_path: str | None = field(default=None, metadata={"help": "Where the base model came from."})
    revision: str | None = field(default=None, metadata={"help": "The base model's revision on a hub."})
    inference_mode: bool = field(default=False, metadata={"help": "Load the adapter frozen."})

    # Fields of ours that HF's class of this method lacks; they are written to a file only where they are set. A field that no
    # class of HF has says so itself, by ``ours`` in its metadata.
    ours: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        if self.task_type is not None and self.task_type not in list(TaskType):
            known = [t.value for t in TaskType]
            raise ValueError(f"Invalid task type: {self.task_type!r}.{nearest(str(self.task_type), known)} Known: {', '.join(known)}.")
        if self.peft_type in list(PeftType):
            # Files have the bare name; others ask for `peft_type.value`.
            self.peft_type = PeftType(self.peft_type)
        if self.peft_version is None:
            self.peft_version = PEFT_VERSION
        for f in fields(self):
            self._check(f.name, getattr(self, f.name), f.metadata)

    def _check(self, name: str, value: Any, said: Mapping[str, Any]) -> None:
        """By what its field's metadata say: ``positive`` (an integer, if set), ``share`` (in [0, 1)), ``known`` (the names there are)."""
        if said.get("share") and not 0 <= value < 1:
            raise ValueError(f"`{name}` is a share in [0, 1), not {value!r}.")
        if said.get("positive") and value is not None and not (type(value) is int and value > 0):
            raise ValueError(f"`{name}` should be a positive integer, not {value!r}.")
        if "known" in said and value not in said["known"]:
            known = [str(one) for one in said["known"]]
            raise ValueError(f"Unknown {name}={value!r}.{nearest(str(value), known)} Known: {', '.join(known)}.")

    @property
    def is_prompt_learning(self) -> bool:
        return False

    @property
    def is_adaption_prompt(self) -> bool:
        return False

    @classmethod
    def field_names(cls) -> list[str]:
        return [f.name for f in fields(cls)]

    def to_dict(self) -> dict[str, Any]:
        """All fields; ``type(config)(**config.to_dict())`` gives an equal configuration."""
        from dataclasses import asdict

        return asdict(self)

    def to_file(self) -> dict[str, Any]:
        """The fields as ``adapter_config.json`` holds them: sets sorted, fields that HF does not know only where set, and none
        that is for this session alone (``in_file`` of its metadata)."""
        plain = {}
        for f in fields(self):
            value = getattr(self, f.name)
            ours = f.name in self.ours or f.metadata.get("ours", False)
            if f.metadata.get("in_file") is False or (ours and value == _default(f)):
                continue
            plain[f.name] = value
        return _jsonable(plain)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` into a folder, atomically."""
        from ..formats.folder import CONFIG_NAME, write_json

        plain = self.to_file()
        if kwargs.get("auto_mapping_dict") is not None:
            plain["auto_mapping"] = kwargs["auto_mapping_dict"]
        write_json(Path(save_directory) / CONFIG_NAME, plain)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], subfolder: str | None = None, **kwargs: Any) -> Self:
        """Read a configuration from a folder or a hub repository, into the class that its ``peft_type`` names.

        Raises:
            ValueError: there is no readable ``adapter_config.json``, or its method is unknown.
        """
        from ..formats.folder import CONFIG_NAME, hub_options, locate, read_json

        path = locate(pretrained_model_name_or_path, CONFIG_NAME, subfolder=subfolder, **hub_options(kwargs))
        plain = read_json(path)
        if isinstance(plain.get("tokenizer_kwargs"), dict) and plain["tokenizer_kwargs"].pop("trust_remote_code", None):
            warnings.warn(
                f"{path} asks to trust code that comes with a tokenizer. Only you can: set `tokenizer_kwargs` yourself.", stacklevel=2
            )
        found = cls.from_peft_type(**plain)
        found.read_from(path.parent)
        return found

    def read_from(self, folder: Path) -> None:
        """Called with the folder that the configuration was read from."""

    @classmethod
    def from_json_file(cls, path_json_file: str | Path, **kwargs: Any) -> dict[str, Any]:
        from ..formats.folder import read_json

        return read_json(Path(path_json_file))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> Self:
        """A configuration from the fields of a file. Fields of a later version are left out with a warning that names them."""
        chosen = config_class(kwargs["peft_type"]) if kwargs.get("peft_type") else cls
        known = set(chosen.field_names())
        unknown = sorted(set(kwargs) - known - {"runtime_config"})
        if unknown:
            warnings.warn(f"{chosen.__name__} does not know {unknown}; these fields of the file are ignored.", stacklevel=3)
        return chosen(**{k: v for k, v in kwargs.items() if k in known})  # type: ignore[return-value]

    @classmethod
    def _get_peft_type(cls, model_id: str, **hub: Any) -> str:
        return str(PeftConfig.from_pretrained(model_id, **hub).peft_type)


# HF peft has the same class under a second name.
PeftConfigMixin = PeftConfig


@dataclass
class PromptLearningConfig(PeftConfig):
    """The configuration of methods that act on the inputs of the whole model.

    Args:
        num_virtual_tokens: how many learned tokens go before the input.
        token_dim, num_transformer_submodules, num_attention_heads, num_layers: the base's sizes, read from it where None.
        modules_to_save: modules to retrain and save as a whole.
    """

    num_virtual_tokens: int | None = field(default=None, metadata={"help": "Number of virtual tokens."})
    token_dim: int | None = field(default=None, metadata={"help": "The base model's hidden size."})
    num_transformer_submodules: int | None = field(default=None, metadata={"help": "1, or 2 for an encoder-decoder model."})
    num_attention_heads: int | None = field(default=None, metadata={"help": "The base model's attention heads."})
    num_layers: int | None = field(default=None, metadata={"help": "The base model's layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to retrain and save as a whole."})

    @property
    def is_prompt_learning(self) -> bool:
        return True


def _default(f: Any) -> Any:
    from dataclasses import MISSING

    return f.default if f.default is not MISSING else f.default_factory()


def _jsonable(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _jsonable(v) for k, v in value.items()}
    if isinstance(value, (set, frozenset)):
        return sorted(map(_jsonable, value))
    if isinstance(value, (list, tuple)):
        return [_jsonable(v) for v in value]
    if isinstance(value, enum.Enum):
        return value.value
    if hasattr(value, "__dataclass_fields__"):
        return {f.name: _jsonable(getattr(value, f.name)) for f in fields(value)}
    return value
