"""AdapterCache: adapters come when they are used and leave when there is no room."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import inlay

from ..tiny import llama

BYTES = 4 * 2 * (4 + 3)  # rank 2 on a layer of 4 x 3


def base() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3))


def lora(seed: int) -> inlay.LoraConfig:
    return inlay.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, seed=seed)


@pytest.fixture
def shelf(tmp_path: Path) -> tuple[Path, dict[str, Tensor], Tensor]:
    """Six adapters in a folder, and what each makes of one input."""
    x, expected = torch.randn(2, 4), {}
    for i in range(6):
        model = inlay.get_peft_model(base(), lora(i + 1)).eval()
        model.save_pretrained(tmp_path / f"n{i}")
        expected[f"n{i}"] = model(x).detach()
    return tmp_path, expected, x


def served() -> Any:
    return inlay.get_peft_model(base(), lora(0), "own").eval()


def test_the_least_recently_used_leaves(shelf: Any) -> None:
    folder, expected, x = shelf
    model = served()
    own = model(x)
    cache = inlay.AdapterCache(model, folder, max_bytes=3 * BYTES)
    assert cache.available() == [f"n{i}" for i in range(6)]
    for name in ("n0", "n1", "n2", "n0", "n3"):
        with cache.use(name), torch.no_grad():
            assert torch.equal(model(x), expected[name])
    assert cache.loaded == ["n2", "n0", "n3"]
    assert cache.nbytes == 3 * BYTES
    assert (cache.hits, cache.misses) == (1, 4)
    assert "n1" not in model.peft_config
    assert torch.equal(model(x), own)
    with cache.rows(["n5", "__base__"]):
        both = model(x)
    torch.testing.assert_close(both[0], expected["n5"][0])
    torch.testing.assert_close(both[1], base()(x)[1])
    assert cache.loaded == ["n0", "n3", "n5"]


def test_pinned_and_used_ones_stay(shelf: Any) -> None:
    folder, *_ = shelf
    cache = inlay.AdapterCache(served(), lambda name: folder / name, max_adapters=2)
    cache.pin("n0")
    with cache.use("n1"):
        with pytest.raises(ValueError, match="n2.*in use or pinned"):
            cache.load("n2")
        with pytest.raises(ValueError, match="in use"):
            cache.evict("n1")
    assert cache.loaded == ["n0", "n1"]
    cache.load("n2")
    assert cache.loaded == ["n0", "n2"]
    cache.unpin("n0")
    cache.load("n3")
    assert cache.loaded == ["n2", "n3"]
    cache.evict("n2")
    assert len(cache) == 1
    with pytest.raises(ValueError, match="n33.*'n3'"):
        inlay.AdapterCache(served(), folder).load("n33")


def test_adapters_of_the_model_are_left_alone(shelf: Any) -> None:
    folder, _, x = shelf
    model = inlay.get_peft_model(base(), lora(0), "n0").eval()
    own = model(x)
    cache = inlay.AdapterCache(model, folder, max_adapters=1)
    with pytest.raises(ValueError, match="has an adapter 'n0' already"):
        cache.load("n0")
    cache.load("n1")
    with pytest.raises(ValueError, match="has an adapter 'n1' already"):
        inlay.AdapterCache(model, folder).load("n1")
    cache.load("n2")
    assert torch.equal(model(x), own)
    assert list(model.peft_config) == ["n0", "n2"]


def test_retrained_modules_and_prompts_take_room(tmp_path: Path) -> None:
    config = inlay.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"])
    host = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 50))
    inlay.get_peft_model(host, config).save_pretrained(tmp_path / "head")
    cache = inlay.AdapterCache(inlay.get_peft_model(nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 50)), lora(0), "own"), tmp_path)
    cache.load("head")
    assert cache.nbytes == BYTES + 4 * (3 * 50 + 50)
    prompt = inlay.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
    inlay.get_peft_model(llama(), prompt).save_pretrained(tmp_path / "prompt")
    cache = inlay.AdapterCache(inlay.get_peft_model(llama(), prompt, "own"), tmp_path)
    cache.load("prompt")
    assert cache.nbytes == 4 * 5 * 32


def test_threads_share_a_cache(shelf: Any) -> None:
    folder, expected, x = shelf
    model = served()
    cache, wrong = inlay.AdapterCache(model, folder, max_adapters=4), list[Any]()

    def serve(start: int) -> None:
        try:
            with torch.no_grad():
                for i in range(60):
                    name = f"n{(start + i * (start + 1)) % 6}"
                    with cache.use(name):
                        if not torch.equal(model(x), expected[name]):
                            wrong.append(name)
        except Exception as error:
            wrong.append(error)

    threads = [threading.Thread(target=serve, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(cache) <= 4


def test_switching_does_not_look_at_adapters_that_are_not_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    from inlay.core import attach

    model = served()
    for i in range(5):
        config = lora(i)
        config.inference_mode = True
        model.add_adapter(f"m{i}", config)
    walks = []
    walk = attach.places
    monkeypatch.setattr(attach, "places", lambda m: walks.append(1) or walk(m))
    model.set_adapter("m0")
    assert len(walks) == 1  # "own" was trained and rests now
    assert not any(q.requires_grad for q in model.parameters())
    model.set_adapter("m1")
    assert len(walks) == 1
    model.set_adapter("own")
    assert sum(q.requires_grad for q in model.parameters()) == 2


def test_other_threads_compute_while_adapters_come_and_go() -> None:
    """Layers that nobody else adapts become what they were in the middle of other threads' calls."""
    model = inlay.get_peft_model(nn.Sequential(*(nn.Linear(4, 4) for _ in range(12))), lora(0), "own").eval()
    coming = inlay.LoraConfig(r=2, target_modules=[str(i) for i in range(1, 12)], inference_mode=True)
    x, stop, found = torch.randn(2, 4), threading.Event(), []
    expected, before = model(x).detach(), sys.getswitchinterval()

    def serve() -> None:
        try:
            with torch.no_grad(), model.use_adapters("own"):
                while not stop.is_set():
                    found.append(torch.equal(model(x), expected))
        except Exception as error:
            found.append(error)

    threads = [threading.Thread(target=serve) for _ in range(3)]
    sys.setswitchinterval(1e-7)
    try:
        for thread in threads:
            thread.start()
        for _ in range(25):
            model.add_adapter("t", coming)
            model.delete_adapter("t")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        sys.setswitchinterval(before)
    assert set(found) == {True}


