"""`inlay.plan`: what it counts without a model is what a model has, and what a step books in earnest."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig, LlamaForCausalLM, MixtralConfig, T5Config

import inlay
from inlay import plan
from inlay.core.config import CONFIGS, config_class
from inlay.core.method import METHODS
from inlay.planning import OPTIMIZERS, Setting, remedies
from inlay.planning.ledger import Ledger, parts_of
from inlay.planning.optimizers import optimizer
from inlay.quantize import quantize_

config_class("LORA")
BASE = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
LLAMA = LlamaConfig(**BASE)
BATCH: dict[str, Any] = {"batch_size": 2, "seq_length": 64, "dtype": "float32", "device": "cpu", "padding": False}


def lora(**options: Any) -> inlay.LoraConfig:
    return inlay.LoraConfig(**{"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **options})


def in_earnest(config: Any, **setting: Any) -> int:
    """The bytes at the peak of a step of a real model, booked by the same ledger."""
    asked = {**BATCH, **setting}
    base = LlamaForCausalLM(LlamaConfig(**BASE))
    if "quantization" in asked:
        quantize_(base, asked["quantization"])
    if asked.get("gradient_checkpointing"):
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model = inlay.get_peft_model(base, config) if config is not None else base
    model.train()
    ledger = Ledger()
    for t in [*model.parameters(), *model.buffers()]:
        ledger.book(t, "weights")
    shape = asked["batch_size"], asked["seq_length"]
    ids = torch.randint(0, 300, shape)
    mask = (
        {"attention_mask": torch.cat((torch.ones(shape[0], 4), torch.zeros(shape[0], shape[1] - 4)), 1).long()} if asked["padding"] else {}
    )
    with ledger:
        output = model(input_ids=ids, labels=ids, use_cache=False, **mask)
        output.loss.backward()
    peak, _ = ledger.peak()
    return peak.total()


def planned(config: Any, **setting: Any) -> int:
    """The same of stand-ins: without the optimiser's state, which a first step does not have yet."""
    found = plan(LLAMA, config, **{**BATCH, "optimizer": "sgd", **setting})
    return found.bytes


# ---- what there is ----------------------------------------------------------------------------------------------------------------
def test_weights_and_adapters_are_those_of_the_model() -> None:
    found = plan(LLAMA, lora(), **BATCH)
    base = LlamaForCausalLM(LLAMA)
    buffers = sum(t.numel() * t.element_size() for t in base.buffers())
    assert found.items["weights"] == sum(q.numel() * 4 for q in base.parameters()) + buffers
    model = inlay.get_peft_model(base, lora())
    trainable, total = model.get_nb_trainable_parameters()
    assert (found.trainable, found.total) == (trainable, total - trainable)
    assert found.items["adapters"] == 4 * trainable
    assert found.items["optimizer"] == 8 * trainable
    assert found.bytes == sum(found.items.values())


