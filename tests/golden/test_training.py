"""Training from one file: after the same steps both libraries have the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import inlay

from .models import MODELS
from .support import close, jitter, outputs

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}),
    "lora-bias": ("llama", "LoraConfig", {"r": 4, "bias": "lora_only", "use_rslora": True}),
    "dora": ("llama", "LoraConfig", {"r": 4, "use_dora": True, "target_modules": ["q_proj", "down_proj"]}),
    "lora-embedding": ("llama", "LoraConfig", {"r": 4, "target_modules": ["embed_tokens", "q_proj"]}),
    "lora-tokens-tied": ("llama-tied", "LoraConfig", {"r": 4, "trainable_token_indices": [3, 17, 38]}),
    "lora-head": ("llama", "LoraConfig", {"r": 4, "modules_to_save": ["lm_head"]}),
    "lora-experts": ("mixtral", "LoraConfig", {"r": 2, "target_parameters": ["experts.down_proj"], "target_modules": []}),
    "lora-convolutions": ("convolutions", "LoraConfig", {"r": 3, "target_modules": ["line", "plane", "space", "head"]}),
    "dora-convolutions": ("convolutions", "LoraConfig", {"r": 3, "target_modules": ["plane", "space"], "use_dora": True}),
    "ia3": ("llama", "IA3Config", {}),
    "oft": ("llama", "OFTConfig", {"oft_block_size": 4}),
    "oft-exact": ("llama", "OFTConfig", {"oft_block_size": 8, "use_cayley_neumann": False}),
    "oft-ball": ("llama", "OFTConfig", {"oft_block_size": 4, "coft": True, "eps": 0.05}),
    "oft-shared": ("llama", "OFTConfig", {"oft_block_size": 4, "block_share": True}),
    "hra": ("llama", "HRAConfig", {"r": 4}),
    "hra-gram-schmidt": ("llama", "HRAConfig", {"r": 3, "apply_GS": True}),
    "hra-convolutions": ("convolutions", "HRAConfig", {"r": 4, "target_modules": ["plane", "plain", "head"]}),
    "vera": ("gpt2", "VeraConfig", {"r": 4, "fan_in_fan_out": True}),
    "tokens": ("llama", "TrainableTokensConfig", {"token_indices": [3, 7, 38]}),
}


def train(model: nn.Module, example: dict[str, Tensor], steps: int = 4) -> list[float]:
    """Steps of plain gradient descent, which hides no factor as an adaptive optimiser would."""
    model.train()
    optimizer = torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        found = model(**example)
        y = found if isinstance(found, Tensor) else found[0]
        loss = (y - torch.linspace(-1, 1, y.shape[-1])).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("case", CASES)
def test_same_steps(case: str, tmp_path: Path) -> None:
    name, method, options = CASES[case]
    build, example = MODELS[name]
    theirs = peft.get_peft_model(build(), getattr(peft, method)(**options))
    jitter(theirs)
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(build(), tmp_path, is_trainable=True)
    start = outputs(theirs, example())
    its, mine = train(theirs, example()), train(ours, example())
    assert mine == pytest.approx(its, rel=1e-5)
    close(outputs(ours, example()), outputs(theirs, example()))
    assert not torch.allclose(outputs(ours, example()), start, atol=1e-4), "nothing was learned"
