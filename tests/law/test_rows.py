"""Many adapters on one model: a row each, a thread each, trained together."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

import inlay
from inlay.core import mixed as core_mixed
from inlay.core import rest as core_rest
from inlay.core.rows import Order, grouped
from inlay.kernels.mixed import stack

ROWS: list[Any] = ["a", "b", "__base__", "a", ("a", "b"), "c", "d", "b"]


def base() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=40, pad_token_id=0, eos_token_id=39
    )
    return LlamaForCausalLM(config).eval()


def adapted() -> Any:
    """Two LoRAs of different ranks and targets, one with a bias of its own, an (IA)^3 and a rotation."""
    model = inlay.get_peft_model(base(), inlay.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, seed=1), "a")
    model.add_adapter("b", inlay.LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False, lora_bias=True, seed=2))
    gains = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"], "init_ia3_weights": False, "seed": 3}
    model.add_adapter("c", inlay.IA3Config(**gains))
    model.add_adapter("d", inlay.OFTConfig(oft_block_size=4, target_modules=["q_proj", "up_proj"], init_weights=False, seed=4))
    return model.eval()


def of(model: Any, row: Any) -> Any:
    return model.use_adapters(*(() if row == "__base__" else (row,) if isinstance(row, str) else row))


def tokens(rows: int = len(ROWS), length: int = 7) -> Tensor:
    return torch.randint(1, 39, (rows, length), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("length", [2, 30])
@torch.no_grad()
def test_each_row_is_as_if_it_were_alone(length: int) -> None:
    """With few tokens the factors stand side by side, with many each adapter has a segment."""
    model, ids = adapted(), tokens(length=length)
    together = model(input_ids=ids, adapter_names=ROWS).logits
    for i, row in enumerate(ROWS):
        with of(model, row):
            torch.testing.assert_close(together[i], model(input_ids=ids[i : i + 1]).logits[0], rtol=1e-5, atol=1e-5)
    # What was kept of the factors does not outlive a change of them.
    for q in model.parameters():
        q.data *= 1.5
    again = model(input_ids=ids, adapter_names=ROWS).logits
    with of(model, "a"):
        torch.testing.assert_close(again[3], model(input_ids=ids[3:4]).logits[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("beams", [1, 3])
def test_generation_by_rows(beams: int) -> None:
    model, ids = adapted(), tokens()
    options = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "min_new_tokens": 5}
    mask = torch.ones_like(ids)
    together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=ROWS, **options)
    for i, row in enumerate(ROWS):
        with of(model, row):
            alone = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
        assert torch.equal(together[i], alone[0]), row


def test_a_generation_puts_factors_side_by_side_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the next one anew, so that what has changed in between counts."""
    model = inlay.get_peft_model(base(), inlay.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, seed=1), "a").eval()
    model.add_adapter("b", inlay.LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj"], init_lora_weights=False, seed=2))
    made: list[int] = []
    monkeypatch.setattr(core_rest, "stack", lambda factors: made.append(len(factors)) or stack(factors))
    ids, options = tokens(4), {"max_new_tokens": 5, "do_sample": False, "min_new_tokens": 5}
    mask = torch.ones_like(ids)
    for scale in (1.0, 40.0):
        for q in inlay.parameters_of(model, "b"):
            q.data *= scale
        made.clear()
        together = model.generate(input_ids=ids, attention_mask=mask, adapter_names=["b", "a", "b", "a"], **options)
        assert made == [2, 2]
        for i, name in enumerate("baba"):
            with model.use_adapters(name):
                alone = model.generate(input_ids=ids[i : i + 1], attention_mask=mask[i : i + 1], **options)
            assert torch.equal(together[i], alone[0])


class Kernels(TorchDispatchMode):
    """The kernels that run, in their order."""

    def __init__(self) -> None:
        super().__init__()
        self.run: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.run.append(str(func))
        return func(*args, **(kwargs or {}))


def kernels(run: Callable[[], Tensor]) -> tuple[Tensor, list[str]]:
    with Kernels() as seen:
        found = run()
    return found, seen.run


@pytest.mark.parametrize("row", ["a", "b", "c", "d", "__base__", ("a", "b"), ("c", "a", "d")], ids=str)
@pytest.mark.parametrize("merged", [False, True])
def test_one_distinct_adapter_costs_nothing_extra(row: Any, merged: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch whose rows all name the same runs the kernels of that adapter alone, forth, back and in generation, and no other."""
    monkeypatch.setattr(core_mixed, "mixed", lambda *_: pytest.fail("the batch is not mixed"))
    model, ids = adapted(), tokens(3)
    model.set_adapter(["a", "b", "c", "d"])
    if merged:
        model.merge_adapter(["a"])
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}

    def trained(**rows: Any) -> Tensor:
        loss = model(input_ids=ids, labels=ids, **rows).loss
        if loss.requires_grad:
            loss.backward()
        return loss.detach()

    for run in (
        trained,
        lambda **rows: model(input_ids=ids, **rows).logits.detach(),
        lambda **rows: model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **rows, **options),
    ):
        # Gradients are added to, not made.
        run(adapter_names=[row] * 3)
        together, many = kernels(lambda run=run: run(adapter_names=[row] * 3))
        with of(model, row):
            alone, one = kernels(run)
        assert torch.equal(together, alone)
        assert many == one


def test_layers_that_adapters_of_a_batch_do_not_tell_apart_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of "b" and of "c" are all the same to a layer that has only "a", or that "a" alone acts on with either."""
    monkeypatch.setattr(core_mixed, "mixed", lambda *_: pytest.fail("the batch is not mixed here"))
    model = inlay.get_peft_model(nn.ModuleDict({"first": nn.Linear(4, 4), "last": nn.Linear(4, 4)}), _lora(0, "first"), "a")
    for name in "bc":
        model.add_adapter(name, _lora(1, "last"))
    first = model.get_base_model().get_submodule("first")
    x = torch.randn(4, 4)

    def at_rows(rows: list[Any]) -> Tensor:
        with model.session.local(rows=rows):
            return first(x)

    for rows, name in ((["b", "c", "__base__", "b"], "__base__"), (["a", ("a", "b"), ("c", "a"), "a"], "a")):
        found, many = kernels(lambda rows=rows: at_rows(rows))
        with of(model, name):
            alone, one = kernels(lambda: first(x))
        assert torch.equal(found, alone)
        assert many == one


@torch.no_grad()
def test_a_cache_goes_on_in_the_order_of_the_caller() -> None:
    model, ids = adapted(), tokens()
    first = model(input_ids=ids[:, :5], adapter_names=ROWS, use_cache=True)
    second = model(input_ids=ids[:, 5:], past_key_values=first.past_key_values, adapter_names=ROWS)
    torch.testing.assert_close(second.logits, model(input_ids=ids, adapter_names=ROWS).logits[:, 5:], rtol=1e-5, atol=1e-5)


def doubled(logits: Tensor, batch: Any) -> Tensor:
    return 2 * inlay.next_token_loss(logits, batch)


@pytest.mark.parametrize("names", ["ab", "abcd"])
def test_adapters_trained_together_are_those_of_solo_runs(names: str) -> None:
    """Data of different lengths, losses, learning rates and clipping of their own; three steps of momentum."""
    data = {name: {"input_ids": ids, "labels": ids} for name, ids in ((n, tokens(i + 1, 5 + 2 * i)) for i, n in enumerate("abcd"))}
    rates = {"a": 0.1, "b": 0.03, "c": 0.3, "d": 0.1}

    def trained(together: str) -> tuple[dict[str, list[Tensor]], list[dict[str, float]]]:
        model = adapted().train()
        model.set_adapter(list(together))
        jobs = {
            name: inlay.Job(
                torch.optim.SGD(inlay.parameters_of(model, name), lr=rates[name], momentum=0.9),
                loss=doubled if name == "b" else inlay.next_token_loss,
                max_grad_norm=0.05 if name == "a" else None,
            )
            for name in together
        }
        losses = [inlay.step_together(model, jobs, {name: data[name] for name in together}) for _ in range(3)]
        return {name: [q.detach().clone() for q in inlay.parameters_of(model, name)] for name in together}, losses

    found, losses = trained(names)
    for name in names:
        alone, its = trained(name)
        before = inlay.parameters_of(adapted(), name)
        for step, other in zip(losses, its, strict=True):
            assert step[name] == pytest.approx(other[name], rel=1e-5)
        for one, other in zip(found[name], alone[name], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
        assert any(not torch.equal(one, start) for one, start in zip(found[name], before, strict=True))
    model = adapted()
    with pytest.raises(ValueError, match="'b' is not active"):
        model.set_adapter("a")
        inlay.step_together(model, {n: inlay.Job(torch.optim.SGD(inlay.parameters_of(model, n), 0.1)) for n in "ab"}, {"b": data["b"]})
    with pytest.raises(ValueError, match="no job"):
        inlay.step_together(model, {}, {"a": data["a"]})


def test_terms_of_the_loss_are_those_of_solo_runs() -> None:
    """AdaLoRA adds one of its own to the loss, which the other adapters do not feel."""
    ids, model = tokens(2, 5), inlay.get_peft_model(base(), inlay.LoraConfig(r=2, target_modules=["q_proj"], seed=1), "a").train()
    options = {"target_modules": ["q_proj"], "total_step": 100, "orth_reg_weight": 5.0, "seed": 2}
    model.add_adapter("b", inlay.AdaLoraConfig(init_r=3, target_r=2, **options))
    model.set_adapter("b")
    alone = model(input_ids=ids, labels=ids).loss
    alone.backward()
    gradients = [q.grad.clone() for q in inlay.parameters_of(model, "b")]
    model.zero_grad()
    model.set_adapter(["a", "b"])
    jobs = {name: inlay.Job(torch.optim.SGD(inlay.parameters_of(model, name), lr=1.0)) for name in "ab"}
    before = [q.detach().clone() for q in inlay.parameters_of(model, "b")]
    losses = inlay.step_together(model, jobs, {name: {"input_ids": ids, "labels": ids} for name in "ab"})
    assert losses["b"] == pytest.approx(alone.item(), rel=1e-5)
    assert losses["b"] - losses["a"] > 1
    for old, new, gradient in zip(before, inlay.parameters_of(model, "b"), gradients, strict=True):
        torch.testing.assert_close(old - new, gradient, rtol=1e-4, atol=1e-6)


def test_what_the_model_takes_is_given_for_all_rows() -> None:
    model, ids = adapted(), tokens(2, 4)
    model.set_adapter(["a", "b"])
    jobs = {name: inlay.Job(torch.optim.SGD(inlay.parameters_of(model, name), lr=0.1)) for name in "ab"}
    batch = {"input_ids": ids, "labels": ids}
    with pytest.raises(ValueError, match="batch of 'b' has no 'position_ids'"):
        inlay.step_together(model, jobs, {"a": batch | {"position_ids": torch.arange(4).expand(2, 4)}, "b": batch})


def test_eight_threads_with_eight_adapters() -> None:
    """4,800 calls, each of whose answers is compared: each thread sees its own adapter, of a method of its own, and no other."""
    torch.manual_seed(0)
    on = {"target_modules": ["0", "2"], "seed": 1}
    configs = [
        inlay.LoraConfig(r=2, init_lora_weights=False, **on),
        inlay.LoraConfig(r=3, init_lora_weights=False, use_dora=True, **on),
        inlay.IA3Config(feedforward_modules=[], init_ia3_weights=False, **on),
        inlay.OFTConfig(oft_block_size=2, init_weights=False, **on),
        inlay.HRAConfig(r=2, init_weights=False, **on),
        inlay.LoHaConfig(r=2, init_weights=False, **on),
        inlay.VeraConfig(r=2, init_weights=False, **on),
        inlay.LoraConfig(r=1, lora_alpha=3, init_lora_weights=False, lora_bias=True, **on),
    ]
    model: Any = inlay.get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)), configs[0], "0")
    for i, config in enumerate(configs[1:], 1):
        model.add_adapter(str(i), config)
    model.eval()
    x, expected = torch.randn(2, 4), {}
    for name in (*map(str, range(8)), "__base__"):
        with of(model, name), torch.no_grad():
            expected[name] = model(x)
    answers = list(expected.values())
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(answers) for b in answers[:i])
    together = threading.Barrier(8, timeout=60)

    @torch.no_grad()
    def serve(name: str) -> list[bool]:
        right: list[bool] = []
        other = str((int(name) + 3) % 8)
        together.wait()
        for _ in range(200):
            with model.use_adapters(name):
                right.append(torch.equal(model(x), expected[name]))
                with model.disable_adapter():
                    right.append(torch.equal(model(x), expected["__base__"]))
            mixed = model(x, adapter_names=[name, other])
            right.append(torch.allclose(mixed, torch.stack((expected[name][0], expected[other][1])), atol=1e-6))
        return right

    # Threads take turns in the middle of calls, again and again.
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(8) as pool:
            right = [list(found) for found in pool.map(serve, map(str, range(8)))]
    finally:
        sys.setswitchinterval(before)
    assert [len(found) for found in right] == [600] * 8
    assert all(all(found) for found in right)


