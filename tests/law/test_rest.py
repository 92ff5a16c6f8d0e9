"""Adapters rest while a cache of keys and values is handed on: what was put side by side serves the next token, until one changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import inlay
from inlay.core import rest
from inlay.kernels.mixed import add_few, few, linear_in_turn, stack, turn

from .test_rows import base, of, tokens

LINEARS = ["q_proj", "v_proj", "down_proj"]


def served(**ranks: int) -> Any:
    model: Any = None
    for seed, (name, r) in enumerate(ranks.items()):
        config = inlay.LoraConfig(r=r, lora_alpha=3 + seed, target_modules=list(LINEARS), init_lora_weights=False, seed=seed)
        if model is None:
            model = inlay.get_peft_model(base(), config, name)
        else:
            model.add_adapter(name, config)
    return model.eval()


def decoded(model: Any, rows: list[Any], cache: Any, ids: Tensor) -> Tensor:
    """The next token's logits; the cache is as it was."""
    logits = model(input_ids=ids, past_key_values=cache, adapter_names=rows, use_cache=True).logits
    cache.crop(-ids.shape[1])
    return logits


def prompted(model: Any, rows: list[Any], ids: Tensor) -> Any:
    return model(input_ids=ids, adapter_names=rows, use_cache=True).past_key_values


EVEN, BASES, UNEVEN = ["a", "b", "c", "a", "b", "c"], ["__base__", "b", "a", "__base__"], ["a", "b", "a", "c", ("a", "c"), "__base__"]


@pytest.mark.parametrize("rows", [EVEN, sorted(EVEN), BASES, UNEVEN], ids=["even", "in order", "bases", "uneven"])
@pytest.mark.parametrize("ranks", [{"a": 4, "b": 4, "c": 4}, {"a": 4, "b": 2, "c": 3}], ids=["one rank", "ranks"])
@pytest.mark.parametrize("length", [1, 2])
@torch.no_grad()
def test_each_row_of_a_decoded_token_is_as_if_it_were_alone(rows: list[Any], ranks: dict[str, int], length: int) -> None:
    model = served(**ranks)
    ids, following = tokens(len(rows), 5), tokens(len(rows), length)
    cache = prompted(model, rows, ids)
    together = [decoded(model, rows, cache, following) for _ in range(3)]
    for i, row in enumerate(rows):
        with of(model, row):
            alone = model(input_ids=torch.cat((ids, following), 1)[i : i + 1]).logits[0, -length:]
        for logits in together:
            torch.testing.assert_close(logits[i], alone, rtol=1e-5, atol=1e-5)


def _scaled(model: Any) -> None:
    model.set_scale("b", 0.5)


def _written(model: Any) -> None:
    for q in inlay.parameters_of(model, "b"):
        q.mul_(1.5)


def _loaded(model: Any) -> None:
    state = inlay.get_peft_model_state_dict(model, adapter_name="b")
    inlay.set_peft_model_state_dict(model, {key: 2 * t for key, t in state.items()}, adapter_name="b")


def _replaced(model: Any) -> None:
    model.delete_adapter("b")
    model.add_adapter("b", inlay.LoraConfig(r=4, lora_alpha=7, target_modules=list(LINEARS), init_lora_weights=False, seed=9))
    model.eval()


def _moved(model: Any) -> None:
    for q in inlay.parameters_of(model, "b"):
        q.mul_(3)
    model.double().float()


def _assigned(model: Any) -> None:
    state = {key: 3 * t for key, t in model.state_dict().items() if ".b." in key}
    assert state
    model.load_state_dict(state, strict=False, assign=True)


def _pointed(model: Any) -> None:
    written = torch.nn.utils.parameters_to_vector(inlay.parameters_of(model, "b"))
    torch.nn.utils.vector_to_parameters(2 * written, inlay.parameters_of(model, "b"))


def _merged(model: Any) -> None:
    model.merge_adapter(["a"])


