"""A training step: HF peft and Inlay against the same model, frozen.

The floor is what no adapter can go below: the base's forward pass and the gradient of its inputs, no parameter trained. The model
is a small Llama with random weights, every linear layer of its blocks adapted, fed with embeddings that require gradients.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import peft
import torch
from _harness import Saved, arguments, interleave, ratio, report, torch_arguments
from transformers import LlamaConfig, LlamaForCausalLM

import inlay

HIDDEN, LAYERS, BATCH, LENGTH, VOCABULARY = 512, 6, 4, 256, 2048


@dataclass(frozen=True)
class Case:
    """What is trained, and in which precision.

    Attributes:
        options: of `LoraConfig`.
        dtype: of the base.
        autocast: run under bfloat16 autocast.
    """

    name: str
    options: dict[str, Any]
    dtype: torch.dtype = torch.float32
    autocast: bool = False


CASES = {
    case.name: case
    for case in (
        Case("lora", {}),
        Case("dropout", {"lora_dropout": 0.1}),
        Case("dora", {"use_dora": True}),
        Case("lora-bf16", {}, dtype=torch.bfloat16),
        Case("lora-autocast", {}, autocast=True),
        Case("dora-bf16", {"use_dora": True}, dtype=torch.bfloat16),
    )
}


def base(dtype: torch.dtype, hidden: int = HIDDEN, layers: int = LAYERS) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": hidden, "intermediate_size": 43 * hidden // 16, "num_hidden_layers": layers, "num_attention_heads": 8}
    config = LlamaConfig(**sizes, vocab_size=VOCABULARY, use_cache=False)
    return LlamaForCausalLM(config).to(dtype).train()


def adapted(library: Any, case: Case) -> torch.nn.Module:
    config = library.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", **case.options)
    model = library.get_peft_model(base(case.dtype), config)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        # B starts at zero, where some of the work could be skipped.
        if "lora_B" in name:
            parameter.data.normal_(0, 0.01, generator=generator)
    return model.train()


def models(case: Case) -> dict[str, torch.nn.Module]:
    return {"floor": base(case.dtype).requires_grad_(False), "HF": adapted(peft, case), "Inlay": adapted(inlay, case)}


def loss_of(model: torch.nn.Module, case: Case) -> Callable[[], torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    labels = torch.randint(0, VOCABULARY, (BATCH, LENGTH), generator=generator)
    inputs = torch.randn(BATCH, LENGTH, HIDDEN, generator=generator).to(case.dtype).requires_grad_()

    def loss() -> torch.Tensor:
        inputs.grad = None
        with torch.autocast("cpu", torch.bfloat16) if case.autocast else contextlib.nullcontext():
            return model(inputs_embeds=inputs, labels=labels).loss

    return loss


def step(model: torch.nn.Module, case: Case, with_optimizer: bool) -> Callable[[], None]:
    loss = loss_of(model, case)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-6) if with_optimizer and trained else None

    def run() -> None:
        for parameter in trained:
            parameter.grad = None
        loss().backward()
        if optimizer is not None:
            optimizer.step()

    return run


def saved_bytes(model: torch.nn.Module, case: Case) -> int:
    with Saved(model) as saved:
        loss_of(model, case)()
    return saved.nbytes


def needed_bytes(floor: torch.nn.Module, case: Case) -> int:
    """What the gradients of the adapters cannot do without: what the floor saves, and each adapted layer's input. For the
    gradient of DoRA's magnitudes also its output, which is the sum that they scale."""
    with Saved(floor) as saved:

        def add(_module: Any, args: Any, output: Any) -> None:
            saved.add(args[0])
            if case.options.get("use_dora"):
                saved.add(output)

        linears = [m for n, m in floor.named_modules() if isinstance(m, torch.nn.Linear) and "lm_head" not in n]
        hooks = [m.register_forward_hook(add) for m in linears]
        loss_of(floor, case)()
    for hook in hooks:
        hook.remove()
    return saved.nbytes


def measure(case: Case, rounds: int, with_optimizer: bool, cpu_time: bool) -> dict[str, Any]:
    found = models(case)
    times = interleave({name: step(model, case, with_optimizer) for name, model in found.items()}, rounds, cpu_time)
    saved = {name: saved_bytes(model, case) for name, model in found.items()}
    needed = needed_bytes(found["floor"], case)
    return {
        "case": case.name,
        "floor ms": round(1e3 * median(times["floor"])),
        "HF / floor": f"{ratio(times, 'HF', 'floor'):.2f}",
        "Inlay / floor": f"{ratio(times, 'Inlay', 'floor'):.2f}",
        "HF / Inlay": f"{ratio(times, 'HF', 'Inlay'):.2f}",
        "saved MB: floor": f"{saved['floor'] / 1e6:.0f}",
        "needed": f"{needed / 1e6:.0f}",
        "Inlay": f"{saved['Inlay'] / 1e6:.0f}",
        "HF": f"{saved['HF'] / 1e6:.0f}",
        "Inlay / needed": f"{saved['Inlay'] / needed:.2f}",
    }


def main() -> None:
    parser = arguments(__doc__, rounds=30)
    parser.add_argument("--case", action="append", choices=list(CASES), help="measure this case only (may be repeated)")
    parser.add_argument("--optimizer", action="store_true", help="let the adapters take an AdamW step, too")
    torch_arguments(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [measure(CASES[name], options.rounds, options.optimizer, options.cpu_time) for name in options.case or CASES]
    title = f"Training step, Llama (hidden {HIDDEN}, {LAYERS} layers, {BATCH} x {LENGTH} tokens), r=8 on all linear layers"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
