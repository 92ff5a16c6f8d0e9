"""The real library and ours in one process: what either writes, the other loads, with the same outputs."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay

from .models import MODELS

WEIGHTS = "adapter_model.safetensors"


def outputs(model: nn.Module, example: dict[str, Tensor]) -> Tensor:
    model.eval()
    with torch.no_grad():
        found = model(**example)
    return found if isinstance(found, Tensor) else found[0]


def jitter(model: nn.Module) -> None:
    """Move everything that is trained away from where it starts; tensors that are shared are moved once."""
    generator = torch.Generator().manual_seed(3)
    for _, q in sorted(model.named_parameters(), key=lambda named: named[1].shape):
        if q.requires_grad:
            q.data += 0.1 * torch.randn(q.shape, generator=generator).to(q.dtype)


def trained(model: nn.Module) -> int:
    return sum(q.numel() for q in model.parameters() if q.requires_grad)


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def same_files(ours: Path, theirs: Path) -> None:
    """Key by key, number by number."""
    mine, its = load_file(ours / WEIGHTS), load_file(theirs / WEIGHTS)
    assert mine.keys() == its.keys()
    for key, tensor in its.items():
        assert mine[key].shape == tensor.shape, key
        assert mine[key].dtype == tensor.dtype, key
        assert torch.equal(mine[key], tensor), key


def same_configs(ours: Path, theirs: Path) -> None:
    mine, its = (json.loads((p / "adapter_config.json").read_text()) for p in (ours, theirs))
    # What HF's class does not know would be a warning there on loading.
    assert mine.keys() <= its.keys() | {"peft_version"}
    assert its.keys() <= mine.keys()


def both_ways(
    name: str,
    method: str,
    folder: Path,
    *,
    by: Callable[[Any, dict[str, Tensor]], Tensor] = outputs,
    exact_files: bool = True,
    same_count: bool = True,
    **options: Any,
) -> None:
    """Peft writes and Inlay reads; Inlay writes and peft reads.

    Args:
        name: of the model.
        method: of the configuration's class in either library.
        by: how outputs of the real library are taken, where its forward is not to be trusted.
        exact_files: files must agree key by key.
        same_count: the real library must train as many numbers.
        options: of the configuration.
    """
    build, example = MODELS[name]
    theirs_in, ours_in, ours_out = folder / "theirs", folder / "ours", folder / "fresh"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(build(), getattr(peft, method)(**options))
        jitter(theirs)
        # Read before writing: saving does not disturb a model, but a check of that is not the point here.
        theirs.save_pretrained(theirs_in)
        expected = by(theirs, example())
        assert not torch.allclose(expected, outputs(build(), example()), rtol=1e-4, atol=1e-4), "the adapter does nothing"

        ours = inlay.PeftModel.from_pretrained(build(), theirs_in)
        close(outputs(ours, example()), expected)

        ours.save_pretrained(ours_in)
        if exact_files:
            same_files(ours_in, theirs_in)
        same_configs(ours_in, theirs_in)
        close(by(peft.PeftModel.from_pretrained(build(), ours_in), example()), expected)

        fresh = inlay.get_peft_model(build(), getattr(inlay, method)(**options))
        if same_count:
            assert trained(fresh) == trained(theirs)
        jitter(fresh)
        fresh.save_pretrained(ours_out)
        close(by(peft.PeftModel.from_pretrained(build(), ours_out), example()), outputs(fresh, example()))
        if not getattr(getattr(inlay, method), "unmergeable", ""):
            fresh.merge_and_unload()


def merged(model: Any, example: dict[str, Tensor]) -> Tensor:
    """Outputs after merging: for layers whose forward in the real library differs from what it merges."""
    model.merge_adapter()
    try:
        return outputs(model, example)
    finally:
        model.unmerge_adapter()


def train(
    model: nn.Module, example: dict[str, Tensor], steps: int = 5, rate: float = 0.05, optimizer: torch.optim.Optimizer | None = None
) -> list[float]:
    """Steps, of plain gradient descent if nothing else is said: it hides no factor as an adaptive optimiser would."""
    model.train()
    optimizer = optimizer or torch.optim.SGD([q for q in model.parameters() if q.requires_grad], lr=rate)
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


def same_steps(name: str, method: str, folder: Path, *, rate: float = 0.05, **options: Any) -> None:
    """From one file of the real library, after the same steps, both have the same losses and outputs."""
    build, example = MODELS[name]
    theirs = peft.get_peft_model(build(), getattr(peft, method)(**options))
    jitter(theirs)
    theirs.save_pretrained(folder)
    ours = inlay.PeftModel.from_pretrained(build(), folder, is_trainable=True)
    start = outputs(theirs, example())
    its, mine = train(theirs, example(), rate=rate), train(ours, example(), rate=rate)
    assert mine == pytest.approx(its, rel=1e-5)
    close(outputs(ours, example()), outputs(theirs, example()))
    assert not torch.allclose(outputs(ours, example()), start, atol=1e-4), "nothing was learned"
