"""Which names of HF peft are where in Inlay.

A name means the same in whichever of HF's modules it stands (``LoraConfig`` is in four of them), so there is one table of names and
one set of modules. A name that Inlay does not have is an `AttributeError`, and an `ImportError` in ``from peft import X``; a module
that it does not have is a `ModuleNotFoundError`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any

_MODULES = """
peft peft.auto peft.config peft.functional peft.helpers peft.import_utils peft.mapping peft.mapping_func peft.mixed_model
peft.optimizers peft.optimizers.lorafa peft.optimizers.loraplus peft.optimizers.riemannian peft.peft_model peft.tuners
peft.tuners.adamss.asa_callback peft.tuners.lora.corda peft.tuners.lora.intruders peft.tuners.lora.eva peft.tuners.lora.loraga
peft.tuners.tuners_utils peft.tuners.cartridge.utils peft.utils peft.utils.constants peft.utils.error peft.utils.hotswap
peft.utils.loftq_utils peft.utils.other
peft.utils.peft_types peft.utils.save_and_load peft.utils.transformers_weight_conversion peft.utils.warning
"""
MODULES = frozenset(_MODULES.split())
# Below the package of a method.
PARTS = ("config", "layer", "model")

# Where each name is: as `module` for the same name there, or as `module:name`.
_HOMES = {
    "inlay": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
        "LoraRuntimeConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING NoMatchingPeftModuleError PEFT_TYPE_TO_CONFIG_MAPPING PeftConfig "
        "PeftMixedModel PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering "
        "PeftModelForSeq2SeqLM PeftModelForSequenceClassification PeftModelForTokenClassification PeftType PromptLearningConfig "
        "MultitaskPromptTuningInit PromptEncoderReparameterizationType "
        "PromptTuningInit TaskType cast_mixed_precision_params get_layer_status get_model_status get_peft_config get_peft_model "
        "get_peft_model_state_dict inject_adapter_in_model load_peft_weights prepare_model_for_kbit_training set_peft_model_state_dict"
    ),
    "inlay.prompts.cartridge": (
        "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
        "prompt_embeddings_from_past_key_values"
    ),
    "inlay.initializers.corda": "CordaConfig CordaEigens preprocess_corda",
    "inlay.initializers.eva": (
        "EvaConfig forward_fn_dict get_eva_state_dict initialize_lora_eva_weights prepare_layer_inputs_fn_language_modeling "
        "prepare_model_inputs_fn_language_modeling"
    ),
    "inlay.initializers.loftq": "LoftQConfig replace_lora_weights_loftq",
    "inlay.initializers.loraga": "LoraGAConfig preprocess_loraga",
    "inlay.core.config": "PeftConfigMixin",
    "inlay.status": "TunerLayerStatus TunerModelStatus",
    "inlay.tuner": "BaseTuner",
    "inlay.formats.folder": "CONFIG_NAME SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "inlay.formats.slots": "EMBEDDING_LAYER_NAMES",
    "inlay.compat.layers": (
        "AuxiliaryTrainingWrapper BaseTunerLayer LoHaLayer LoKrLayer LoraLayer ModulesToSaveWrapper TrainableTokensWrapper"
    ),
    "inlay.compat.callbacks": "AdamssAsaCallback",
    "inlay.compat.loading": "build_peft_weight_mapping",
    "inlay.operations.convert": "convert_to_lora save_as_lora",
    "inlay.methods.lokr": "factorization",
    "inlay.optimizers": "LoraFAOptimizer create_lorafa_optimizer create_loraplus_optimizer create_riemannian_optimizer",
    "inlay.methods.arrow": "ArrowConfig create_arrow_model",
    "inlay.methods.bdlora": "BdLoraConfig",
    "inlay.methods.kasa": "KasaConfig",
    "inlay.methods.monteclora": "MontecloraConfig MontecloraTrainerMixin",
    "inlay.methods.velora": "VeloraConfig",
    "inlay.compat.hotswap": (
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict prepare_model_for_compiled_hotswap"
    ),
    "inlay.helpers": (
        "DoraCaching KappaTuneSelector check_if_peft_model disable_input_dtype_casting find_kappa_target_modules "
        "reduce_intruder_dimension rescale_adapter_scale update_forward_signature update_generate_signature update_signature"
    ),
    "inlay.compat.functions": (
        "PeftWarning _get_submodules _maybe_shard_state_dict_for_tp cast_adapter_dtype check_target_module_exists "
        "delete_adapter fsdp_auto_wrap_policy infer_device set_adapter "
        "set_requires_grad transpose"
    ),
    "inlay.compat.installed": (
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available is_gptqmodel_available "
        "is_hqq_available is_inc_available is_optimum_available is_te_available is_torchao_available is_xpu_available"
    ),
}  # fmt: skip
HOMES = {name: home for home, names in _HOMES.items() for name in names.split()}
# One class holds the tensors of every prompt; libraries ask whether a module is one.
_ENCODERS = "CPTEmbedding CartridgeEncoder MultitaskPromptEmbedding PrefixEncoder PromptEmbedding PromptEncoder"
HOMES |= dict.fromkeys(_ENCODERS.split(), "inlay.prompts.prompt:Prompt")
HOMES["INCLUDE_LINEAR_LAYERS_SHORTHAND"] = "inlay.core.targets:ALL_LINEAR"
HOMES["__version__"] = "inlay.core.config:PEFT_VERSION"

_NEEDS_TRANSFORMERS = ("inlay.compat.callbacks", "inlay.compat.loading")


def is_module(fullname: str) -> bool:
    """Whether HF peft and Inlay both have it."""
    if fullname in MODULES:
        return True
    parent, _, last = fullname.rpartition(".")
    package = parent if last in PARTS else fullname
    return package.startswith("peft.tuners.") and package.removeprefix("peft.tuners.") in _packages()


def resolve(module: ModuleType, name: str) -> Any:
    """What a module of HF peft has by a name: the object of Inlay itself.

    Raises:
        AttributeError: Inlay has nothing by this name.
    """
    if name == "__all__":
        return [n for n in listing(module) if not n.startswith("_") and HOMES.get(n) not in _NEEDS_TRANSFORMERS]
    if name.startswith("__") and name not in HOMES:
        raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
    for find in (_listed, _of_a_method, _layer_kind, _table, _submodule):
        found = find(module.__name__, name)
        if found is not None:
            # Found by the import system from now on, without coming here.
            setattr(module, name, found)
            return found
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}; Inlay does not have it yet.")


def listing(module: ModuleType) -> list[str]:
    from ..core.method import METHODS

    _load_methods()
    classes = [cls.__name__ for cls in METHODS.values()]
    return sorted({*HOMES, *classes, *(c.replace("Config", "Model") for c in classes), *vars(module)})


def _listed(module: str, name: str) -> Any:
    home, _, own = HOMES.get(name, "").partition(":")
    return getattr(importlib.import_module(home), own or name) if home else None


def _load_methods() -> None:
    from .. import methods, prompts  # noqa: F401  registering is their import


def _packages() -> dict[str, str]:
    """HF's packages of methods, ``lora``, ``ln_tuning``, ..., to the methods' names; those whose layers others ask for, too."""
    from ..core.config import CONFIGS

    _load_methods()
    return {str(t).lower(): str(t) for t in ("LORA", "LOHA", "LOKR", *CONFIGS)}


def _of_a_method(_: str, name: str) -> Any:
    """``<Method>Config`` and ``<Method>Model``, whatever is registered."""
    from ..core.config import CONFIGS
    from ..tuner import tuner_class

    _load_methods()
    for peft_type, cls in CONFIGS.items():
        if name == cls.__name__:
            return cls
        if name == cls.__name__.replace("Config", "Model"):
            return tuner_class(peft_type)
    return None


def _layer_kind(module: str, name: str) -> Any:
    """``peft.tuners.lora.Linear``, ``peft.tuners.ia3.layer.IA3Layer``, ...: adapted layers by method and by what they were."""
    from .layers import kind, kind_on

    package = module.removeprefix("peft.tuners.").partition(".")[0]
    peft_type = _packages().get(package) if module.startswith("peft.tuners.") else None
    if peft_type is None:
        return None
    return kind_on(peft_type, name) or (kind(peft_type) if name == kind(peft_type).__name__ else None)


def _table(_: str, name: str) -> Any:
    """``TRANSFORMERS_MODELS_TO_<METHOD>_TARGET_MODULES_MAPPING`` and ``PEFT_TYPE_TO_<...>_MAPPING``."""
    from ..core.method import METHODS
    from ..tuner import tuner_class

    _load_methods()
    tables: dict[str, Callable[[], Any]] = {
        "PEFT_TYPE_TO_PREFIX_MAPPING": lambda: {t: cls.prefix for t, cls in METHODS.items()},
        "PEFT_TYPE_TO_TUNER_MAPPING": lambda: {t: tuner_class(t) for t in METHODS},
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING": lambda: {t: tuner_class(t) for t in METHODS},
    }
    for peft_type, cls in METHODS.items():
        key = f"TRANSFORMERS_MODELS_TO_{peft_type.replace('_', '')}_TARGET_MODULES_MAPPING"
        tables[key] = lambda cls=cls: cls(**next(iter(cls.examples.values()))).default_targets()
    return tables[name]() if name in tables else None


def _submodule(module: str, name: str) -> ModuleType | None:
    """With HF peft, ``import peft`` brings its modules with it."""
    return importlib.import_module(f"{module}.{name}") if is_module(f"{module}.{name}") else None