@pytest.mark.parametrize("change", [_scaled, _written, _loaded, _replaced, _assigned, _pointed, _moved, _merged])
@torch.no_grad()
def test_a_change_in_the_middle_counts(change: Callable[[Any], None]) -> None:
    model, ids, following = served(a=4, b=4), tokens(4, 5), tokens(4, 1)
    rows = ["a", "b", "b", "a"]
    cache = prompted(model, rows, ids)
    before = decoded(model, rows, cache, following)
    assert torch.equal(before, decoded(model, rows, cache, following))
    change(model)
    after = decoded(model, rows, cache, following)
    with of(model, "b"):
        expected = model(input_ids=following[1:3], past_key_values=_rows_of(cache, [1, 2])).logits
    torch.testing.assert_close(after[1:3], expected, rtol=1e-5, atol=1e-5)
    assert torch.allclose(before[1:3], after[1:3], atol=1e-5) == (change is _merged)
    torch.testing.assert_close(after[::3], before[::3], rtol=1e-5, atol=1e-5)


def _rows_of(cache: Any, rows: list[int]) -> DynamicCache:
    found = DynamicCache()
    for i, layer in enumerate(cache.layers):
        found.update(layer.keys[rows], layer.values[rows], i)
    return found


@torch.no_grad()
def test_a_cache_that_goes_on_has_factors_put_side_by_side_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For each cache anew, and again when other rows come with it."""
    model, made = served(a=4, b=4), []
    monkeypatch.setattr(rest, "stack", lambda factors: made.append(len(factors)) or stack(factors))
    rows, ids, following = ["a", "b", "b", "a"], tokens(4, 5), tokens(4, 1)
    layers = 2 * len(LINEARS)
    for total in (layers, 2 * layers):
        cache = prompted(model, rows, ids)
        made[total - layers :] = []
        for _ in range(3):
            decoded(model, rows, cache, following)
        assert made == [2] * total
    decoded(model, sorted(rows), cache, following)
    assert made == [2] * (3 * layers)


def test_what_rests_is_let_go_with_the_cache() -> None:
    model, rows = served(a=4, b=4), ["a", "b"]
    before = len(rest._of_caches)
    with torch.no_grad():
        cache = prompted(model, rows, tokens(2, 5))
        decoded(model, rows, cache, tokens(2, 1))
    assert len(rest._of_caches) == before + 1
    del cache
    assert len(rest._of_caches) == before


def test_gradients_come_through_a_cache() -> None:
    """Nothing rests where gradients are asked for."""
    model, rows = served(a=4, b=4), ["a", "b"]
    model.set_adapter(["a", "b"])
    with torch.no_grad():
        cache = prompted(model, rows, tokens(2, 5))
        decoded(model, rows, cache, tokens(2, 1))
    decoded(model, rows, cache, tokens(2, 1)).sum().backward()
    assert all(q.grad is not None for name in rows for q in inlay.parameters_of(model, name))


@pytest.mark.parametrize("rows", [((0, 2), (3, 1)), ((1,), (0,)), ((0, 1), (2, 3))])
@pytest.mark.parametrize("scales", [(2.0, 2.0), (2.0, 0.5)])
def test_a_layer_in_the_adapters_order_is_the_layer_and_its_update(rows: Any, scales: tuple[float, float]) -> None:
    torch.manual_seed(0)
    count, times = 4, 2
    x, w, bias = torch.randn(count * times, 6), torch.randn(5, 6), torch.randn(5)
    factors = stack([(torch.randn(3, 6), torch.randn(5, 3), scale) for scale in scales])
    assert factors is not None
    where = few(rows, times, count, x.device)
    expected = torch.nn.functional.linear(x, w, bias)
    for i, mine in enumerate(rows):
        for token in (row * times + t for row in mine for t in range(times)):
            expected[token] += scales[i] * (x[token] @ factors.a[i]) @ factors.b[i]
    torch.testing.assert_close(add_few(torch.nn.functional.linear(x, w, bias), x, where, factors), expected)
    for shape in ((count * times, 6), (count, times, 6)):
        how = turn(few(rows, shape[0] // count, count, x.device), torch.Size(shape), factors)
        assert how is not None
        torch.testing.assert_close(linear_in_turn(x.view(shape), w, bias, how, factors).view(-1, 5), expected)
