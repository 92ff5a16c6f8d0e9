"""Quantised models without a backend: weights in 4 or 8 bits in the modules, under the names and in the files that there are.

A layer keeps its class and its forward; its weight becomes a `QuantizedTensor`, which looks like the one before. State dicts and
files have bitsandbytes' names and numbers for linear layers, so that either library reads the other's models.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .core.config import nearest
from .core.inlaid import Inlaid
from .core.site import Embedding, Linear, TransposedLinear, site_of
from .kernels.quantised import FORMATS, check
from .kernels.quantised_tensor import QuantizedTensor

Model = TypeVar("Model", bound=nn.Module)
# How the keys of a weight in 4 bits end, beside its codes.
STATES = ("bitsandbytes__nf4", "bitsandbytes__fp4", "inlay__int4")
ENDS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *(f"quant_state.{state}" for state in STATES))


# ---- which weights ----------------------------------------------------------------------------------------------------------------
def quantizable(model: nn.Module, skip: Collection[str] | None = None) -> dict[str, bool]:
    """The parameters that can be quantised, by name, and whether the layer keeps them as ``(in, out)``.

    Args:
        skip: names of modules or parameters, or their ends, or regular expressions for all of them, that stay as they are. Where
            None, the embeddings and the heads (of tokens or of a task) stay.

    Raises:
        ValueError: a name to skip fits nothing.
    """
    found: dict[str, bool] = {}
    for path, module in model.named_modules():
        site = None if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear) else site_of(module)
        if isinstance(site, (Linear, TransposedLinear)) and type(site) in (Linear, TransposedLinear, Embedding):
            names = {"weight": type(site) is TransposedLinear}
        elif site is None:
            names = {n: False for n, q in module._parameters.items() if q is not None and q.ndim == 3}
        else:
            continue
        for name, transposed in names.items():
            q = module._parameters.get(name)
            if q is not None and q.is_floating_point() and q.dtype.itemsize > 1:
                found[f"{path}.{name}" if path else name] = transposed
    left = _heads(model) if skip is None else {n for n in found if any(_fits(pattern, n) for pattern in skip)}
    for pattern in skip or ():
        if not any(_fits(pattern, n) for n, _ in [*model.named_parameters(remove_duplicate=False), *model.named_modules()]):
            raise ValueError(f"skip={pattern!r} fits no module and no parameter.{nearest(pattern, [n for n, _ in model.named_modules()])}")
    return {n: t for n, t in found.items() if n not in left}


def _fits(pattern: str, name: str) -> bool:
    return re.fullmatch(rf"(.*\.)?({pattern})(\..*)?", name) is not None


def _heads(model: nn.Module) -> set[str]:
    """Weights that look tokens up, give logits, or stand for a task beside the model's body."""
    body = getattr(model, "base_model", model)
    inside = {id(m) for m in body.modules()} if isinstance(body, nn.Module) and body is not model else None
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # type: ignore[operator]
    return {
        f"{path}.weight" if path else "weight"
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding) or (module is head and head is not None) or (inside is not None and id(module) not in inside)
    }


# ---- in place ---------------------------------------------------------------------------------------------------------------------
@torch.no_grad()
def quantize_(
    model: Model,
    to: str = "nf4",
    *,
    skip: Collection[str] | None = None,
    double: bool = True,
    block: int = 64,
    compute_dtype: torch.dtype | None = None,
) -> Model:
    """Quantise the weights of linear layers (GPT-2's too), embeddings and stacks of experts, in place.

    Each weight is freed once it is quantised. Quantised weights are frozen; adapters of any method can be set on them.

    Args:
        to: ``"nf4"``, ``"fp4"``, ``"int4"`` (blocks with a scale each), or ``"int8"`` (rows with a scale each).
        skip: modules or parameters that stay, by name, end of a name, or regular expression; ``[]`` quantises all that can be. Where
            None, the embeddings and the heads (of tokens or of a task) stay.
        double: quantise the scales as well, to 8 bits.
        block: numbers that share a scale.
        compute_dtype: the dtype of the products, where it is not the weight's own.

    Returns:
        The model.

    Raises:
        ValueError: the format or the block is unknown, a name to skip fits nothing, or the model has adapters.
    """
    check(to, block)
    if any(isinstance(m, Inlaid) for m in model.modules()):
        raise ValueError("The model has adapters, which were made for its weights as they are; quantise it first and adapt it then.")
    # Tied weights stay tied: a weight is kept until all its owners have the new one.
    owners: dict[int, list[tuple[nn.Module, str, bool]]] = {}
    wanted = quantizable(model, skip)
    for name, transposed in wanted.items():
        module, end = _owner(model, name)
        owners.setdefault(id(module._parameters[end]), []).append((module, end, transposed))
    for places in owners.values():
        module, end, transposed = places[0]
        w: Any = module._parameters[end]
        new = QuantizedTensor.of(w, to, block=block, double=double, transposed=transposed, compute_dtype=compute_dtype)
        parameter = nn.Parameter(new, requires_grad=False)
        del w
        for module, end, _ in places:
            module._parameters[end] = parameter
            _speak(module)
    _describe(model, to, wanted, double)
    return model


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, end = name.rpartition(".")
    return model.get_submodule(path), end


