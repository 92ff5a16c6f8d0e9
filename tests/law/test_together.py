"""Adapters of every two methods in one model: added, active together, saved and loaded each, merged in their order, deleted;
and who acts where, in threads and tasks."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay
from inlay.core.inlaid import places
from inlay.core.place import Place

from .cases import CASES, METHOD_CASES
from .layouts import LAYOUTS
from .support import BY_NAME, REFUSED, adapter_places, close, jitter

ON = "linear"
HERE = [case for case in METHOD_CASES if (case, ON) not in REFUSED]
# Each method with the one that is so many places further in the table, so that each is the first and the second of some pairs;
# and one of each family with all.
OFTEN = {(a, HERE[(i + step) % len(HERE)]) for i, a in enumerate(HERE) for step in (1, 7)}
ALL = [(a, b) for a in HERE for b in HERE if a != b]


class Net(nn.Module):
    """Two layers of which adapters know only one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.host = next(x for x in LAYOUTS if x.name == ON).build()
        self.last = nn.Linear(6, 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.host(x)))


def config(case: str) -> Any:
    cls, options = CASES[case]
    return cls(target_modules=["host"], **options)


def mixed(*cases: str) -> inlay.PeftMixedModel:
    model = inlay.get_peft_model(Net(), config(cases[0]), adapter_name="a0", mixed=True)
    assert type(model) is inlay.PeftMixedModel
    for i, case in enumerate(cases[1:], 1):
        model.add_adapter(f"a{i}", config(case))
    for i in range(len(cases)):
        jitter(model.get_base_model(), f"a{i}")
    return model.eval()


def example() -> Tensor:
    return BY_NAME[ON].example()[0]


def by_fold(model: inlay.PeftMixedModel, x: Tensor, *names: str) -> Tensor:
    (place,) = adapter_places(model.get_base_model())
    w, b = place.fold(names)
    own = {"host.weight": w} if b is None else {"host.weight": w, "host.bias": b}
    return torch.func.functional_call(Net(), own, (x,))


@pytest.mark.parametrize(("first", "second"), [p if p in OFTEN else pytest.param(*p, marks=pytest.mark.slow) for p in ALL])
def test_every_two_methods(first: str, second: str, tmp_path: Path) -> None:
    model, x = mixed(first, second), example()
    base = Net()(x)
    own = model.get_base_model().host._parameters["weight"]
    alone, kept = {}, own.clone()
    for names in (("a0",), ("a1",), ("a0", "a1"), ("a1", "a0")):
        model.set_adapter(list(names))
        alone[names] = model(x)
        close(alone[names], by_fold(model, x, *names))
    with model.disable_adapter():
        close(model(x), base, 1e-12)
    # Merged in the order in which they act, and back to the bit.
    for names in (("a0", "a1"), ("a1", "a0")):
        model.merge_adapter(list(names), safe_merge=True)
        model.set_adapter(list(names))
        close(model(x), alone[names])
        model.unmerge_adapter()
        assert model.get_base_model().host._parameters["weight"] is own
        assert torch.equal(own, kept)
    model.set_adapter("a0")
    close(model(x), alone["a0",])
    # Each has its folder.
    model.save_pretrained(tmp_path)
    again = inlay.PeftMixedModel.from_pretrained(Net(), tmp_path / "a0", "a0").eval()
    assert type(again) is inlay.PeftMixedModel
    again.load_adapter(tmp_path / "a1", "a1")
    again.eval()
    for names in (("a1",), ("a1", "a0")):
        again.set_adapter(list(names))
        close(again(x), alone[names], 1e-6)
    model.delete_adapter("a0")
    assert model.active_adapters == ["a1"]
    close(model(x), alone["a1",])
    model.delete_adapter("a1")
    assert not list(places(model.get_base_model()))
    assert model.get_base_model().host._parameters["weight"] is own


