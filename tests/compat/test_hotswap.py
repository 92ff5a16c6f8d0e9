"""Hot-swapping on every layout: what comes in by a swap is what comes in by loading, in the memory that is there."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

import inlay
from inlay.compat.hotswap import (
    check_hotswap_configs_compatible,
    hotswap_adapter,
    hotswap_adapter_from_state_dict,
    prepare_model_for_compiled_hotswap,
)

TARGETS = ["table", "grouped", "image", "last"]


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(16, 32)
        self.grouped = nn.Conv1d(32, 32, 3, padding=1, groups=2)
        self.image = nn.Conv2d(32, 8, (1, 3), padding=(0, 1))
        self.last = nn.Linear(8, 5)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.grouped(self.table(ids).mT)
        return self.last(self.image(x.unsqueeze(2)).squeeze(2).mT)


IDS = torch.arange(16).view(2, 8)


def adapted(seed: int, r: int, **options: Any) -> inlay.PeftModel:
    """The same base for all, an adapter for each seed."""
    torch.manual_seed(0)
    model = inlay.get_peft_model(Layers(), inlay.LoraConfig(**({"target_modules": TARGETS, "r": r, "lora_alpha": 6} | options)))
    generator = torch.Generator().manual_seed(seed)
    for name, q in model.named_parameters():
        if "lora_" in name and "magnitude" not in name:
            q.data = torch.randn(q.shape, generator=generator) * 0.3
    return model.eval()


def swap(into: inlay.PeftModel, new: inlay.PeftModel) -> None:
    hotswap_adapter_from_state_dict(into, inlay.get_peft_model_state_dict(new), "default", new.peft_config["default"])


@pytest.mark.parametrize("ranks", [(4, 4), (8, 2), (2, 8)], ids=str)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"last": 6}, "alpha_pattern": {"image": 3}}], ids=str)
def test_a_swap_is_a_load(ranks: tuple[int, int], options: dict[str, Any]):
    old, new = adapted(1, ranks[0]), adapted(2, ranks[1], **options)
    swap(old, new)
    torch.testing.assert_close(old(IDS), new(IDS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_variants_swap_with_their_like(options: dict[str, Any]):
    options |= {"target_modules": ["last"]}
    old, new = adapted(1, 8, **options), adapted(2, 4, **options)
    swap(old, new)
    torch.testing.assert_close(old(IDS), new(IDS), rtol=1e-4, atol=1e-5)


def test_layers_that_the_new_one_leaves_alone_are_the_base():
    for options in ({}, {"use_dora": True}):
        old, new = adapted(1, 4, target_modules=["image", "last"], **options), adapted(2, 4, target_modules=["last"], **options)
        swap(old, new)
        torch.testing.assert_close(old(IDS), new(IDS), rtol=1e-4, atol=1e-5)


def test_nothing_moves_and_nothing_is_compiled_again(tmp_path):
    model = adapted(1, 2)
    before = model(IDS)
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    torch.testing.assert_close(model(IDS), before)
    where = [q.data_ptr() for q in model.parameters()]
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    compiled(IDS)
    compilations = counter.frame_count
    for seed, rank in ((2, 8), (3, 4)):
        new = adapted(seed, rank)
        new.save_pretrained(tmp_path / str(seed))
        hotswap_adapter(compiled, str(tmp_path / str(seed)), "default", torch_device="cpu")
        torch.testing.assert_close(compiled(IDS), new(IDS), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == compilations
    assert [q.data_ptr() for q in model.parameters()] == where
    with pytest.raises(ValueError, match="before"):
        prepare_model_for_compiled_hotswap(compiled, target_rank=8)


def test_what_is_saved_after_it_is_what_it_computes(tmp_path):
    model = adapted(1, 2, rank_pattern={"last": 4}, alpha_pattern={"image": 3})
    prepare_model_for_compiled_hotswap(model, target_rank=8)
    swap(model, adapted(2, 4))
    model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = inlay.PeftModel.from_pretrained(Layers(), tmp_path).eval()
    torch.testing.assert_close(loaded(IDS), model(IDS))


def test_what_cannot_be_is_refused():
    model, other = adapted(1, 4), adapted(2, 4, target_modules=["last"])
    before = model(IDS)
    with pytest.raises(RuntimeError, match="unexpected keys found"):
        swap(other, model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        swap(model, adapted(2, 4))
    model.unmerge_adapter()
    assert torch.equal(model(IDS), before)
    with pytest.raises(ValueError, match="larger rank"):
        prepare_model_for_compiled_hotswap(model, target_rank=2)
    with pytest.raises(ValueError, match="No adapter layers"):
        prepare_model_for_compiled_hotswap(Layers(), target_rank=2)
    with pytest.raises(ValueError, match="use_dora"):
        check_hotswap_configs_compatible(inlay.LoraConfig(), inlay.LoraConfig(use_dora=True))
    with pytest.raises(ValueError, match="num_virtual_tokens, 4 != 5"):
        check_hotswap_configs_compatible(inlay.PromptTuningConfig(num_virtual_tokens=4), inlay.PromptTuningConfig(num_virtual_tokens=5))
    with pytest.raises(ValueError, match="Incompatible PEFT types"):
        check_hotswap_configs_compatible(inlay.LoraConfig(), inlay.IA3Config())