def served() -> tuple[Any, Tensor, dict[str, Tensor]]:
    """A model with three adapters, an input, and what each makes of it."""
    torch.manual_seed(0)
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(4, 3)), _lora(0, "0"), "0")
    for i in range(1, 3):
        model.add_adapter(str(i), _lora(i, "0"))
    model.eval()
    x, expected = torch.randn(2, 4), {}
    for name in map(str, range(3)):
        with model.use_adapters(name), torch.no_grad():
            expected[name] = model(x)
    return model, x, expected


@pytest.mark.parametrize("compiled", [False, True])
def test_tasks_that_take_turns_keep_their_adapters(compiled: bool) -> None:
    """Asyncio tasks of one thread, each inside its block while the others run."""
    torch._dynamo.reset()
    model, x, expected = served()
    run = torch.compile(model, backend="eager", fullgraph=True) if compiled else model

    async def serve(name: str) -> list[bool]:
        right = []
        with model.use_adapters(name):
            for _ in range(20):
                await asyncio.sleep(0)
                right.append(torch.allclose(run(x), expected[name]))
        return right

    async def all_of_them() -> list[list[bool]]:
        return await asyncio.gather(*map(serve, expected))

    assert all(all(right) for right in asyncio.run(all_of_them()))


def test_a_compiled_model_tells_threads_apart() -> None:
    """Each block of a thread holds for that thread's runs of a graph, whatever other threads do at the time."""
    torch._dynamo.reset()
    model, x, expected = served()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    together = threading.Barrier(3, timeout=60)

    def serve(name: str) -> list[bool]:
        right = []
        with torch.no_grad():
            for _ in range(40):
                with model.use_adapters(name):
                    together.wait()
                    right.append(torch.allclose(compiled(x), expected[name]))
        return right

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(serve, expected)) == [[True] * 40] * 3
    with model.use_adapters("1"), model.use_adapters("2"):
        torch.testing.assert_close(compiled(x), expected["2"])
    torch.testing.assert_close(compiled(x), expected["0"])