def dequantize_(model: Model) -> Model:
    """Give quantised weights back as floating-point parameters, in place; they stay frozen.

    Returns:
        The model.
    """
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        dequantize_module(module, made)
    config = getattr(model, "config", None)
    if getattr(config, "quantization_config", None) is not None:
        del config.quantization_config  # type: ignore[union-attr]
    model.__dict__.pop("_weight_conversions", None)
    return model


def dequantize_module(module: nn.Module, made: dict[int, nn.Parameter] | None = None) -> None:
    """One module's own weights."""
    made = {} if made is None else made
    for name, q in module._parameters.items():
        if isinstance(q, QuantizedTensor):
            if id(q) not in made:
                made[id(q)] = nn.Parameter(q.detach().dequantize().contiguous(), requires_grad=False)
            module._parameters[name] = made[id(q)]
    hush_module(module)


def hush_module(module: nn.Module) -> None:
    """Have a module whose weights are all dense write and read them as any module does."""
    if _own(module):
        return
    for table, hook in ((module._state_dict_hooks, _write), (module._load_state_dict_pre_hooks, _read)):
        for key in [k for k, h in table.items() if getattr(h, "hook", h) is hook]:
            del table[key]


# ---- state dicts ------------------------------------------------------------------------------------------------------------------
def _speak(module: nn.Module) -> None:
    """Have a module write and read its quantised weights in state dicts."""
    if _write not in module._state_dict_hooks.values():
        module.register_state_dict_post_hook(_write)
        module.register_load_state_dict_pre_hook(_read)


def _own(module: nn.Module) -> dict[str, QuantizedTensor]:
    return {n: q for n, q in module._parameters.items() if isinstance(q, QuantizedTensor)}


def _key(prefix: str, name: str, end: str) -> str:
    if not end:
        return prefix + name
    return f"{prefix}{end}" if name == "weight" and end in ("SCB", "weight_format") else f"{prefix}{name}.{end}"