@pytest.mark.parametrize("to", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("double", [True, False])
def test_quantised_weights_have_the_bytes_of_the_format(to: str, double: bool) -> None:
    base = quantize_(LlamaForCausalLM(LlamaConfig(**BASE)), to, double=double)
    # Tensors share the table of levels in earnest.
    tensors = {part.data_ptr(): part for t in [*base.parameters(), *base.buffers()] for part in parts_of(t)}
    real = sum(t.untyped_storage().nbytes() for t in tensors.values())
    found = plan(LLAMA, lora(), **BATCH, quantization=to, double=double).items["weights"]
    assert 0 <= found - real <= 1024 * 14


def test_half_precision_and_its_adapters() -> None:
    found = plan(LLAMA, lora(), **{**BATCH, "dtype": "bf16"})
    assert found.items["adapters"] == 4 * found.trainable
    assert found.items["weights"] == pytest.approx(2 * found.total, rel=0.01)


def test_a_config_that_is_quantised_already() -> None:
    own = LlamaConfig(**BASE)
    own.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    assert plan(own, lora(), **BATCH).items == plan(LLAMA, lora(), **BATCH, quantization="nf4", double=False).items
    saved = quantize_(LlamaForCausalLM(LlamaConfig(**BASE)), "int8").config
    assert plan(saved, lora(), **BATCH).items == plan(LLAMA, lora(), **BATCH, quantization="int8").items
    own.quantization_config = {"quant_method": "gptq", "bits": 4}
    with pytest.raises(ValueError, match="quantised with 'gptq'"):
        plan(own, lora(), **BATCH)


# ---- what a step makes ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (lora(), {}),
        (lora(), {"padding": True}),
        (lora(lora_dropout=0.1), {}),
        (lora(), {"gradient_checkpointing": True}),
        (lora(use_dora=True), {}),
        (lora(), {"quantization": "int8"}),
        (lora(), {"quantization": "nf4", "gradient_checkpointing": True}),
        (inlay.BOFTConfig(boft_block_size=4, target_modules="all-linear", task_type="CAUSAL_LM"), {}),
        (inlay.IA3Config(task_type="CAUSAL_LM"), {}),
        (inlay.OFTConfig(oft_block_size=8, target_modules="all-linear", task_type="CAUSAL_LM"), {}),
        (inlay.PromptTuningConfig(num_virtual_tokens=8, task_type="CAUSAL_LM"), {}),
        (None, {}),
    ],
    ids=["lora", "padded", "dropout", "checkpointed", "dora", "int8", "nf4", "boft", "ia3", "oft", "prompt", "whole"],
)
def test_a_step_books_as_much_in_earnest(config: Any, setting: dict[str, Any]) -> None:
    assert planned(config, **setting) == pytest.approx(in_earnest(config, **setting), rel=0.01)


@pytest.mark.parametrize("name", [name for name in sorted(METHODS) if name != "XLORA"])
def test_every_method_on_weights_can_be_planned(name: str) -> None:
    options = {k: v for k, v in next(iter(METHODS[name].examples.values())).items() if k != "target_modules"}
    sized = {"adapter_len": 4, "adapter_layers": 2} if name == "ADAPTION_PROMPT" else {}
    found = plan(LLAMA, CONFIGS[name](**options, **sized, task_type="CAUSAL_LM"), **BATCH)
    assert 0 < found.trainable < found.total
    assert found.items["activations"] > 100_000


@pytest.mark.parametrize("name", ["PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CARTRIDGE", "CPT"])
def test_every_method_on_inputs_can_be_planned(name: str) -> None:
    sized = {"cpt_token_ids": [1, 2, 3]} if name == "CPT" else {"num_virtual_tokens": 4}
    found = plan(LLAMA, CONFIGS[name](**sized, task_type="CAUSAL_LM"), **BATCH)
    assert 0 < found.trainable < found.total


def test_planning_leaves_nothing_behind() -> None:
    """What kernels remember between calls must not be a stand-in."""
    config, ids = lora(lora_dropout=0.1, use_dora=True), torch.randint(0, 300, (2, 64))
    plan(LLAMA, config, **BATCH, quantization="nf4")
    base = quantize_(LlamaForCausalLM(LlamaConfig(**BASE)), "nf4")
    loss = inlay.get_peft_model(base, config).train()(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.isfinite()
    assert config.base_model_name_or_path is None or type(config.base_model_name_or_path) is str


@pytest.mark.parametrize(
    ("config", "task"),
    [
        (GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300), "CAUSAL_LM"),
        (BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300), "SEQ_CLS"),
        (BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300), "TOKEN_CLS"),
        (BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300), "QUESTION_ANS"),
        (
            BertConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=128, vocab_size=300),
            "FEATURE_EXTRACTION",
        ),
        (T5Config(d_model=64, d_ff=128, num_layers=2, num_heads=4, d_kv=16, vocab_size=300, decoder_start_token_id=0), "SEQ_2_SEQ_LM"),
        (MixtralConfig(**BASE, num_local_experts=4), "CAUSAL_LM"),
    ],
    ids=["gpt2", "rows", "tokens", "answers", "features", "t5", "experts"],
)
def test_other_architectures_and_tasks(config: Any, task: str) -> None:
    found = plan(config, lora(task_type=task), **{**BATCH, "padding": True})
    assert found.trainable > 0
    assert found.items["activations"] > 100_000


