"""A batch whose rows have adapters of their own: prefill and decode, HF peft and Inlay, over the frozen floor and one adapter.

Rows: 16, with eight LoRA adapters (r=8 on every linear layer of the blocks) in turn, not side by side. The floor is the same model
without adapters; the adapter part is what is over it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from statistics import median
from typing import Any

import peft
import torch
from _harness import arguments, interleave, ratio, report, torch_arguments
from step import HIDDEN, LAYERS, VOCABULARY, base

import inlay

ROWS, ADAPTERS, PROMPT = 16, 8, 128
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(library: Any, model: torch.nn.Module) -> torch.nn.Module:
    config = library.LoraConfig(r=8, target_modules=list(LINEARS), task_type="CAUSAL_LM")
    model = library.get_peft_model(model, config, "a0")
    for i in range(1, ADAPTERS):
        model.add_adapter(f"a{i}", library.LoraConfig(r=8, target_modules=list(LINEARS), task_type="CAUSAL_LM"))
    for i in range(ADAPTERS):
        state = library.get_peft_model_state_dict(model, adapter_name=f"a{i}")
        generator = torch.Generator().manual_seed(i)
        drawn = {key: 0.03 * torch.randn(state[key].shape, generator=generator) for key in sorted(state)}
        library.set_peft_model_state_dict(model, drawn, adapter_name=f"a{i}")
    return model.eval()


def names() -> list[str]:
    return [f"a{i % ADAPTERS}" for i in range(ROWS)]


def forward(model: torch.nn.Module, length: int, **options: Any) -> Callable[[], torch.Tensor]:
    """One forward of ``length`` tokens after a prompt; the prompt itself where it is as long."""
    ids = torch.randint(0, VOCABULARY, (ROWS, PROMPT), generator=torch.Generator().manual_seed(2))
    if length == PROMPT:
        return lambda: model(input_ids=ids, use_cache=False, **options).logits
    past = model(input_ids=ids, use_cache=True, **options).past_key_values

    def run() -> torch.Tensor:
        logits = model(input_ids=ids[:, :length], past_key_values=past, use_cache=True, **options).logits
        past.crop(-length)
        return logits

    return run


def generation(model: torch.nn.Module, length: int, **options: Any) -> Callable[[], torch.Tensor]:
    """``length`` new tokens after a prompt of one, by the model's own ``generate``."""
    ids = torch.randint(0, VOCABULARY, (ROWS, 1), generator=torch.Generator().manual_seed(2))
    mask, further = torch.ones_like(ids), {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "use_cache": True}
    return lambda: model.generate(input_ids=ids, attention_mask=mask, **further, **options)


@torch.no_grad()
def measure(models: tuple[Any, Any, Any], phase: str, make: Callable[..., Any], length: int, rounds: int, cpu_time: bool) -> dict[str, Any]:
    floor, hf, ours = models
    variants = {
        "floor": make(floor, length),
        "one adapter": make(ours, length),
        "HF": make(hf, length, adapter_names=names()),
        "Inlay": make(ours, length, adapter_names=names()),
    }
    mine, its = variants["Inlay"](), variants["HF"]()
    if mine.is_floating_point():
        torch.testing.assert_close(mine, its, rtol=1e-3, atol=1e-4)
    else:
        # Of the tokens that are chosen few differ: where two logits are nearly the same.
        assert (mine == its).float().mean() > 0.9
    times = interleave(variants, rounds, cpu_time)
    over = {n: median(t - f for t, f in zip(times[n], times["floor"], strict=True)) for n in ("HF", "Inlay", "one adapter")}
    return {
        "phase": phase,
        "floor ms": f"{1e3 * median(times['floor']):.1f}",
        "HF / floor": f"{ratio(times, 'HF', 'floor'):.2f}",
        "Inlay / floor": f"{ratio(times, 'Inlay', 'floor'):.2f}",
        "one adapter / floor": f"{ratio(times, 'one adapter', 'floor'):.2f}",
        "adapter part ms: HF": f"{1e3 * over['HF']:.1f}",
        "Inlay": f"{1e3 * over['Inlay']:.1f}",
        "HF / Inlay": f"{over['HF'] / over['Inlay']:.1f}",
    }


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    torch_arguments(parser)
    parser.add_argument("--hidden", type=int, default=HIDDEN, help="width of the model")
    parser.add_argument("--layers", type=int, default=LAYERS, help="of the model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    phases = ("prefill", forward, PROMPT), ("decode", forward, 1), ("generate, 16 tokens", generation, 16)
    floor, first, second = (base(torch.float32, options.hidden, options.layers).eval() for _ in range(3))
    models = floor, adapted(peft, first), adapted(inlay, second)
    rows = [measure(models, *phase, options.rounds, options.cpu_time) for phase in phases]
    title = f"{ROWS} rows, {ADAPTERS} adapters, Llama (hidden {options.hidden}, {options.layers} layers), prompts of {PROMPT} tokens"
    report(title, rows, options.json)


if __name__ == "__main__":
    main()