def _lora(seed: int, *targets: str) -> inlay.LoraConfig:
    return inlay.LoraConfig(r=2, target_modules=list(targets or ("0", "2")), init_lora_weights=False, seed=seed)


@pytest.mark.parametrize("rows", [["a", "b", "a"], ["a", "a", "a"], ["a", "b", "c"]])
def test_the_host_works_once_for_all_rows(rows: list[str]) -> None:
    model = inlay.get_peft_model(nn.Sequential(nn.Linear(4, 4)), inlay.LoraConfig(target_modules=["0"], init_lora_weights=False), "a")
    model.add_adapter("b", inlay.IA3Config(target_modules=["0"], feedforward_modules=[], init_ia3_weights=False))
    model.add_adapter("c", inlay.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False))
    layer: Any = model.get_base_model().get_submodule("0")
    calls: list[int] = []
    host = nn.Linear(4, 4)
    host.load_state_dict({k: v for k, v in layer.state_dict().items() if "adapters" not in k})
    layer._host_forward = lambda x: calls.append(len(x)) or nn.functional.linear(x, host.weight, host.bias)
    model(torch.randn(3, 4), adapter_names=rows)
    assert calls == [3]


def test_what_cannot_be_put_in_order_is_gathered_layer_by_layer() -> None:
    rows, x = ("a", "b", "a"), torch.zeros(3, 2)
    assert Order.of(rows, (x,), {}) is not None
    assert Order.of(("a", "a", "b"), (x,), {}) is None
    assert Order.of(rows, (x,), {"past_key_values": object()}) is None
    assert Order.of(rows, (x,), {"pixel_values": torch.zeros(5, 2)}) is None
    assert Order.of(rows, (x,), {"something": {"of": x}}) is None
    text = {"input_ids": torch.zeros(3, 4)}
    assert Order.of(rows, (), text) is not None
    assert Order.of(rows, (), {"pixel_values": torch.zeros(3, 2)}) is not None
    # Three images may all be of one row.
    assert Order.of(rows, (), text | {"pixel_values": torch.zeros(3, 2)}) is None
    assert Order.of(rows, (), text | {"position_ids": torch.zeros(3, 4)}) is not None
    assert Order.of(rows, (), text | {"position_ids": torch.zeros(3, 3, 4)}) is None
    moved = Order.of(rows, (x,), {"cache_position": torch.arange(3)})
    assert moved is not None
    assert torch.equal(moved.into((torch.arange(3),), {"cache_position": torch.arange(3)})[1]["cache_position"], torch.arange(3))
    assert moved.into((torch.arange(3),), {})[0][0].tolist() == [0, 2, 1]
    assert moved.rows == ("a", "a", "b")
    assert [g.rows for g in grouped(("a", ("a", "b"), "a"))] == [(0, 2), (1,)]