def test_a_model_of_ones_own() -> None:
    """Three tensors of a layer's output are kept or alive at the most: the input of each layer, and the gradient."""
    found = plan(
        lambda: nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256)),
        None,
        inputs={"input": torch.zeros(1024, 256)},
        dtype="float32",
        device="cpu",
        optimizer="sgd",
    )
    assert found.items["weights"] == 2 * (256 * 256 + 256) * 4
    assert found.items["activations"] >= 2 * 1024 * 256 * 4
    assert found.bytes <= found.items["weights"] * 2 + 5 * 1024 * 256 * 4


# ---- what adds to it --------------------------------------------------------------------------------------------------------------
def test_checkpointing_and_a_smaller_batch_take_less_and_accumulation_keeps_gradients() -> None:
    whole, checkpointed = planned(lora()), planned(lora(), gradient_checkpointing=True)
    halved = planned(lora(), batch_size=1)
    assert checkpointed < whole
    assert halved < whole
    once, twice = plan(LLAMA, None, **BATCH), plan(LLAMA, None, **BATCH, grad_accum=2)
    assert twice.items["gradients"] == 4 * twice.trainable
    assert twice.bytes > once.bytes


def test_a_gpu_has_attention_with_dropout_in_one_kernel() -> None:
    config = GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=300, n_positions=512)
    cpu, gpu = (plan(config, lora(), **{**BATCH, "seq_length": 512, "device": device}) for device in ("cpu", "cuda"))
    assert cpu.items["activations"] - gpu.items["activations"] > 2 * 4 * 512 * 512 * 4
    assert gpu.items["context"] == 600 * 2**20


