"""The only file of training and of the command line that speaks to Inlay's adapters."""

from __future__ import annotations

import dataclasses
import re
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import PydanticUserError, TypeAdapter, ValidationError

from .errors import InputError, near_miss

ADAPTER_CONFIG = "adapter_config.json"
PLAIN_NAME = re.compile(r"[\w.]+")


def method_names() -> list[str]:
    """The adapter methods that can be trained, in lower case, sorted."""
    from inlay import PEFT_TYPE_TO_CONFIG_MAPPING

    return sorted(_key(peft_type) for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING)


def config_class(method: str) -> type[Any]:
    """The config dataclass of a method.

    Raises:
        InputError: no such method; the nearest names are in the message.
    """
    from inlay import PEFT_TYPE_TO_CONFIG_MAPPING

    classes = {_key(peft_type): cls for peft_type, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    try:
        return classes[method.lower().replace("-", "_")]
    except KeyError:
        known = sorted(classes)
        hint = near_miss(method.lower(), known) or f" Known: {', '.join(known)}."
        raise InputError(f"--method {method}: no such method.{hint}") from None


def _key(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type)).lower()


def config_fields(method: str) -> dict[str, dataclasses.Field[Any]]:
    """The fields of a method's config that a user may set, by name."""
    hidden = {"peft_type", "auto_mapping", "peft_version", "inference_mode", "base_model_name_or_path", "revision"}
    return {field.name: field for field in dataclasses.fields(config_class(method)) if field.init and field.name not in hidden}


def default_of(field: dataclasses.Field[Any]) -> Any:
    """The default value of a config's field; None for one without."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def is_switch(method: str, name: str) -> bool:
    """Whether the field is a plain yes or no, so that ``--name`` alone means yes."""
    return name in config_fields(method) and _hints(method).get(name) is bool


def _hints(method: str) -> dict[str, Any]:
    return typing.get_type_hints(config_class(method))


def build_config(method: str, given: dict[str, Any]) -> Any:
    """A config object for causal language modelling from values as typed on a command line or in YAML.

    Raises:
        InputError: a value that the field's type does not admit, or that the config itself refuses.
    """
    hints = _hints(method)
    values = {name: _read_value(name, value, hints.get(name, Any)) for name, value in given.items()}
    values.setdefault("task_type", "CAUSAL_LM")
    try:
        return config_class(method)(**values)
    except (ValueError, TypeError) as error:
        raise InputError(f"{method} config: {error}") from None


def _read_value(name: str, value: Any, hint: Any) -> Any:
    """``"8"`` -> 8, ``"q_proj,v_proj"`` -> a list where the field takes one, ``"{q_proj: 4}"`` -> a dict."""
    if isinstance(value, str):
        value = _from_text(value, hint)
    try:
        checked = TypeAdapter(hint).validate_python(value)
        return value if isinstance(value, int) and checked == value else checked  # lora_alpha: 32 is not written as 32.0
    except ValidationError as error:
        expected = "; ".join(dict.fromkeys(detail["msg"].lower() for detail in error.errors()))
        raise InputError(f"--{name.replace('_', '-')} {value}: {expected}.") from None
    except PydanticUserError:  # a hint that pydantic cannot express: the config's own check decides
        return value


def _from_text(text: str, hint: Any) -> Any:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # a regular expression, most often
    if isinstance(value, str) and _takes_list(hint):
        parts = [part.strip() for part in value.split(",")]
        if all(PLAIN_NAME.fullmatch(part) for part in parts):  # all-linear has a hyphen, a regular expression its signs
            return parts
    if isinstance(value, int) and not isinstance(value, bool) and _takes_list(hint) and not _takes(hint, int):
        return [value]
    return value


def _takes(hint: Any, kind: type) -> bool:
    return hint is kind or any(_takes(part, kind) for part in typing.get_args(hint) if typing.get_origin(hint) is not list)


def _takes_list(hint: Any) -> bool:
    return hint is list or typing.get_origin(hint) is list or any(_takes_list(part) for part in typing.get_args(hint))


def load_adapter(model: Any, folder: Path) -> Any:
    """Set a saved adapter into ``model``; the tuned model is in eval mode.

    Raises:
        InputError: the folder holds no adapter, or one for another model.
    """
    from inlay import PeftModel

    if not (folder / ADAPTER_CONFIG).is_file():
        raise InputError(f"--adapter {folder}: no {ADAPTER_CONFIG} in there; give the folder that `inlay train` wrote.")
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (ValueError, RuntimeError, KeyError) as error:
        raise InputError(f"--adapter {folder}: does not fit this model: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def parameter_table(model: Any) -> list[dict[str, Any]]:
    """Trainable parameters by kind of layer: ``[{"group", "tensors", "parameters"}, ...]``, largest first."""
    groups: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault(group_of(name), []).append(parameter.numel())
    rows = [{"group": group, "tensors": len(sizes), "parameters": sum(sizes)} for group, sizes in groups.items()]
    return sorted(rows, key=lambda row: (-row["parameters"], row["group"]))


def group_of(parameter_name: str) -> str:
    """The kind of layer an adapter's tensor sits in, without the layer's number: ``self_attn.q_proj``.

    The same for live names (``...q_proj.adapters.default.lora_A``, ``...q_proj.lora_A.default.weight``) and names in files.
    """
    path = re.sub(r"^base_model\.(model\.)?", "", parameter_name)
    path = re.split(r"\.(?:adapters|lora_|hada_|lokr_|ia3_|oft_|hra_|vera_|boft_|modules_to_save|token_adapter)", path)[0]
    after_number = re.split(r"\.\d+\.", path)[-1]
    return re.sub(r"\.(weight|bias|default)$", "", after_number)


def parameter_counts(model: Any) -> dict[str, int]:
    """``{"trainable": ..., "total": ...}``, tied weights counted once."""
    parameters = list(model.parameters())
    return {
        "trainable": sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        "total": sum(parameter.numel() for parameter in parameters),
    }


def has_own_loss(model: Any) -> bool:
    """Whether an active adapter's method says itself what the loss is."""
    return any(getattr(model.peft_config[name], "own_loss", False) for name in model.active_adapters)


def take_over_loss(model: Any) -> None:
    """The model's calls no longer add what active methods add to the loss; who makes the loss asks `added_to_loss`."""
    model.session.adds_to_loss = False


def added_to_loss(model: Any) -> Any:
    """What active methods add to the loss: a tensor, or 0."""
    from inlay.core.calls import penalties

    return penalties(model.get_base_model())


def serve_peft() -> None:
    """Let ``import peft`` mean Inlay, for transformers and TRL. Comes before their import."""
    import inlay.compat.peft  # noqa: F401