def _write(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    for name, q in _own(module).items():
        if prefix + name in state:
            state.update({_key(prefix, name, end): t for end, t in q.to_file().items()})


def _read(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    for name, q in _own(module).items():
        given = collected(state, prefix, name)
        if len(given) < 2:
            continue
        for end in given:
            del state[_key(prefix, name, end)]
        new = QuantizedTensor.from_file(given, q.transposed, q.dtype, q.compute_dtype)
        state[prefix + name] = new
        if new.__tensor_flatten__() != q.__tensor_flatten__():
            # Of another format: the module takes it as it is.
            module._parameters[name] = nn.Parameter(new.clone(), requires_grad=False)


def collected(state: Mapping[str, Tensor], prefix: str, name: str) -> dict[str, Tensor]:
    """What a state dict has of one weight, by the ends of the keys."""
    ends = {"": prefix + name} | {end: _key(prefix, name, end) for end in ("SCB", "weight_format")}
    start = f"{prefix}{name}."
    found = {end: state[key] for end, key in ends.items() if key in state}
    return found | {key.removeprefix(start): t for key, t in state.items() if key.startswith(start)}


# ---- transformers -----------------------------------------------------------------------------------------------------------------
def _keep_keys(model: nn.Module, names: Collection[str]) -> None:
    """Have transformers save what is quantised under the model's own names.

    Its conversions for saving take stacks of experts and joined matrices apart into those of older files, which codes and scales
    do not allow.
    """
    loading: Any = sys.modules.get("transformers.core_model_loading")
    if loading is None:
        return
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        from transformers.conversion_mapping import get_model_conversion_mapping

        conversions = get_model_conversion_mapping(model, add_legacy=False)  # type: ignore[arg-type]
        conversions = [c for c in conversions if not isinstance(c, loading.PrefixChange)]

    def stays(conversion: Any) -> bool:
        if not isinstance(conversion, loading.WeightConverter):
            return True
        if any(type(op).__module__ == __name__ for op in conversion.operations):
            return False
        back = conversion.reverse_transform()
        return not any(loading.rename_source_key(name, [], [back])[1] for name in names)

    model._weight_conversions = [c for c in conversions if stays(c)]  # type: ignore[assignment]


def _describe(model: nn.Module, to: str, names: Collection[str], double: bool) -> None:
    """Say in a transformers model's config how its file is to be read; by bitsandbytes, where that can."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict"):
        return
    _keep_keys(model, names)
    modules = {n.removesuffix(".weight") for n in names}
    linear = {p for p, m in model.named_modules() if type(site_of(m)) in (Linear, TransposedLinear)}
    foreign = to != "int4" and modules <= linear
    config.quantization_config = {
        "quant_method": "bitsandbytes" if foreign else "inlay",
        "load_in_4bit": to != "int8",
        "load_in_8bit": to == "int8",
        "bnb_4bit_quant_type": to if to != "int8" else "nf4",
        "bnb_4bit_use_double_quant": double,
        "bnb_4bit_compute_dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": sorted(linear - modules) if foreign else sorted(set(dict(model.named_modules())) - modules),
        "llm_int8_threshold": 0.0,
        "llm_int8_has_fp16_weight": False,
    }


def from_pretrained_quantized(
    path: str | os.PathLike[str],
    to: str | None = None,
    *,
    auto_class: Any = "AutoModelForCausalLM",
    skip: Collection[str] | None = None,
    double: bool = True,
    block: int = 64,
    compute_dtype: torch.dtype | None = None,
    **kwargs: Any,
) -> Any:
    """A transformers model of which each tensor is quantised as it is read: the full-precision model is never in memory.

    Args:
        path: a folder or repository; of a dense model, or of one that is quantised already (by `quantize_` or by bitsandbytes).
        to: the format, see `quantize_`; None for a model that is quantised already.
        auto_class: the class of transformers, or its name.
        skip, double, block, compute_dtype: see `quantize_`.
        kwargs: for the class's ``from_pretrained`` (``dtype``, ``device_map``, ``revision``, ...).

    Raises:
        ValueError: the format is missing or unknown, or the model is quantised in another way already.
    """
    import transformers

    cls = getattr(transformers, auto_class) if isinstance(auto_class, str) else auto_class
    hub = {k: kwargs[k] for k in ("revision", "token", "cache_dir", "local_files_only", "subfolder", "trust_remote_code") if k in kwargs}
    config = kwargs.pop("config", None) or transformers.AutoConfig.from_pretrained(path, **hub)
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None and to is None:
        raise ValueError(f"{path} is not quantised yet; say to what: {', '.join(map(repr, FORMATS))}.")
    asked = _asked_config()
    if stored is None:
        check(str(to), block)
        kwargs["quantization_config"] = asked(to=to, skip=skip, double=double, block=block, compute_dtype=compute_dtype)
    else:
        stored = stored if isinstance(stored, dict) else stored.to_dict()
        if stored.get("quant_method") not in ("bitsandbytes", "inlay"):
            raise ValueError(f"{path} is quantised with {stored.get('quant_method')!r}; load it with transformers.")
        there = "int8" if stored.get("load_in_8bit") else stored.get("bnb_4bit_quant_type", "fp4")
        if to not in (None, there):
            raise ValueError(f"{path} is quantised to {there!r} already; leave `to` out.")
        to, double, skip = there, bool(stored.get("bnb_4bit_use_double_quant")), stored.get("llm_int8_skip_modules")
        delattr(config, "quantization_config")
        kwargs["quantization_config"] = asked(to=to, skip=skip, double=double, block=block, compute_dtype=compute_dtype, old=stored)
    model = cls.from_pretrained(path, config=config, **kwargs)
    names = [n for n, q in model.named_parameters(remove_duplicate=False) if isinstance(q, QuantizedTensor)]
    for name in names:
        _speak(_owner(model, name)[0])
    # Quantised weights speak for themselves when the model is saved: what read them is not to be undone.
    known = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [c for c in known if all(type(op).__module__ != __name__ for op in getattr(c, "operations", ()))]
    for attribute in ("hf_quantizer", "is_quantized", "quantization_method"):
        model.__dict__.pop(attribute, None)
    for module in model.modules():
        if getattr(getattr(module, "config", None), "_is_quantized", False):
            module.config._is_quantized = False  # type: ignore[union-attr]
    _describe(model, str(to), names, double)
    return model


@cache
def _asked_config() -> Any:
    """The configuration by which transformers finds our way of loading; made once transformers is there."""
    from transformers.core_model_loading import ConversionOps, WeightConverter
    from transformers.quantizers.auto import register_quantization_config, register_quantizer
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class InlayConfig(QuantizationConfigMixin):
        def __init__(
            self, to: str, skip: Any = None, double: bool = True, block: int = 64, compute_dtype: Any = None, old: Any = None
        ) -> None:
            self.quant_method: Any = "inlay"
            self.to, self.skip, self.double, self.block, self.compute_dtype, self.old = to, skip, double, block, compute_dtype, old

    class Quantize(ConversionOps):
        """One tensor, or one stack of them, as it comes from the file."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(self, input_dict: dict[str, Any], **_: Any) -> dict[str, Tensor]:
            asked, found = self.quantizer.quantization_config, {}
            for name, value in input_dict.items():
                w = value[0] if isinstance(value, list) else value
                q = QuantizedTensor.of(
                    w,
                    asked.to,
                    block=asked.block,
                    double=asked.double,
                    transposed=self.quantizer.wanted[name],
                    compute_dtype=asked.compute_dtype,
                )
                found[name] = nn.Parameter(q, requires_grad=False)
            return found

    class Read(ConversionOps):
        """The tensors of one quantised weight."""

        def __init__(self, quantizer: Any) -> None:
            self.quantizer = quantizer

        def convert(  # type: ignore[override]
            self, input_dict: dict[str, Any], target_patterns: list[str], full_layer_name: str = "", model: Any = None, **_: Any
        ) -> dict[str, Tensor]:
            if len(input_dict) == 1:
                return {target_patterns[0]: next(iter(input_dict.values()))}
            own = target_patterns[0]
            given = {k.rstrip("$").removeprefix(own).lstrip("."): v[0] if isinstance(v, list) else v for k, v in input_dict.items()}
            transposed, dtype = self.quantizer.wanted[full_layer_name], model.get_parameter(full_layer_name).dtype
            q = QuantizedTensor.from_file(given, transposed, dtype, self.quantizer.quantization_config.compute_dtype)
            return {own: nn.Parameter(q, requires_grad=False)}

    @register_quantizer("inlay")
    class InlayQuantizer(HfQuantizer):
        wanted: dict[str, bool]
        quantization_config: Any
        # The longest first: the first that a key holds is taken for its end.
        serialized_names = {"weight": [*(f"weight.{end}" for end in sorted(ENDS, key=len, reverse=True)), "weight_format", "SCB", "weight"]}

        def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
            super().__init__(quantization_config, **kwargs)
            self.pre_quantized = quantization_config.old is not None

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
            asked = self.quantization_config
            if asked.old is not None:
                # Which are quantised stands in the file.
                self.wanted = quantizable(model, [])
            else:
                self.wanted = quantizable(model, asked.skip)

        def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
            return param_name in self.wanted

        def get_quantize_ops(self) -> Any:
            return Quantize(self)

        def get_weight_conversions(self) -> list[Any]:
            """Stacks of experts come first: their keys end as those of linear layers do."""
            if not self.pre_quantized:
                return []
            stacks = sorted({end for name in self.wanted if (end := name.rpartition(".")[2]) != "weight"})
            ends = ("", ".SCB", ".weight_format", *(f".{end}" for end in ENDS))
            own = [WeightConverter([f".{stack}{end}$" for end in ends], f".{stack}", [Read(self)]) for stack in stacks]
            return own + [WeightConverter(names, name, [Read(self)]) for name, names in self.serialized_names.items()]

        def is_serializable(self) -> bool:
            return True

        @property
        def is_trainable(self) -> bool:
            return True

    return register_quantization_config("inlay")(InlayConfig)
