"""Methods that are bound to a decomposition of the weight, merged on disk with little memory, give what they give in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from inlay.core.method import METHODS
from inlay.initializers import eigenvectors as module
from inlay.initializers.svd import singular_vectors
from inlay.methods import osf
from inlay.operations.stream_merge import StreamMerge

from .bases import adapter, in_memory, llama, mixtral, saved, tensors

STARTS: dict[str, dict[str, Any]] = {
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "kasa": {"kasa_config": {}},
    "loftq": {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 3}},
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: ("LORA", {"r": 2, **options}) for name, options in STARTS.items()},
    "osf": ("OSF", {}),
    "osf, a share": ("OSF", {"effective_rank": 0.8}),
    "frod": ("FROD", {"sparse_rate": 0.2}),
    "frod without its basis": ("FROD", {"sparse_rate": 0.2, "save_projection": False}),
}


@pytest.mark.parametrize("name", CASES)
def test_they_merge_to_what_they_are_in_memory(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Square, high and wide weights, and stacks."""
    monkeypatch.setattr(osf, "AT_ONCE", 0)
    monkeypatch.setattr(module, "AT_ONCE", 0)
    monkeypatch.setattr(module, "PIECE", 100)
    method, options = CASES[name]
    targets = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
    made = mixtral(num_hidden_layers=1)
    if name == "loftq":
        # Whether a number is rounded up or down may hang on the last digit of a product.
        targets, made = {"target_modules": ["q_proj", "up_proj", "down_proj"]}, llama(num_hidden_layers=1)
    base = saved(made, tmp_path / "base", torch.float32)
    folder = adapter(base, tmp_path / "a", METHODS[method](**targets, **options))  # type: ignore[arg-type]
    expected = tensors(in_memory(base, [folder], tmp_path / "reference"))
    found, before = tensors(StreamMerge(base, [folder]).run(tmp_path / "out")), tensors(base)
    assert expected.keys() == found.keys()
    assert len([key for key in before if not torch.equal(found[key], before[key])]) >= 3
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("smallest", [False, True])
@pytest.mark.parametrize("shape", [(120, 150), (150, 120), (2, 130, 130)])
def test_few_singular_vectors_of_many(shape: tuple[int, ...], smallest: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """From a space that is cut down again and again, and of a weight in pieces."""
    monkeypatch.setattr(module, "LARGE", 100)
    monkeypatch.setattr(module, "MANY", 50)
    monkeypatch.setattr(module, "SPARE", 4)
    monkeypatch.setattr(module, "AT_ONCE", 0)
    monkeypatch.setattr(module, "PIECE", 1000)
    tried: list[int] = []
    step = module._in_krylov_space

    def counted(w: Tensor, *rest: Any) -> Tensor | None:
        found = step(w, *rest)
        tried.append(found is not None)
        return found

    monkeypatch.setattr(module, "_in_krylov_space", counted)
    w = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    u, s, v = singular_vectors(w, 2, smallest=smallest)
    part = slice(-2, None) if smallest else slice(0, 2)
    left, values, right = torch.linalg.svd(w.double(), full_matrices=False)
    torch.testing.assert_close(s, values[..., part])
    torch.testing.assert_close(u * s.unsqueeze(-2) @ v.mT, left[..., part] * values[..., part].unsqueeze(-2) @ right[..., part, :])
    assert tried == [True] * (2 if len(shape) > 2 else 1)