# ---- merging ----------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("case", HERE)
def test_merging_and_unmerging_change_no_bit(case: str, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    model = inlay.get_peft_model(Net().to(dtype), config(case), adapter_name="a0")
    jitter(model.get_base_model(), "a0")
    own = dict(model.get_base_model().host.named_parameters(recurse=False))
    before = {n: q.detach().clone() for n, q in own.items()}
    for _ in range(3):
        model.merge_adapter(safe_merge=True)
        merged = model.get_base_model().host._parameters["weight"]
        assert merged.dtype == dtype
        assert merged is not own["weight"]
        model.unmerge_adapter()
    for name, q in model.get_base_model().host._parameters.items():
        if q is not None:
            assert q is own[name]
            assert torch.equal(q, before[name])


@pytest.mark.parametrize("case", HERE)
def test_a_broken_adapter_is_not_merged(case: str) -> None:
    model = mixed("LORA", case)
    (place,) = [p for p in places(model.get_base_model()) if isinstance(p, Place)]
    own = place.site.module._parameters["weight"]
    kept = own.clone()
    for q in place.adapters["a1"].parameters():
        q.data.fill_(float("nan"))
    for q in place.adapters["a1"].shared.parameters() if isinstance(place.adapters["a1"].shared, nn.Module) else ():
        q.data.fill_(float("nan"))
    with pytest.raises((ValueError, RuntimeError)):
        model.merge_adapter(["a0", "a1"], safe_merge=True)
    assert place.site.module._parameters["weight"] is own
    assert torch.equal(own, kept)
    assert place.merged == ()


def test_three_methods_are_merged_in_the_order_in_which_they_act() -> None:
    model, x = mixed("HRA", "LORA", "IA3"), example()
    for names in (["a0", "a1", "a2"], ["a2", "a1", "a0"], ["a1", "a0"]):
        model.set_adapter(names)
        y = model(x)
        model.merge_adapter()
        assert adapter_places(model.get_base_model())[0].merged == tuple(names)
        close(model(x), y)
        # One more goes on top of those that are in.
        model.unmerge_adapter()
        for name in names:
            model.merge_adapter([name])
        close(model(x), y)
        model.unmerge_adapter()
    plain = model.merge_and_unload(adapter_names=["a1", "a0"])
    close(plain(x), y)


# ---- who acts where ---------------------------------------------------------------------------------------------------------
EIGHT = ["LORA", "IA3", "HRA", "OFT", "LOHA", "VERA", "DELORA", "BOFT"]


def test_blocks_nest() -> None:
    model, x = mixed("LORA", "IA3", "HRA"), example()
    base = Net()(x)
    alone = {}
    for names in ((), ("a0",), ("a1",), ("a2", "a0")):
        with model.use_adapters(*names):
            alone[names] = model(x)
    close(alone[()], base, 1e-12)
    model.set_adapter("a0")
    with model.disable_adapter():
        with model.use_adapters("a2", "a0"):
            close(model(x), alone["a2", "a0"], 0)
            with model.disable_adapter():
                close(model(x), alone[()], 0)
                rows = ["a1", "__base__", ("a2", "a0"), "a0"]
                mixed_rows = model(x, adapter_names=rows)
                close(model(x), alone[()], 0)
            with model.use_adapters("a1"):
                close(model(x), alone["a1",], 0)
            close(model(x), alone["a2", "a0"], 0)
        close(model(x), alone[()], 0)
    for i, names in enumerate((("a1",), (), ("a2", "a0"), ("a0",))):
        close(mixed_rows[i], alone[names][i])
    close(model(x), alone["a0",], 0)
    with pytest.raises(ValueError, match="not found"), model.use_adapters("a9"):
        pass
    with pytest.raises(KeyError), model.disable_adapter():
        raise KeyError
    close(model(x), alone["a0",], 0)


def test_eight_tasks_have_eight_adapters() -> None:
    model, x = mixed(*EIGHT), example()
    expected = {}
    for i in range(8):
        with model.use_adapters(f"a{i}"):
            expected[i] = model(x)
    base = Net()(x)

    async def request(i: int) -> int:
        right = 0
        for _ in range(25):
            with model.use_adapters(f"a{i}"):
                await asyncio.sleep(0)
                right += torch.equal(model(x), expected[i])
                with model.disable_adapter():
                    await asyncio.sleep(0)
                    right += torch.allclose(model(x), base, rtol=0, atol=1e-12)
                    with model.use_adapters(f"a{(i + 3) % 8}"):
                        await asyncio.sleep(0)
                        right += torch.equal(model(x), expected[(i + 3) % 8])
                        rows = [f"a{(i + j) % 8}" for j in range(4)]
                        y = model(x, adapter_names=rows)
                        await asyncio.sleep(0)
                        right += all(torch.allclose(y[j], expected[(i + j) % 8][j], rtol=1e-9, atol=1e-9) for j in range(4))
                await asyncio.sleep(0)
                right += torch.equal(await asyncio.to_thread(model, x), expected[i])
        return right

    async def all_of_them() -> list[int]:
        return await asyncio.gather(*(request(i) for i in range(8)))

    with torch.no_grad():
        model.set_adapter("a5")
        assert asyncio.run(all_of_them()) == [125] * 8
        assert torch.equal(model(x), expected[5])
