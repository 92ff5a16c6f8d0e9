"""The public face: names and signatures of HF peft."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from .core.attach import attach, check_name
from .core.calls import calling, penalised
from .core.config import PeftConfig
from .core.inlaid import adapters_of, places, prompts_of, session_of
from .core.rest import Rest, rest_with
from .core.retrained import Retrained
from .core.rows import Order, check_count
from .core.session import Session, carry_choices
from .formats.card import write_card
from .formats.filling import LoadReport, fill, warn_of
from .formats.folder import hub_options, write_adapter
from .formats.slots import slots_of_model, slots_of_parts
from .operations.strength import set_strength, with_strength
from .signature import show_signature
from .state_dict import get_peft_model_state_dict, load_peft_weights
from .status import TunerLayerStatus, TunerModelStatus, get_layer_status, get_model_status
from .tuner import BaseTuner, tuner_class

# What is done with changes of weights.
_ON_WEIGHTS = {"merge_adapter", "unmerge_adapter", "merge_and_unload", "unload", "add_weighted_adapter"}


class PeftModel(nn.Module):
    """A base model with adapters: HF's class, its attributes and its calls.

    Attributes of the base are found on it. The base itself is changed in place (its adapted layers get an extended class) and
    can be used directly; `unload` and `merge_and_unload` give it back.

    Args:
        model: the base.
        peft_config: the first adapter's configuration.
        adapter_name: its name.
        autocast_adapter_dtype: keep adapters in float32 over a base in half precision.
        low_cpu_mem_usage: leave the tensors on the meta device, for a file to fill.

    Raises:
        ValueError: the configuration does not fit the model; the model is untouched.
    """

    # Modules that a task's head goes by; retrained with every adapter.
    heads: ClassVar[tuple[str, ...]] = ()
    # How HF's class of the task names positional arguments, whatever the base's own order is.
    positional: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        self._with_heads(peft_config)
        options["autocast_adapter_dtype"] = autocast_adapter_dtype
        if peft_config.is_prompt_learning:
            from .prompts import attach_prompt

            self.base_model = model
            attach_prompt(self, peft_config, adapter_name, **options)
        else:
            self.base_model = tuner_class(str(peft_config.peft_type))(model, peft_config, adapter_name, low_cpu_mem_usage, **options)
        self.special_peft_forward_args = {"adapter_names"}
        show_signature(self, model)
        if getattr(model, "is_gradient_checkpointing", False):
            self._prepare_model_for_gradient_checkpointing(model)
        # Fast paths of pretraining that split weights apart would pass the adapters by.
        config = getattr(model, "config", None)
        if getattr(config, "pretraining_tp", 1) != 1:
            config.pretraining_tp = 1  # type: ignore[union-attr]

    def _with_heads(self, config: PeftConfig) -> None:
        if self.heads and hasattr(config, "modules_to_save"):
            config.modules_to_save = list(dict.fromkeys([*(config.modules_to_save or ()), *self.heads]))  # type: ignore[attr-defined]

    # ---- what there is ------------------------------------------------------------------------------------------------
    @property
    def session(self) -> Session:
        """Who is active, trainable and enabled in this model."""
        session = session_of(self.get_base_model())
        if session is None:
            raise ValueError("This model has no adapters; they have been unloaded or deleted.")
        return session

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        return self.session.configs

    @property
    def active_adapters(self) -> list[str]:
        return list(self.session.active)

    @property
    def active_adapter(self) -> str | list[str]:
        return self.session.shown

    @property
    def active_peft_config(self) -> PeftConfig:
        return self.peft_config[self.active_adapters[0]]

    @property
    def peft_type(self) -> str:
        return str(self.active_peft_config.peft_type)

    @property
    def _is_prompt_learning(self) -> bool:
        """Whether all adapters act on inputs and none on weights."""
        session = session_of(self.get_base_model())
        return session is not None and all(config.is_prompt_learning for config in session.configs.values())

    @property
    def modules_to_save(self) -> set[str] | None:
        found = {p.path.rpartition(".")[2] for p in places(self.get_base_model()) if isinstance(p, Retrained)}
        return found or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype:
        return next((q.dtype for q in self.get_base_model().parameters() if q.is_floating_point()), torch.get_default_dtype())

    @property
    def has_active_enabled_adapter(self) -> bool:
        return self.session.enabled and bool(self.session.active)

    def get_base_model(self) -> nn.Module:
        """The base, adapters still in it."""
        base = self._modules.get("base_model")
        return base.model if isinstance(base, BaseTuner) else base  # type: ignore[return-value]

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_model", "prompt_encoder"):
                raise
            if name not in _ON_WEIGHTS:
                return getattr(self.base_model, name)
            if self._is_prompt_learning:
                raise AttributeError(f"{self.peft_type} acts on inputs and changes no weight, so there is nothing for {name!r}.") from None
            return getattr(_tuner(self), name)

    # ---- running ------------------------------------------------------------------------------------------------------
    def forward(self, *args: Any, adapter_names: Sequence[str | Sequence[str]] | None = None, **kwargs: Any) -> Any:
        """The adapted model's forward.

        Args:
            adapter_names: for each row of the batch the adapter that acts on it, or several in their order; ``"__base__"`` for
                none. Without gradients, calls that hand on one ``past_key_values`` keep the adapters' factors side by side between
                them. A change of an adapter in the middle counts at once, unless it is written behind autograd's back, into ``.data``.
        """
        if len(args) > 1:
            kwargs |= dict(zip(self.positional, args, strict=False))
            args = args[len(self.positional) :]
        base, order = self.get_base_model(), None
        if adapter_names is not None and not prompts_of(self):
            order = Order.of(adapter_names, args, kwargs)
        if order is not None:
            adapter_names, (args, kwargs) = order.rows, order.into(args, kwargs)
        cache = None if torch.is_grad_enabled() or torch.compiler.is_compiling() else kwargs.get("past_key_values")
        rest = None if adapter_names is None or cache is None else rest_with(cache)
        with self._rows(adapter_names, args, kwargs, rest), calling(base, args, kwargs):
            self._carry_choice()
            if self._prompted():
                from .prompts import forward_with_prompt

                return forward_with_prompt(self, *args, **kwargs)
            output = base(*args, **kwargs)
            output = output if order is None else order.out_of(output)
            if rest is not None:
                rest.pauses()
            return penalised(base, output, self.training)

    def generate(self, *args: Any, adapter_names: Sequence[str | Sequence[str]] | None = None, **kwargs: Any) -> Any:
        """The base's ``generate`` with the adapters; arguments as for `forward` and for the base."""
        order = None
        if adapter_names is not None and not prompts_of(self):
            order = Order.of(adapter_names, args, kwargs)
        if order is not None:
            adapter_names, (args, kwargs) = order.rows, order.into(args, kwargs)
        with self._rows(adapter_names, args, kwargs, Rest()), calling(self.get_base_model(), args, kwargs):
            if self._prompted():
                from .prompts import generate_with_prompt

                return generate_with_prompt(self, *args, **kwargs)
            output = self.get_base_model().generate(*args, **kwargs)  # type: ignore[operator]
            return output if order is None else order.out_of(output)

    def _carry_choice(self) -> None:
        if not torch.is_grad_enabled():
            return
        base = self.get_base_model()
        session = session_of(base)
        if session is not None and (session.chosen_here or session.call) and getattr(base, "is_gradient_checkpointing", False):
            carry_choices(base, session)

    def _prompted(self) -> bool:
        return bool(prompts_of(self)) and any(n in prompts_of(self) for n in self.session.choice().all)

    def _show_prompts(self) -> None:
        if prompts_of(self):
            from .prompts import show_trainable

            show_trainable(self)

    def _rows(self, names: Sequence[str | Sequence[str]] | None, args: tuple[Any, ...], kwargs: dict[str, Any], rest: Rest | None) -> Any:
        if names is None:
            return nullcontext()
        check_count((*args, *map(kwargs.get, ("input_ids", "inputs_embeds", "inputs"))), len(names), inside=False)
        return self.session.local(self.session.active, names, rest)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """The base alone, in this thread or task, until the block ends. Blocks nest."""
        with self.session.local(()):
            yield

    @contextmanager
    def use_adapters(self, *names: str) -> Iterator[None]:
        """These adapters, in this order, in this thread or task, until the block ends. Blocks nest."""
        with self.session.local(names):
            yield

    # ---- adapters -----------------------------------------------------------------------------------------------------
    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
        **options: Any,
    ) -> None:
        """Set one more adapter in; the active ones stay active.

        Raises:
            ValueError: the name is taken, or the configuration does not fit. The model is as it was.
        """
        self._with_heads(peft_config)
        check_name(adapter_name, session_of(self.get_base_model()))
        options["autocast_adapter_dtype"] = autocast_adapter_dtype
        if peft_config.is_prompt_learning:
            from .prompts import attach_prompt

            attach_prompt(self, peft_config, adapter_name, activate_it=False, **options)
        else:
            attach(self.get_base_model(), peft_config, adapter_name, activate_it=False, low_cpu_mem_usage=low_cpu_mem_usage, **options)

    def set_adapter(self, adapter_name: str | Sequence[str], inference_mode: bool = False) -> None:
        """Choose the active adapter, or several that act one after another. What is trainable does not change by it."""
        _tuner(self).set_adapter(adapter_name)
        self._show_prompts()

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Say which adapters are trained."""
        _tuner(self).set_requires_grad(adapter_names, requires_grad)
        self._show_prompts()

    def delete_adapter(self, adapter_name: str) -> None:
        """Take an adapter out; with the last one the base is what it was."""
        self.session.check((adapter_name,))
        if adapter_name in prompts_of(self):
            del self.prompt_encoder[adapter_name]
        _tuner(self).delete_adapter(adapter_name)
        self._show_prompts()

    def set_scale(self, adapter_name: str, scale: float | Mapping[str, float]) -> None:
        """Set the strength of an adapter: 0 is the base, 1 the adapter, 2 doubles what it does.

        Args:
            scale: for all layers; or by pattern of module names, as in ``rank_pattern``: the first that fits counts, and layers
                that none fits stay as they are.

        Raises:
            ValueError: there is no such adapter, a number is not finite, or a pattern names no layer of it. Nothing is changed.
        """
        if adapter_name in prompts_of(self):
            kind = self.peft_config[adapter_name].peft_type
            raise ValueError(f"{adapter_name!r} ({kind}) acts on inputs; only adapters of weights have a strength.")
        set_strength(self.get_base_model(), self.session, adapter_name, scale)

    # ---- parameters ---------------------------------------------------------------------------------------------------
    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Numbers of trainable and of all parameters; 4-bit weights count as what they stand for."""
        trainable = total = 0
        for q in self.parameters():
            n = q.numel() or getattr(q, "ds_numel", 0)
            if type(q).__name__ == "Params4bit":
                n *= 2 * getattr(q, "element_size", lambda: 1)()
            total += n
            trainable += n if q.requires_grad else 0
        return trainable, total

    def print_trainable_parameters(self) -> None:
        trainable, total = self.get_nb_trainable_parameters()
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}")

    def get_layer_status(self) -> list[TunerLayerStatus]:
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        return get_model_status(self)

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        self._prepare_model_for_gradient_checkpointing(model)

    def _prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Checkpointed blocks pass no gradient unless what enters them asks for one, and a frozen embedding's output does not."""
        if (
            getattr(model, "is_loaded_in_8bit", False)
            or getattr(model, "is_loaded_in_4bit", False)
            or getattr(model, "is_quantized", False)
        ):
            return
        require_input_gradients(model)

    # ---- files --------------------------------------------------------------------------------------------------------
    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        *,
        state_dict: Mapping[str, Tensor] | None = None,
        max_shard_size: int | str | None = None,
        keep_strength: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write adapters in HF's format, atomically and without the network.

        Args:
            save_directory: the adapter ``default`` goes right into it, others into subfolders of their names.
            safe_serialization: safetensors, or a pickle.
            selected_adapters: which; all where None.
            save_embedding_layers: write the base's embeddings too; ``"auto"`` does where they are adapted or were resized.
            is_main_process: write at all.
            path_initial_model_for_weight_conversion: write LoRA adapters that started from the weight or from data as plain LoRA
                of twice the rank, for the base as it is. They know their start; only others read it from this folder, which holds
                the adapter as it was before training.
            state_dict: take values from here, where the model's own are sharded.
            max_shard_size: split larger files, with an index.
            keep_strength: write the strengths that `set_scale` and its like have set: into the alphas of LoRA, so that every
                reader of the file has the same numbers, and where HF's format has no word for them into fields of ours,
                ``strength`` and ``strength_pattern``.

        Raises:
            ValueError: a name is unknown, or a tensor is empty because its shards were not gathered.
        """
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({save_directory}) should be a directory, not a file.")
        for name in self.session.check(self.peft_config if selected_adapters is None else selected_adapters):
            tensors = get_peft_model_state_dict(self, state_dict, name, save_embedding_layers=save_embedding_layers)
            if not is_main_process:
                continue
            config = self.peft_config[name]
            if path_initial_model_for_weight_conversion is not None:
                from .initializers.convert import as_plain_lora

                tensors, config = as_plain_lora(self.get_base_model(), name, config, tensors, path_initial_model_for_weight_conversion)
            elif keep_strength:
                config = with_strength(self.get_base_model(), name, config)
            folder = Path(save_directory) if name == "default" else Path(save_directory) / name
            write_adapter(
                folder, tensors, self._config_in_file(config), safe_serialization=safe_serialization, max_shard_size=max_shard_size
            )
            write_card(folder, self, config)

    def _config_in_file(self, config: PeftConfig) -> dict[str, Any]:
        plain = config.to_file()
        base = self.get_base_model()
        plain["inference_mode"] = True
        if not plain.get("base_model_name_or_path"):
            plain["base_model_name_or_path"] = getattr(base, "name_or_path", None) or getattr(base, "__dict__", {}).get("name_or_path")
        if config.task_type is None:
            from .core.place import host_class

            cls = host_class(base)
            plain["auto_mapping"] = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
        return plain

    def create_or_update_model_card(self, output_dir: str | os.PathLike[str]) -> None:
        write_card(Path(output_dir), self, self.active_peft_config)

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> PeftModel:
        """A base with an adapter from a folder or a hub repository.

        Args:
            model: the base; changed in place.
            model_id: the adapter's folder or repository.
            adapter_name: what to call it here.
            is_trainable: train it; else it is frozen.
            config: a configuration in place of the file's.
            autocast_adapter_dtype: keep the adapter in float32 over half precision.
            ephemeral_gpu_offload, low_cpu_mem_usage: for HF's signature; loading never allocates twice.
            key_mapping: regular expressions and replacements for the file's keys.
            strict: refuse a file that does not fit tensor by tensor; False warns and loads what fits.
            allow_pickle: read an ``adapter_model.bin``, weights only.
            kwargs: for the hub (``subfolder``, ``revision``, ``token``, ...) .

        Raises:
            ValueError: a file is absent, damaged, or does not fit (`AdapterMismatch`). The model is untouched.
        """
        subfolder = kwargs.get("subfolder")
        hub = hub_options(kwargs)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **hub)
        config.inference_mode = not is_trainable
        tensors = load_peft_weights(
            str(model_id), device="cpu", key_mapping=key_mapping, allow_pickle=allow_pickle, subfolder=subfolder, **hub
        )
        chosen = MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(str(config.task_type), PeftModel) if cls is PeftModel else cls
        return chosen(
            model,
            config,
            adapter_name,
            autocast_adapter_dtype,
            False,
            **filling_options(model, tensors, adapter_name, strict, config.is_prompt_learning),
        )

    def load_adapter(
        self,
        model_id: str | os.PathLike[str],
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: dict[str, str] | None = None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        **kwargs: Any,
    ) -> LoadReport:
        """Load one more adapter from a folder or a hub; or, under a name that is there, new values for it.

        Arguments and errors as for `from_pretrained`.
        """
        subfolder = kwargs.get("subfolder")
        hub = hub_options(kwargs)
        tensors = load_peft_weights(
            str(model_id), device="cpu", key_mapping=key_mapping, allow_pickle=allow_pickle, subfolder=subfolder, **hub
        )
        if adapter_name in self.peft_config:
            report = _fill_existing(
                self, tensors, adapter_name, lambda: PeftConfig.from_pretrained(model_id, subfolder=subfolder, **hub), strict
            )
            if is_trainable:
                self.set_requires_grad(adapter_name)
            return report
        config = PeftConfig.from_pretrained(model_id, subfolder=subfolder, **hub)
        config.inference_mode = not is_trainable
        options = filling_options(self.get_base_model(), tensors, adapter_name, strict, config.is_prompt_learning)
        self.add_adapter(adapter_name, config, autocast_adapter_dtype=autocast_adapter_dtype, **options)
        return LoadReport()

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: str | None = None, commit_message: str = "Upload adapter"
    ) -> Any:
        """Save the adapters and upload them to a hub repository."""
        import tempfile

        from huggingface_hub import HfApi

        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            api = HfApi(token=token)
            api.create_repo(repo_id, private=private, exist_ok=True)
            return api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)


def _tuner(model: PeftModel) -> BaseTuner:
    """What speaks for the adapters of a model, also where no tuner wraps it."""
    base = model._modules["base_model"]
    if isinstance(base, BaseTuner):
        return base
    tuner = BaseTuner.__new__(BaseTuner)
    nn.Module.__init__(tuner)
    tuner.__dict__["model"] = base
    return tuner


def filling_options(model: nn.Module, tensors: Mapping[str, Tensor], name: str, strict: bool, prompt: bool) -> dict[str, Any]:
    """Of `add_adapter`: what gives a new adapter its values from a file."""
    if prompt:
        return {"tensors": tensors, "strict": strict}

    def values(parts: list[Any]) -> None:
        report = fill(slots_of_parts(parts, name), model, tensors, name, strict=strict, ignore_mismatched_sizes=not strict)
        warn_of(report)

    return {"fill": values}


def _fill_existing(model: PeftModel, tensors: Mapping[str, Tensor], name: str, saved: Callable[[], PeftConfig], strict: bool) -> LoadReport:
    if name in prompts_of(model):
        from .prompts import load_prompt

        return load_prompt(model, name, tensors, strict)
    base, method = model.get_base_model(), model.peft_config[name]
    undo = method.refilled(adapters_of(base, name), saved)  # type: ignore[attr-defined]
    try:
        return fill(slots_of_model(base, name), base, tensors, name, strict=strict, ignore_mismatched_sizes=not strict)
    except Exception:
        undo()
        raise


class PeftModelForCausalLM(PeftModel):
    """For models that predict the next token."""

    positional = ("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForSeq2SeqLM(PeftModel):
    """For encoder-decoder models."""

    positional = (
        "input_ids",
        "attention_mask",
        "inputs_embeds",
        "decoder_input_ids",
        "decoder_attention_mask",
        "decoder_inputs_embeds",
        "labels",
    )


class PeftModelForSequenceClassification(PeftModel):
    """For one label a sequence; the classifier is retrained with the adapter."""

    heads = ("classifier", "score")
    positional = ("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForTokenClassification(PeftModel):
    """For one label a token; the classifier is retrained with the adapter."""

    heads = ("classifier", "score")
    positional = ("input_ids", "attention_mask", "inputs_embeds", "labels")


class PeftModelForQuestionAnswering(PeftModel):
    """For spans of a text; the output layer is retrained with the adapter."""

    heads = ("qa_outputs",)
    positional = ("input_ids", "attention_mask", "token_type_ids", "position_ids", "inputs_embeds", "start_positions", "end_positions")


class PeftModelForFeatureExtraction(PeftModel):
    """For embeddings."""


class PeftMixedModel(PeftModel):
    """Adapters of several methods in one model, on weights and on inputs. `PeftModel` holds them as well; this name is HF's."""


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    "SEQ_CLS": PeftModelForSequenceClassification,
    "SEQ_2_SEQ_LM": PeftModelForSeq2SeqLM,
    "CAUSAL_LM": PeftModelForCausalLM,
    "TOKEN_CLS": PeftModelForTokenClassification,
    "QUESTION_ANS": PeftModelForQuestionAnswering,
    "FEATURE_EXTRACTION": PeftModelForFeatureExtraction,
}


def require_input_gradients(model: nn.Module) -> None:
    """Make what the input embedding gives require gradients, for checkpointed blocks behind it."""
    if hasattr(model, "enable_input_require_grads"):
        model.enable_input_require_grads()  # type: ignore[operator]
    elif hasattr(model, "get_input_embeddings"):
        model.get_input_embeddings().register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))  # type: ignore[operator]
