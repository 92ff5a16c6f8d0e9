"""Base models and tokenizers: found, checked, loaded in the right type on the right device."""

from __future__ import annotations

import sys
from importlib import resources
from pathlib import Path
from typing import Any

from .errors import InputError, near_miss
from .settings import BUNDLED


def bundled_base() -> Path:
    """The folder of the small model inside the package."""
    return Path(str(resources.files("inlay") / "assets" / "base"))


def bundled_data(name: str) -> Path:
    """A data file inside the package: ``commands`` or ``commands_heldout``."""
    return Path(str(resources.files("inlay") / "assets" / "data" / f"{name}.jsonl"))


def locate(model: str) -> str:
    """The folder or hub id to load.

    Raises:
        InputError: it looks like a path and is not a model folder.
    """
    if model == BUNDLED:
        return str(bundled_base())
    path = Path(model).expanduser()
    if path.is_dir():
        if (path / "config.json").is_file():
            return str(path)
        if (path / "adapter_config.json").is_file():
            raise InputError(f"--model {model}: this is an adapter; give its base model here and the adapter with --adapter.")
        raise InputError(f"--model {model}: no config.json in this folder, so it is no model.")
    looks_like_path = model.startswith((".", "/", "~")) or model.count("/") > 1 or (path.parent.is_dir() and str(path.parent) != ".")
    if looks_like_path:
        siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
        raise InputError(f"--model {model}: no such folder.{near_miss(path.name, siblings)}")
    return model


def choose_device(wanted: str) -> str:
    """``cuda``, ``mps`` or ``cpu``.

    Raises:
        InputError: the device that was asked for is not there.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        return next(device for device, there in present.items() if there)
    if not present[wanted]:
        raise InputError(f"--device {wanted}: not available here; use --device cpu or auto.")
    return wanted


def choose_dtype(wanted: str, device: str) -> Any:
    """The torch dtype of the base weights: float32, unless asked otherwise or on a GPU that computes bfloat16."""
    import torch

    if wanted == "auto":
        return torch.bfloat16 if device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if wanted == "float16" and device == "cpu":
        raise InputError("--dtype float16: too slow and too coarse on a CPU; use float32 or bfloat16.")
    return getattr(torch, wanted)


def choose_quantization(wanted: str) -> str:
    """``none`` or a format.

    Raises:
        InputError: it is neither.
    """
    from inlay.kernels.quantised import FORMATS

    known = ["none", *FORMATS]
    if wanted not in known:
        raise InputError(f"--quantization {wanted}: give {', '.join(known)}.{near_miss(wanted, known)}")
    return wanted


def load_model(
    model: str,
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    place: bool = True,
    quantization: str = "none",
    as_stored: bool = False,
    **quantizing: Any,
) -> Any:
    """A causal language model in eval mode.

    Args:
        place: move it to the device now; a trainer that places models itself says False.
        quantization: the format of its linear layers (see `inlay.quantize_`), or ``"none"``.
        as_stored: ``auto`` is the dtype that the model's config or files have, and not one to compute in here.
        quantizing: further options of `inlay.from_pretrained_quantized`.

    Raises:
        InputError: missing, not a causal language model, or unreadable.
    """
    where = choose_device(device)
    torch_dtype = dtype if as_stored and dtype == "auto" else choose_dtype(dtype, where)
    from transformers import AutoModelForCausalLM

    source = locate(model)
    try:
        if quantization == "none" and not _quantised_already(source):
            loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch_dtype, trust_remote_code=trust_remote_code)
        else:
            from inlay.quantize import from_pretrained_quantized

            to = None if quantization == "none" else quantization
            loaded = from_pretrained_quantized(source, to, dtype=torch_dtype, trust_remote_code=trust_remote_code, **quantizing)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {model}: {_why_not(error, model)}") from error
    loaded.eval()
    return loaded.to(where) if place else loaded


def _quantised_already(source: str) -> bool:
    """Whether the files hold weights in a format that Inlay reads by itself."""
    from transformers import PretrainedConfig

    stored = PretrainedConfig.get_config_dict(source)[0].get("quantization_config") or {}
    return stored.get("quant_method") in ("bitsandbytes", "inlay")


def load_config(model: str, trust_remote_code: bool = False) -> Any:
    """The model's config; ``model`` may also be the file itself.

    Raises:
        InputError: it cannot be read.
    """
    from transformers import AutoConfig

    source = model if Path(model).is_file() else locate(model)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"--model {model}: {_why_not(error, model)}") from error


def context_length(model: str, trust_remote_code: bool = False) -> int:
    """The most tokens the model was made for; a very large number when its config does not say.

    Raises:
        InputError: its config cannot be read.
    """
    return positions(load_config(model, trust_remote_code))


def positions(config: Any) -> int:
    """The most tokens a model with this config was made for; a very large number when the config does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize


def load_tokenizer(model: str, adapter: Path | None = None, trust_remote_code: bool = False) -> Any:
    """The tokenizer, with a padding token. One beside the adapter comes first: it has the chat template that was trained on.

    Raises:
        InputError: no tokenizer there.
    """
    from transformers import AutoTokenizer

    beside = adapter is not None and (adapter / "tokenizer_config.json").is_file()
    source = str(adapter) if beside else locate(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise InputError(f"--model {model}: its tokenizer cannot be loaded: {_why_not(error, model)}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise InputError(f"--model {model}: its tokenizer has neither a padding nor an end token; add one to tokenizer_config.json.")
    return tokenizer


def _why_not(error: Exception, model: str) -> str:
    text = " ".join(str(error).split())
    if "not a local folder" in text or "couldn't connect" in text.lower() or "offline" in text.lower():
        return "neither a folder here nor in the local hub cache, and the hub cannot be reached or does not know it. Check the spelling."
    if "Unrecognized configuration class" in text:
        return "not a causal language model, so it cannot be trained on text answers."
    return text if len(text) <= 300 else text[:300] + "..."


def adapter_base(adapter: Path) -> str | None:
    """The base model that an adapter folder names."""
    import json

    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"--adapter {adapter}: no adapter_config.json in there; give the folder that `inlay train` wrote.") from None
    except ValueError:
        raise InputError(f"--adapter {adapter}: adapter_config.json is not valid JSON.") from None
    return config.get("base_model_name_or_path")
