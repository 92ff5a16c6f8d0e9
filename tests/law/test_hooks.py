"""What the core offers to methods beside `fold`: banks, derived starts, terms of the loss, steps, calls, whole modules."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import inlay
from inlay.capabilities import capabilities
from inlay.core.adapter import Adapter
from inlay.core.additive import Additive
from inlay.core.attach import attach, detach
from inlay.core.config import CONFIGS
from inlay.core.inlaid import adapters_of
from inlay.core.inner import Inner
from inlay.core.method import METHODS, Method, register
from inlay.core.param import Param, normal
from inlay.core.site import Site, Whole

TARGETS = ["0", "2"]


@pytest.fixture(autouse=True)
def registries() -> Iterator[None]:
    """What a test registers is gone after it."""
    before = dict(METHODS), dict(CONFIGS)
    yield
    for table, kept in zip((METHODS, CONFIGS), before, strict=True):
        table.clear()
        table.update(kept)


class Model(nn.Sequential):
    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Any:
        y = super().forward(x)
        return y if labels is None else SimpleNamespace(loss=(y - labels).square().mean(), logits=y)


def declare(**body: Any) -> type[Method]:
    """A registered method, with these members."""
    body |= {"__annotations__": {"peft_type": "str | None"}, "peft_type": "TOY", "prefix": "toy_", "__module__": __name__}
    bases = body.pop("bases", (Additive,))
    return register(dataclass(type("ToyConfig", bases, body)))


def test_a_trainable_bank_is_trained_once_and_saved_once(tmp_path: Path) -> None:
    def shared(self: Any, sites: Mapping[str, Site]) -> nn.Module:
        assert list(sites) == TARGETS
        bank = nn.Module()
        bank.toy_bank = nn.Parameter(torch.full((6, 6), 0.5))
        return bank

    toy = declare(
        shared=shared,
        params=lambda self, site: {"toy_gain": Param((1,), normal())},
        delta=lambda self, p: p.toy_gain * p.shared.toy_bank,
    )
    model = inlay.get_peft_model(Model().bfloat16(), toy(target_modules=TARGETS))
    assert [n.rpartition(".")[2] for n, q in model.named_parameters() if q.requires_grad] == ["toy_gain", "toy_bank", "toy_gain"]
    assert all(q.dtype == torch.float32 for q in model.parameters() if q.requires_grad)
    model(torch.ones(2, 6, dtype=torch.bfloat16)).sum().backward()
    first = adapters_of(model.get_base_model(), "default")[0]
    first.shared.toy_bank.data += 1
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {
        "base_model.model.0.toy_gain", "base_model.model.2.toy_gain", "base_model.toy_bank"
    }  # fmt: skip
    again = inlay.PeftModel.from_pretrained(Model().bfloat16(), tmp_path)
    x = torch.randn(2, 6, dtype=torch.bfloat16)
    assert torch.equal(again(x), model(x))


def test_tensors_of_the_bank_that_files_repeat(tmp_path: Path) -> None:
    def shared(self: Any, sites: Mapping[str, Site]) -> nn.Module:
        bank = nn.Module()
        bank.experts = nn.ParameterDict({"all": nn.Parameter(torch.eye(6))})
        return bank

    toy = declare(
        shared=shared,
        params=lambda self, site: {},
        repeated=lambda self, p: {"toy_A.weight": "experts.all"},
        bank_key=lambda self, name: None,
        delta=lambda self, p: p.shared.experts["all"],
    )
    model = inlay.get_peft_model(Model(), toy(target_modules=TARGETS))
    adapters_of(model.get_base_model(), "default")[0].shared.experts["all"].data *= 3
    model.save_pretrained(tmp_path)
    found = load_file(tmp_path / "adapter_model.safetensors")
    assert set(found) == {f"base_model.model.{path}.toy_A.weight" for path in TARGETS}
    assert all(torch.equal(t, 3 * torch.eye(6)) for t in found.values())
    x = torch.randn(2, 6)
    assert torch.equal(inlay.PeftModel.from_pretrained(Model(), tmp_path)(x), model(x))
    # A gathered state dict has the bank where it is registered.
    gathered = {k: 2 * t for k, t in model.state_dict().items()}
    saved = inlay.get_peft_model_state_dict(model, state_dict=gathered)
    assert torch.equal(saved["base_model.model.2.toy_A.weight"], 6 * torch.eye(6))


def test_derived_buffers_follow_from_the_base_and_are_in_no_file(tmp_path: Path) -> None:
    def derive(self: Any, p: Adapter) -> None:
        p.toy_base.copy_(p.site.read()[0].detach())

    toy = declare(
        params=lambda self, site: {
            "toy_gain": Param((1,)),
            "toy_base": Param(("out", "in"), trainable=False, persistent=False),
        },
        derive=derive,
        delta=lambda self, p: p.toy_gain * p.toy_base,
    )
    model = inlay.get_peft_model(Model(), toy(target_modules=TARGETS))
    for p in adapters_of(model.get_base_model(), "default"):
        assert torch.equal(p.toy_base, p.site.module.weight)
        p.toy_gain.data.fill_(0.5)
    model.save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {f"base_model.model.{path}.toy_gain" for path in TARGETS}
    x = torch.randn(2, 6)
    assert torch.equal(inlay.PeftModel.from_pretrained(Model(), tmp_path)(x), model(x))


def gain(p: Adapter) -> Tensor:
    return p.toy_gain * torch.eye(6)


def test_a_term_of_the_loss_in_training() -> None:
    def penalty(self: Any, adapters: Sequence[Adapter]) -> Tensor:
        return sum((p.toy_gain.square().sum() for p in adapters), torch.zeros(()))

    toy = declare(params=lambda self, site: {"toy_gain": Param((1,), normal())}, delta=lambda self, p: gain(p), penalty=penalty)
    model = inlay.get_peft_model(Model(), toy(target_modules=TARGETS))
    x, labels = torch.randn(2, 6), torch.randn(2, 6)
    plain = model.eval()(x, labels=labels).loss
    extra = sum(p.toy_gain.item() ** 2 for p in adapters_of(model.get_base_model(), "default"))
    assert extra > 0
    assert model.train()(x, labels=labels).loss.item() == pytest.approx(plain.item() + extra)
    with model.disable_adapter():
        assert model(x, labels=labels).loss.item() == pytest.approx(Model()(x, labels=labels).loss.item())


def test_steps_of_any_optimiser_that_holds_the_adapters() -> None:
    seen: list[list[str]] = []
    toy = declare(
        params=lambda self, site: {"toy_gain": Param((1,), normal())},
        delta=lambda self, p: gain(p),
        stepped=lambda self, adapters, optimizer: seen.append([p.path for p in adapters if p.toy_gain.grad is not None]),
    )
    model = inlay.get_peft_model(Model(), toy(target_modules=TARGETS))
    other = torch.optim.SGD(Model().parameters())
    optimizer = torch.optim.AdamW([q for q in model.parameters() if q.requires_grad])
    model(torch.randn(2, 6)).sum().backward()
    other.step()
    assert seen == []
    optimizer.step()
    assert seen == [TARGETS]


def test_what_a_method_takes_from_the_call_reaches_its_layers_row_by_row() -> None:
    def around(self: Any, p: Adapter, inner: Inner, x: Tensor) -> Tensor:
        y = inner(x)
        return y + p.toy_gain * p.call["task"].unsqueeze(-1) if "task" in p.call else y

    toy = declare(
        bases=(Method,),
        params=lambda self, site: {"toy_gain": Param((1,), lambda t, _: t.fill_(1))},
        around=around,
        takes=("task",),
        given=lambda self, model, args, kwargs: {"task": kwargs["task"]} if "task" in kwargs else {},
        unmergeable="it depends on the task",
    )
    base, x, task = Model(), torch.randn(3, 6), torch.tensor([1.0, 2.0, 3.0])
    model = inlay.get_peft_model(Model(), toy(target_modules=["2"]))
    torch.testing.assert_close(model(x, task=task), base(x) + task[:, None])
    # Outside a call of the model there is nothing to take; and the base never sees the argument.
    torch.testing.assert_close(model(x), base(x))
    with model.disable_adapter():
        torch.testing.assert_close(model(x, task=task), base(x))
    model.add_adapter("other", inlay.LoraConfig(target_modules=["0"], init_lora_weights=False))
    rows = ["default", "other", "default"]
    mixed = model(x, task=task, adapter_names=rows)
    torch.testing.assert_close(mixed[[0, 2]], (base(x) + task[:, None])[[0, 2]])
    with pytest.raises(TypeError, match="depends on the task"):
        model.merge_adapter(adapter_names=["default"])
    compiled = torch.compile(model, backend="eager", fullgraph=False)
    torch.testing.assert_close(compiled(x, task=task), model(x, task=task))


def test_a_method_on_whole_modules() -> None:
    def around(self: Any, p: Adapter, inner: Inner, x: Tensor) -> Any:
        return inner(x) * (1 + p.toy_gain)

    toy = declare(
        bases=(Method,),
        site_of=lambda self, module: Whole(module),
        params=lambda self, site: {"toy_gain": Param((1,))},
        around=around,
        unmergeable="it acts on a module",
    )

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = nn.Linear(6, 6)

        def forward(self, states: Tensor) -> Tensor:
            return torch.tanh(self.inside(states))

    base = nn.ModuleDict({"block": Block()})
    base.forward = lambda x: base["block"](states=x)  # type: ignore[method-assign]
    x = torch.randn(2, 6)
    before = base(x)
    attach(base, toy(target_modules=["block"]), "a")
    assert torch.equal(base(x), before)
    (p,) = adapters_of(base, "a")
    p.toy_gain.data += 1
    torch.testing.assert_close(base(x), 2 * before)
    twin = copy.deepcopy(base["block"])
    torch.testing.assert_close(twin(x), 2 * before)
    detach(base, "a")
    assert type(base["block"]) is Block
    assert torch.equal(base(x), before)


def test_a_changed_structure_is_taken_back() -> None:
    def rebuild(self: Any, base: nn.Sequential) -> Callable[[], None]:
        base.append(nn.Linear(6, 6))
        return lambda: base.pop(3) and None

    toy = declare(params=lambda self, site: {"toy_gain": Param((1,))}, delta=lambda self, p: gain(p), rebuild=rebuild)
    model = Model()
    attach(model, toy(target_modules=["3"]), "a")
    assert len(model) == 4
    detach(model, "a")
    assert len(model) == 3
    with pytest.raises(ValueError, match="nothing"):
        attach(model, toy(target_modules=["9"]), "a")
    assert len(model) == 3


def test_the_method_of_the_contributors_page(tmp_path: Path) -> None:
    """The page's own code, registered by its decorator, does everything."""
    page = (Path(__file__).parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    code = page.split("```python\n")[1].split("```")[0]
    assert len(code.strip().splitlines()) <= 25
    space: dict[str, Any] = {"__name__": __name__}
    exec(compile(code, "CONTRIBUTING.md", "exec"), space)
    gains = space["GainConfig"]
    model = inlay.get_peft_model(Model(), gains(target_modules=TARGETS))
    x = torch.randn(2, 6)
    torch.testing.assert_close(model(x), Model()(x))
    for p in adapters_of(model.get_base_model(), "default"):
        p.gain_g.data += torch.arange(6) / 6
    before = model(x)
    base = Model()
    for i in (0, 2):
        base[i].weight.data *= 1 + torch.arange(6) / 6
    torch.testing.assert_close(before, base(x))
    model.save_pretrained(tmp_path)
    again = inlay.PeftModel.from_pretrained(Model(), tmp_path)
    assert isinstance(again.peft_config["default"], gains)
    assert torch.equal(again(x), before)
    torch.testing.assert_close(again.merge_and_unload()(x), before)
    facts = capabilities("gain")
    assert (facts.merges, facts.to_lora, facts.parameters, facts.count) == (True, "svd", "in", 4096)
    assert facts.equation == "W diag(g)"


def test_a_package_registers_its_method_by_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    """As an installed package would: ``[project.entry-points."inlay.methods"]``."""
    import importlib
    import importlib.metadata

    import inlay.methods

    loaded: list[str] = []
    entry = SimpleNamespace(load=lambda: loaded.append("theirs"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry] if group == "inlay.methods" else [])
    monkeypatch.setattr(inlay.methods.pkgutil, "iter_modules", lambda path: [])
    importlib.reload(inlay.methods)
    assert loaded == ["theirs"]


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_magnitudes_over_any_delta(dropout: float) -> None:
    toy = declare(params=lambda self, site: {"toy_gain": Param((1,))}, delta=lambda self, p: gain(p))
    model = inlay.get_peft_model(Model().double(), toy(target_modules=TARGETS, use_dora=True, input_dropout=dropout))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(model.eval()(x), Model().double()(x))
    y = x
    base = model.get_base_model()
    for layer, p in zip((base[0], base[2]), adapters_of(base, "default"), strict=True):
        p.toy_gain.data += 0.7
        p.toy_magnitude_vector.data *= 1.5
        v = layer.weight + 0.7 * torch.eye(6)
        y = y @ (p.toy_magnitude_vector[:, None] * v / v.norm(dim=1, keepdim=True)).T + layer.bias
        y = torch.tanh(y) if p.path == "0" else y
    torch.testing.assert_close(model(x), y)
    twin = copy.deepcopy(model)
    torch.testing.assert_close(twin(x), y)
    if dropout:
        model.train()
        assert not torch.allclose(model(x), model(x))