def test_a_call_that_reads_its_weight_ends_without_the_adapter() -> None:
    """The last adapter of a norm leaves between the look at the host's places and the call."""
    norm = nn.LayerNorm(4)
    model = inlay.get_peft_model(nn.Sequential(norm, nn.Linear(4, 3)), inlay.LoraConfig(r=2, target_modules=["1"]), "own").eval()
    x = torch.randn(2, 4)
    expected = norm(x)
    model.add_adapter("t", inlay.LNTuningConfig(target_modules=["0"]))

    class Places(dict[str, Any]):
        def get(self, key: str, default: Any = None) -> Any:
            model.delete_adapter("t")
            return default

    vars(norm)["_inlay"] = Places(vars(norm)["_inlay"])
    assert torch.equal(norm(x), expected)
    assert type(norm) is nn.LayerNorm


def test_a_call_that_began_under_an_adapter_ends_without_it() -> None:
    """A thread may stand at the first line of a layer's forward when the last adapter leaves that layer."""
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), lora(0), "own").eval()
    coming = inlay.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False)
    x, host = torch.randn(2, 4), model.get_base_model()[1]
    expected = host(x)
    model.add_adapter("t", coming)
    begun, places = host.forward, dict(vars(host)["_inlay"])
    held = vars(host)["_inlay"]
    model.delete_adapter("t")
    assert type(host) is nn.Linear
    assert torch.equal(begun(x), expected)
    assert held == places


def test_what_was_deleted_comes_again(shelf: Any) -> None:
    folder, expected, x = shelf
    model = served()
    cache = inlay.AdapterCache(model, folder)
    cache.load("n0")
    model.delete_adapter("n0")
    with cache.use("n0"), torch.no_grad():
        assert torch.equal(model(x), expected["n0"])
    assert (cache.loaded, cache.nbytes, cache.misses) == (["n0"], BYTES, 2)
