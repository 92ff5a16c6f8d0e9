"""One training step on stand-ins, and what it needs at its peak."""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedFakeTensorException,
)
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from ..core.config import PeftConfig, nearest
from ..kernels.quantised import FORMATS
from ..quantize import quantize_
from .ledger import Ledger, parts_of, stand_ins
from .optimizers import optimizer

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
# What a process has on a GPU before its first tensor: the context, cuBLAS and its workspace. An assumption: it differs by GPU.
CUDA_CONTEXT = 600 << 20
ITEMS = ("weights", "adapters", "gradients", "optimizer", "activations", "logits", "workspace", "communication", "gathered", "context")

Base = str | Callable[[], nn.Module] | Any


@dataclass(frozen=True)
class Setting:
    """How the model is to be trained.

    Attributes:
        batch_size: rows per device and forward pass.
        seq_length: tokens of a row.
        dtype: of the base's weights.
        quantization: a format of `quantize_`, for the base's linear layers, or ``"none"``; bitsandbytes takes the same bytes.
        double: quantise the scales of the blocks, too.
        skip: modules that are not quantised, see `quantize_`.
        gradient_checkpointing: recompute activations in the backward pass.
        optimizer: see `inlay.planning.OPTIMIZERS`.
        grad_accum: forward passes per step of the optimiser.
        devices: how many take part.
        sharding: ``"ddp"``, each has all of the model, or ``"fsdp"``, each has its share of weights, gradients and states.
        device: ``"cuda"`` counts its context and has attention with dropout in one kernel; ``"cpu"``, ``"mps"``.
        autocast: compute in ``dtype`` and give float32 back, as `transformers.Trainer` does; where None, if that is half precision.
        padding: rows of unequal length, so that attention takes a mask.
        loss: ``"model"``, the model's own, of all logits; or ``"chunked"``, TRL's, of a few columns of them at a time.
    """

    batch_size: int = 8
    seq_length: int = 1024
    dtype: str = "bfloat16"
    quantization: str = "none"
    double: bool = True
    skip: tuple[str, ...] | None = None
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    grad_accum: int = 1
    devices: int = 1
    sharding: str = "ddp"
    device: str = "cuda"
    autocast: bool | None = None
    padding: bool = True
    loss: str = "model"

    def __post_init__(self) -> None:
        for name, known in (
            ("dtype", DTYPES),
            ("quantization", ("none", *FORMATS)),
            ("sharding", ("ddp", "fsdp")),
            ("device", ("cuda", "cpu", "mps")),
            ("loss", ("model", "chunked")),
        ):
            value = getattr(self, name)
            if value not in known:
                raise ValueError(f"{name} {value!r}: use one of {', '.join(known)}.{nearest(value, known)}")
        for name in ("batch_size", "seq_length", "grad_accum", "devices"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: at least 1.")
        optimizer(self.optimizer)

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def autocasts(self) -> bool:
        return self.torch_dtype is not torch.float32 if self.autocast is None else self.autocast


@dataclass(frozen=True)
class MemoryPlan:
    """What one device needs at the peak of a step, in bytes.

    Attributes:
        items: weights, adapters, gradients, optimizer, activations (kept for the backward pass), logits (and what the loss makes of
            them), workspace (of the pass that is at its peak), communication (DDP's buckets), gathered (FSDP's whole layers), context.
        during: the peak is in the ``"forward pass"``, the ``"backward pass"`` or the ``"optimizer step"``.
        trainable, total: numbers of parameters.
        host: bytes in the host's memory, of a paged optimiser.
        setting: what it holds for.
    """

    items: dict[str, int]
    during: str
    trainable: int
    total: int
    host: int
    setting: Setting = field(repr=False)

    @property
    def bytes(self) -> int:
        """All items together."""
        return sum(self.items.values())

    def as_dict(self) -> dict[str, Any]:
        return {
            "bytes": self.bytes,
            "items": self.items,
            "during": self.during,
            "parameters": {"trainable": self.trainable, "total": self.total},
            "host": self.host,
            "setting": {f.name: getattr(self.setting, f.name) for f in fields(self.setting)},
        }


def plan(
    model: Base,
    config: PeftConfig | None,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    trust_remote_code: bool = False,
    **setting: Any,
) -> MemoryPlan:
    """What a training step will need, without the model's weights: the step runs on tensors that have sizes and no numbers.

    Args:
        model: a folder, a ``config.json``, a hub id, a transformers config, or a function that makes a model.
        config: the adapter's; None trains the whole model.
        inputs: the model's arguments for one batch (of any values), where it does not take tokens.
        trust_remote_code: allow a model folder to bring its own Python code.
        setting: see `inlay.planning.Setting`.

    Raises:
        ValueError: an option is wrong, the configuration does not fit the model, or the step cannot run without numbers.
    """
    asked = Setting(**setting)
    task = str(getattr(config, "task_type", None) or "CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = _base(model, asked, task, trust_remote_code)
        return _Step(base, copy.deepcopy(config), asked, task, inputs).run()


# ---- the model ----------------------------------------------------------------------------------------------------------------------
def _base(model: Base, asked: Setting, task: str, trust_remote_code: bool) -> nn.Module:
    """The base without memory, quantised as it will be."""
    quantization, options, stored = asked.quantization, _options(asked.double, asked.skip), None
    if callable(model):
        with torch.device("meta"):
            base: nn.Module = model()  # type: ignore[assignment]
        base.to(asked.torch_dtype)
    else:
        import transformers

        from ..auto import AUTO_CLASSES

        if task not in AUTO_CLASSES:
            raise ValueError(f"task_type {task!r}: use one of {', '.join(AUTO_CLASSES)}.{nearest(task, AUTO_CLASSES)}")
        remote = {"trust_remote_code": trust_remote_code}
        config: Any = transformers.AutoConfig.from_pretrained(model, **remote) if isinstance(model, str) else copy.deepcopy(model)
        stored = getattr(config, "quantization_config", None)
        if stored is not None:
            quantization, options = _stored(stored if isinstance(stored, dict) else stored.to_dict())
            del config.quantization_config
        most = getattr(config.get_text_config(), "max_position_embeddings", None)
        if most and asked.seq_length > most:
            raise ValueError(f"seq_length {asked.seq_length}: the model was made for at most {most} tokens.")
        with torch.device("meta"):
            base = getattr(transformers, AUTO_CLASSES[task]).from_config(config, dtype=asked.torch_dtype, **remote)
    if quantization != "none":
        if options["skip"] is not None and stored is not None:
            # bitsandbytes quantises linear layers only.
            options["skip"] = [*options["skip"], *(name for name, m in base.named_modules() if isinstance(m, nn.Embedding))]
        quantize_(base, quantization, **options)
    return base


def _stored(described: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """The format and the options of `quantize_` by which a model's file says it is quantised."""
    by = described.get("quant_method")
    by = getattr(by, "value", by)
    if by not in ("bitsandbytes", "inlay"):
        raise ValueError(f"The model is quantised with {by!r}, which is not known here; plan its dense base with quantization='int4'.")
    to = "int8" if described.get("load_in_8bit") else described.get("bnb_4bit_quant_type", "fp4")
    return to, _options(bool(described.get("bnb_4bit_use_double_quant")), described.get("llm_int8_skip_modules"))


def _options(double: bool, skip: Collection[str] | None) -> dict[str, Any]:
    return {"double": double, "skip": skip}


# ---- the step -----------------------------------------------------------------------------------------------------------------------
class _AsOnGpu(TorchFunctionMode):
    """Attention as a GPU does it: in one kernel also where it has dropout, which the CPU's kernel lacks."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and "dropout_p" in kwargs:
            kwargs = kwargs | {"dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _unpacked() -> Iterator[None]:
    """Rows without padding take no mask. transformers looks at the numbers for that, and makes a mask where there are none."""
    masking = sys.modules.get("transformers.masking_utils")
    found = getattr(masking, "find_packed_sequence_indices", None)
    if masking is None or found is None:
        yield
        return
    masking.find_packed_sequence_indices = lambda *_, **__: None  # type: ignore[attr-defined]
    try:
        yield
    finally:
        masking.find_packed_sequence_indices = found  # type: ignore[attr-defined]


class _Step:
    """A model, an adapter in it and a batch, all without memory."""

    def __init__(self, base: nn.Module, config: PeftConfig | None, asked: Setting, task: str, inputs: Mapping[str, Tensor] | None) -> None:
        from ..functions import get_peft_model

        self.asked, self.base, self.task = asked, base, task
        if asked.gradient_checkpointing:
            if not getattr(base, "supports_gradient_checkpointing", False):
                raise ValueError(f"gradient_checkpointing: {type(base).__name__} does not support it.")
            base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # type: ignore[operator]
        if asked.loss == "chunked":
            from trl.trainer.utils import add_fused_lm_head

            add_fused_lm_head(base, outputs=("log_probs", "entropy", "is_top1"))  # type: ignore[arg-type]
        self.total = sum(q.numel() for q in base.parameters())
        self.blocks = _blocks(base)
        own = {id(t) for _, _, t in _places(base)}
        self.model: Any = base if config is None else get_peft_model(base, config, low_cpu_mem_usage=True)
        places = [(table, name, id(t) in own) for table, name, t in _places(self.model)]
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        stand_ins(self.model, self.mode)
        self.model.train()
        self.weights = [table[name] for table, name, is_own in places if is_own]
        self.adapters = [table[name] for table, name, is_own in places if not is_own]
        self.trained = [q for q in self.model.parameters() if q.requires_grad]
        text = getattr(getattr(base, "config", None), "get_text_config", None)
        self.ledger = Ledger(None if text is None else text().vocab_size)
        with self.mode:
            self.batch = dict(inputs) if inputs is not None else self._tokens()
            self.batch = {name: torch.empty_like(t, device="cpu") for name, t in self.batch.items()}

    def _tokens(self) -> dict[str, Tensor]:
        shape = self.asked.batch_size, self.asked.seq_length
        ids = torch.zeros(shape, dtype=torch.long)
        batch = {"input_ids": ids}
        if self.asked.padding:
            batch["attention_mask"] = torch.ones(shape, dtype=torch.long)
        rows = {"SEQ_CLS": ("labels",), "QUESTION_ANS": ("start_positions", "end_positions"), "FEATURE_EXTRACTION": ()}
        if self.task in rows:
            return batch | {name: torch.zeros(shape[0], dtype=torch.long) for name in rows[self.task]}
        return batch | {"labels": ids}

    def run(self) -> MemoryPlan:
        try:
            return self._run()
        except (DataDependentOutputException, DynamicOutputShapeException, UnsupportedFakeTensorException) as error:
            name = type(self.base).__name__
            raise ValueError(
                f"{name} with this adapter computes with sizes that depend on numbers ({error}), without which it cannot be planned."
            ) from error

    def _run(self) -> MemoryPlan:
        asked, ledger = self.asked, self.ledger
        for account, tensors in (("weights", self.weights), ("adapters", self.adapters)):
            for t in tensors:
                ledger.book(t, account)
        if asked.grad_accum > 1:
            with self.mode:
                for q in self.trained:
                    q.grad = torch.empty_like(q)
            for q in self.trained:
                ledger.book(q.grad, "gradients")  # type: ignore[arg-type]
        attention: AbstractContextManager[Any] = _AsOnGpu() if asked.device == "cuda" else nullcontext()
        with self.mode, ledger, attention, nullcontext() if asked.padding else _unpacked():
            loss, outputs = self._forward()
            ledger.rename_what_went("activations", "workspace")
            forward = len(ledger.entries)
            ledger.account = "workspace"
            loss.backward()
            del loss, outputs
        gradients = [q.grad for q in self.trained if q.grad is not None]
        ledger.rename(gradients, "gradients")
        return self._plan(forward)

    def _forward(self) -> tuple[Tensor, Any]:
        extra: dict[str, Any] = {"fused_lm_head": True} if self.asked.loss == "chunked" else {}
        if self.task in ("CAUSAL_LM", "SEQ_2_SEQ_LM") and hasattr(self.base, "config") and "input_ids" in self.batch:
            extra["use_cache"] = False
        autocast = torch.autocast("cpu", dtype=self.asked.torch_dtype, enabled=self.asked.autocasts)
        with autocast:
            outputs = self.model(**self.batch, **extra)
        if self.asked.autocasts:
            # As accelerate gives them.
            outputs = _floats(outputs)
        loss = getattr(outputs, "loss", None) if not isinstance(outputs, dict) else outputs.get("loss")
        if loss is None:
            loss = torch.stack([t.float().mean() for t in tree_leaves(outputs) if isinstance(t, Tensor) and t.requires_grad]).sum()
        return loss, outputs

    # ---- what it comes to -----------------------------------------------------------------------------------------------------------
    def _plan(self, forward: int) -> MemoryPlan:
        asked = self.asked
        kept = optimizer(asked.optimizer)
        state = kept.bytes_of(self.trained)
        peak, position = self.ledger.peak()
        during = "forward pass" if position <= forward else "backward pass"
        after = self.ledger.now()
        after["workspace"] += kept.passing * max((q.numel() * q.element_size() for q in self.trained), default=0)
        if after.total() > peak.total():
            peak, during = after, "optimizer step"
        peak["optimizer"] = 0 if kept.paged else state
        gradients = sum(q.numel() * q.element_size() for q in self.trained)
        if asked.devices > 1 and asked.sharding == "ddp":
            peak["communication"] = gradients
        if asked.devices > 1 and asked.sharding == "fsdp":
            peak["gathered"] = self._gathered()
            for name in ("weights", "adapters", "gradients", "optimizer"):
                peak[name] = -(-peak[name] // asked.devices)
            state = -(-state // asked.devices)
        if asked.device == "cuda":
            peak["context"] = CUDA_CONTEXT
        return MemoryPlan(
            items={name: peak[name] for name in ITEMS if peak[name]},
            during=during,
            trainable=sum(q.numel() for q in self.trained),
            total=self.total,
            host=state if kept.paged else 0,
            setting=asked,
        )

    def _gathered(self) -> int:
        """The bytes of what FSDP has whole at a time: two blocks, of which one is on its way, and all that is in no block."""
        everything = {id(part): part.untyped_storage().nbytes() for q in self.model.parameters() for part in parts_of(q)}
        sizes, inside = [], set()
        for block in self.blocks:
            ids = {id(part) for q in block.parameters() for part in parts_of(q)}
            sizes.append(sum(everything[i] for i in ids))
            inside |= ids
        return sum(sorted(sizes)[-2:]) + sum(size for i, size in everything.items() if i not in inside)


def _places(model: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """The tables that a model's tensors stand in, their names there and the tensors."""
    tables = [table for module in model.modules() for table in (module._parameters, module._buffers)]
    return [(table, name, t) for table in tables for name, t in table.items() if t is not None]


def _blocks(base: nn.Module) -> list[nn.Module]:
    """The modules that FSDP gathers one after the other."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    return [m for m in base.modules() if type(m).__name__ in names]


def _floats(outputs: Any) -> Any:
    return tree_map(lambda t: t.float() if isinstance(t, Tensor) and t.is_floating_point() else t, outputs)