def test_devices_replicate_or_share() -> None:
    alone, ddp = plan(LLAMA, lora(), **BATCH), plan(LLAMA, lora(), **BATCH, devices=4)
    fsdp = plan(LLAMA, lora(), **BATCH, devices=4, sharding="fsdp")
    assert ddp.bytes == alone.bytes + 4 * alone.trainable
    for name in ("weights", "adapters", "optimizer"):
        assert fsdp.items[name] == -(-alone.items[name] // 4)
    base = LlamaForCausalLM(LLAMA)
    layers = 4 * sum(q.numel() for q in base.model.layers.parameters())
    rest = 4 * sum(q.numel() for n, q in base.named_parameters() if ".layers." not in n)
    assert fsdp.items["gathered"] == layers + rest + 4 * alone.trainable


@pytest.mark.parametrize(
    ("name", "options"), [("adamw", {}), ("sgd", {}), ("sgd_momentum", {"momentum": 0.9}), ("adagrad", {}), ("rmsprop", {})]
)
def test_an_optimizers_state_is_what_torch_keeps(name: str, options: dict[str, Any]) -> None:
    cls = {"adamw": "AdamW", "sgd": "SGD", "sgd_momentum": "SGD", "adagrad": "Adagrad", "rmsprop": "RMSprop"}[name]
    parameters = [nn.Parameter(torch.randn(48, 32)), nn.Parameter(torch.randn(7))]
    real = getattr(torch.optim, cls)(parameters, lr=1e-3, **options)
    for q in parameters:
        q.grad = torch.ones_like(q)
    real.step()
    state = [t for s in real.state.values() for k, t in s.items() if isinstance(t, torch.Tensor) and k != "step"]
    assert optimizer(name).bytes_of(parameters) == sum(t.numel() * t.element_size() for t in state)


def test_adafactor_and_8_bits() -> None:
    from transformers import Adafactor

    matrix = nn.Parameter(torch.randn(48, 32))
    real = Adafactor([matrix], lr=1e-3, relative_step=False, scale_parameter=False)
    matrix.grad = torch.ones_like(matrix)
    real.step()
    kept = sum(t.numel() * 4 for t in real.state[matrix].values() if isinstance(t, torch.Tensor) and t.ndim)
    assert optimizer("adafactor").bytes_of([matrix]) == kept == (48 + 32) * 4
    large = nn.Parameter(torch.empty(128, 128))
    assert optimizer("adamw_8bit").bytes_of([large]) == 2 * (128 * 128 + 4 * 64)
    assert optimizer("adamw_8bit").bytes_of([matrix]) == optimizer("adamw").bytes_of([matrix])
    assert {"paged_adamw_8bit", "lion_8bit", "paged_lion_8bit"} <= set(OPTIMIZERS)


def test_a_paged_state_lies_with_the_host() -> None:
    found = plan(LLAMA, lora(), **BATCH, optimizer="paged_adamw_32bit")
    assert "optimizer" not in found.items
    assert found.host == 8 * found.trainable


def test_remedies_come_in_order_and_stop_once_it_fits() -> None:
    config, first = lora(), plan(LLAMA, lora(), **BATCH)

    def again(setting: Setting) -> Any:
        return plan(LLAMA, config, **vars(setting))

    room = plan(LLAMA, config, **{**BATCH, "batch_size": 1, "grad_accum": 2}, gradient_checkpointing=True).bytes
    found = remedies(first, again, room)
    assert [each.change for each in found] == [{"gradient_checkpointing": True}, {"batch_size": 1, "grad_accum": 2}]
    assert [each.fits for each in found] == [False, True]
    assert found[-1].plan.bytes == room
    none = remedies(first, again, 1)
    assert not any(each.fits for each in none)
    assert {"quantization": "nf4"} in [each.change for each in none]
    assert [each.plan.bytes for each in none] == sorted((each.plan.bytes for each in none), reverse=True)


# ---- what is refused --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("setting", "culprit"),
    [
        ({"quantization": "nf5"}, "quantization 'nf5'.*'nf4'"),
        ({"dtype": "bfloat61"}, "dtype 'bfloat61'.*'bfloat16'"),
        ({"optimizer": "admw"}, "optimizer 'admw'.*'adamw'"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"seq_length": 10**6}, "seq_length 1000000: the model was made for at most 2048"),
        ({"sharding": "fsdq"}, "sharding 'fsdq'.*'fsdp'"),
    ],
)
def test_bad_settings_name_the_culprit(setting: dict[str, Any], culprit: str) -> None:
    with pytest.raises(ValueError, match=culprit):
        plan(LLAMA, lora(), **{**BATCH, **setting})


def test_a_target_that_is_not_there() -> None:
    with pytest.raises(ValueError, match="q_prj"):
        plan(LLAMA, lora(target_modules=["q_prj"]), **BATCH)


def test_what_computes_with_numbers_says_so() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) * x.sum().item()

    with pytest.raises(ValueError, match="depend on numbers"):
        plan(Looking, None, inputs={"x": torch.zeros(2, 4)}, dtype="float32", device="cpu")


def test_a_setting_is_a_value() -> None:
    assert replace(Setting(), batch_size=2) == Setting(batch_size=2)


# ---- a process --------------------------------------------------------------------------------------------------------------------
def test_the_peak_of_a_process() -> None:
    """Two real steps of models of some hundred megabytes, and the most memory that a process had for them."""
    cases = ["LoRA, nf4, checkpointing", "whole model, SGD"]
    words = [
        sys.executable,
        str(Path(__file__).parents[2] / "benchmarks" / "plan.py"),
        "--cases",
        *cases,
        "--seq-length",
        "128",
        "--one-process",
        "--json",
    ]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert abs(float(row["off by"].split()[0])) < 15, row