class OnAxes(nn.Module):
    """Its positions are in time, height and width, ``(3, rows, length)``, as in models of text and images."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens, self.host = nn.Embedding(9, 4), nn.Linear(4, 4)

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> Tensor:
        time, height, width = position_ids
        return self.host(self.tokens(input_ids) * (1 + time + 0.1 * height + 0.01 * width).unsqueeze(-1))


def test_positions_on_axes_stay_with_their_rows() -> None:
    model = inlay.get_peft_model(OnAxes(), _lora(1, "host"), "a").eval()
    model.add_adapter("b", _lora(2, "host"))
    ids, rows = torch.arange(6).view(3, 2), ["a", "b", "a"]
    positions = torch.randint(0, 9, (3, 3, 2), generator=torch.Generator().manual_seed(1))
    together = model(input_ids=ids, position_ids=positions, adapter_names=rows)
    for i, name in enumerate(rows):
        with model.use_adapters(name):
            torch.testing.assert_close(together[i : i + 1], model(input_ids=ids[i : i + 1], position_ids=positions[:, i : i + 1]))


def test_wrong_rows_are_named() -> None:
    model = adapted()
    with pytest.raises(ValueError, match="'A' not found. Loaded: a, b, c, d"):
        model(input_ids=tokens(2), adapter_names=["A", "b"])
    with pytest.raises(ValueError, match="3 adapter names were given for a batch of 2"):
        model(input_ids=tokens(2), adapter_names=["a", "b", "a"])
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="a list with a name for each row; 'a' is one for all"):
            call(input_ids=tokens(2), adapter_names="a")
        for row in (None, 3, ["a", None]):
            with pytest.raises(ValueError, match=re.escape(f"or '__base__', not {row!r}")):
                call(input_ids=tokens(2), adapter_names=["a", row])


@pytest.mark.parametrize("rows", [("a", "a", "a"), ("a", "b", "a"), ("__base__",) * 3])
def test_rows_that_are_too_few_are_counted_at_the_entry_and_at_a_layer(rows: tuple[str, ...]) -> None:
    model, told = adapted(), "3 adapter names were given for a batch of 4; give one for each row"
    session, layer = model.session, model.get_base_model().model.layers[0].self_attn.q_proj
    entered: list[Any] = []
    model.get_base_model().register_forward_pre_hook(lambda *called: entered.append(called))
    for given in ({"input_ids": tokens(4)}, {"inputs_embeds": torch.randn(4, 3, 16)}):
        with pytest.raises(ValueError, match=told):
            model(**given, adapter_names=rows)
        with pytest.raises(ValueError, match=told):
            model.generate(**given, adapter_names=rows, max_new_tokens=1)
    with pytest.raises(ValueError, match=told):
        model(tokens(4), adapter_names=rows)
    assert not entered
    with session.local(rows=rows), pytest.raises(ValueError, match=told):
        layer(torch.randn(4, 3, layer.in_features))
    with session.local(rows=rows):
        assert layer(torch.randn(6, layer.in_features)).shape == (6, layer.out_features)


def test_a_name_is_for_one_row_of_the_call() -> None:
    """A layer may see several entries of a row, as with beams; whoever calls the model names each row."""
    model = adapted()
    for call in (model, model.generate):
        with pytest.raises(ValueError, match="2 adapter names were given for a batch of 4; give one for each row"):
            call(input_ids=tokens(4), adapter_names=["a", "b"])
    beams = model.generate(input_ids=tokens(2), adapter_names=["a", "b"], num_beams=2, max_new_tokens=2, do_sample=False)
    assert beams.shape == (2, tokens(2).shape[1] + 2)


def test_rows_that_are_too_few_are_counted_where_the_host_reads_its_weight() -> None:
    host = nn.Sequential(nn.MultiheadAttention(4, 2, batch_first=True))
    model = inlay.get_peft_model(host, inlay.LoraConfig(r=2, target_modules=["0"]))
    x = torch.randn(4, 3, 4)
    with model.session.local(rows=("default",) * 3), pytest.raises(ValueError, match="3 adapter names were given for a batch of 4"):
        model.get_base_model().get_submodule("0")(x, x, x)
