"""Methods that fold a weight in other pieces than those in which it lies on disk are merged as in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import inlay.methods  # noqa: F401  registers them
from inlay import PeftModel, quantize_
from inlay.core.method import METHODS
from inlay.formats import streaming
from inlay.operations.stream_merge import StreamMerge

from .bases import adapter, gpt2, llama, load, requantised_in_pieces, saved, tensors

CASES: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "ROAD": [("ROAD", {"group_size": 4})],
    "DEFT": [("DEFT", {"decomposition_method": "qr"})],
    "PEANUT": [("PEANUT", {"r": 4})],
    "BAT": [("MISS", {"r": 4, "init_weights": "bat"})],
    "WAVEFT": [("WAVEFT", {"n_frequency": 50, "wavelet_family": "sym3"})],
    "OFT": [("OFT", {"oft_block_size": 4})],
    "LN_TUNING": [("LN_TUNING", {})],
    # Rows, and then columns.
    "DORA-ROAD": [("LORA", {"use_dora": True}), ("ROAD", {"group_size": 4})],
    "ROAD-LORA": [("ROAD", {"group_size": 4}), ("LORA", {})],
}
TARGETS = {"llama": ["q_proj", "down_proj", "embed_tokens"], "gpt2": ["c_attn", "mlp.c_proj"]}
BASES = {"llama": lambda: llama(attention_bias=True), "gpt2": gpt2}


def merged_in_memory(base: Path, adapters: list[Path]) -> dict[str, torch.Tensor]:
    tuned: Any = PeftModel.from_pretrained(load(base), adapters[0], "0")
    for i, folder in enumerate(adapters[1:], 1):
        tuned.load_adapter(folder, str(i))
    merged = tuned.merge_and_unload(adapter_names=[str(i) for i in range(len(adapters))])
    return dict(merged.state_dict())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", CASES)
def test_in_the_pieces_of_the_method(case: str, base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(streaming, "AT_ONCE", 4 * 100)
    folder = saved(BASES[base](), tmp_path / "base", torch.float32)
    adapters = [
        adapter(folder, tmp_path / str(i), METHODS[name](target_modules=TARGETS[base], **options), seed=i)  # type: ignore[call-arg]
        for i, (name, options) in enumerate(CASES[case])
    ]
    before, expected = tensors(folder), merged_in_memory(folder, adapters)
    found = tensors(StreamMerge(folder, adapters).run(tmp_path / "out"))
    assert found.keys() == before.keys()
    for key, tensor in found.items():
        torch.testing.assert_close(tensor, expected[key], rtol=1e-5, atol=1e-6)
    assert any(not torch.equal(found[key], before[key]) for key in before)


@pytest.mark.parametrize("base", BASES)
def test_quantised_again(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "base"
    quantize_(load(saved(BASES[base](), tmp_path / "dense", torch.float32)), "nf4").save_pretrained(folder)
    config = METHODS["ROAD"](target_modules=TARGETS[base], group_size=4)  # type: ignore[call-arg]
    tuned = adapter(tmp_path / "dense", tmp_path / "a", config)
    requantised_in_pieces(folder, tuned, tmp_path, monkeypatch)
