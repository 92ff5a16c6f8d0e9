"""Swapping the values of adapters in place, for every method: what comes in by a swap is what comes in by loading."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

import inlay
from inlay.compat.hotswap import hotswap_adapter_from_state_dict, prepare_model_for_compiled_hotswap
from inlay.core.inlaid import session_of
from inlay.core.targets import explain_targets

from .cases import CASES, METHOD_CASES, SELECTED
from .layouts import Layout
from .support import BY_NAME, REFUSED, acting, adapted, adapter_places, adapters, close, config_of, differs, jitter, over


def another(case: str, layout: Layout, **options: Any) -> nn.Module:
    """An adapter of the same method with other values."""
    model = adapted(case, layout, **options)
    jitter(model, "a", by=-0.25)
    return model


def swap(into: nn.Module, new: nn.Module) -> None:
    session = session_of(new)
    assert session is not None
    hotswap_adapter_from_state_dict(into, inlay.get_peft_model_state_dict(new, adapter_name="a"), "a", session.configs["a"])


def memory(model: nn.Module) -> list[int]:
    return [t.data_ptr() for p in adapters(model) for t in [*p.parameters(), *p.buffers()]]


@over(acting("linear", "conv2d-groups", "embedding", "layer-norm", "experts", "attention"))
def test_a_swap_is_a_load(case: str, layout: Layout) -> None:
    model, new, example = adapted(case, layout), another(case, layout), layout.example()
    before, wanted, where = model(*example), new(*example), memory(model)
    assert differs(before, wanted)
    swap(model, new)
    close(model(*example), wanted)
    assert memory(model) == where


@pytest.mark.parametrize("case", ["LORA", "HRA", "LOHA"])
def test_a_strength_that_was_set_holds_for_what_comes(case: str) -> None:
    layout = BY_NAME["linear"]
    model, new, example = adapted(case, layout), another(case, layout), layout.example()
    for p in adapter_places(model):
        p.set_strength("a", 0.25)
    bare = layout.model()(*example)
    swap(model, new)
    close(model(*example), bare + 0.25 * (new(*example) - bare))


OFTEN = {"LORA", "IA3", "OFT", "VERA", "LOHA"}


@pytest.mark.parametrize("case", [c if c in OFTEN else pytest.param(c, marks=pytest.mark.slow) for c in METHOD_CASES])
def test_nothing_is_compiled_again(case: str) -> None:
    layout = BY_NAME["linear"]
    if (case, "linear") in REFUSED:
        layout = next(x for c, x in acting(once=True) if c == case)
    model, example, counter = adapted(case, layout), layout.example(), CompileCounter()
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(*example)
        frames = counter.frame_count
        for by in (1, 2):
            new = another(case, layout)
            for _ in range(by):
                jitter(new, "a")
            swap(compiled, new)
            close(compiled(*example), new(*example))
    assert frames > 0
    assert counter.frame_count == frames


# The option that is the rank, or stands for it, with a larger and a smaller value; None where the method has none.
SIZES: dict[str, tuple[str, int, int] | None] = {
    "ADALORA": ("init_r", 4, 2), "ADAMSS": ("subspace_rank", 2, 1), "FOURIERFT": ("n_frequency", 7, 4), "WAVEFT": ("n_frequency", 7, 4),
    "TINYLORA": ("r", 3, 1), "OFT": ("oft_block_size", 4, 2), "OFT-count": None, "VBLORA": ("r", 3, 2), "UNILORA": ("r", 3, 2),
    "BOFT": None, "C3A": None, "DYLORA-pissa-cut": ("r", 5, 4),
}  # fmt: skip


def sizes(case: str) -> tuple[str, int, int]:
    return SIZES.get(case) or SIZES.get(case.partition("-")[0]) or ("r", 4, 2)


# Why some are not padded, in words of what is said then.
NOT_PADDED = {
    **dict.fromkeys(("MISS-bat", "BONE-bat"), "matrix of their own"),
    **dict.fromkeys(("RANDLORA", "RANDLORA-sparse", "RANDLORA-dropout"), "the fewer bases"),
    "HRA-gram-schmidt": "orthogonal directions",
    **{case: "two rounds of LoftQ" for case in CASES if case.endswith("-loftq")},
    "LOCON-pissa": "bound to one another",
    # What is cut off beyond the rank of evaluation takes part of the start with it.
    "DYLORA-pissa-cut": "dylora_A_start",
    # Drawn for the rank and in no file.
    "UNILORA": "unilora_indices_A",
    "TINYLORA-dropout": "tinylora_P",
    "VERA-dropout": "vera_A",
    "PVERA-dropout": "pvera_A",
    # A randomised decomposition, whose directions depend on how many there are.
    "PSOFT-dropout": "psoft_A",
}
# There is no vector of zeros to make a rank of; the ranks follow from the layers' sizes.
NOT_GROWN = {"VBLORA": "num_vectors", "VBLORA-dropout": "num_vectors", "WAVEFT-proportional": "No adapter layers"}
RANKED = [
    case
    for case in SELECTED
    if SIZES.get(case, SIZES.get(case.partition("-")[0], ())) is not None and sizes(case)[0] in CASES[case][0].__dataclass_fields__
]


def pair(case: str, layout: Layout) -> tuple[nn.Module, nn.Module]:
    """An adapter of a larger rank, and another one of a smaller."""
    option, large, small = sizes(case)
    more = {"num_vectors": CASES[case][1]["num_vectors"] + 1} if case.startswith("VBLORA") else {}
    return adapted(case, layout, **{option: large}, **more), another(case, layout, **{option: small})


def fits(case: str, layout: Layout) -> bool:
    """Whether both ranks can act there."""
    option, *both = sizes(case)
    model = layout.model()
    if case.startswith("OFT") and layout.name not in ("linear", "embedding"):
        # Four does not divide the widths of the others.
        return False
    try:
        return all(not explain_targets(model, config_of(case, layout, **{option: size})).refused for size in both)
    except ValueError:
        # Other options need a larger rank.
        return False


def again(model: nn.Module, layout: Layout) -> nn.Module:
    """The adapter in a model of its own, from what a file would hold."""
    session = session_of(model)
    assert session is not None
    loaded = inlay.inject_adapter_in_model(copy.deepcopy(session.configs["a"]), layout.model(torch.float64), "a")
    inlay.set_peft_model_state_dict(loaded, inlay.get_peft_model_state_dict(model, adapter_name="a"), adapter_name="a")
    return loaded.eval()


KINDS = ("linear", "conv2d-groups", "embedding", "experts")
PADDED = [(case, layout) for case, layout in acting(*KINDS) if case in RANKED and fits(case, layout)]


@over(PADDED)
def test_smaller_ranks_are_padded_or_refused(case: str, layout: Layout) -> None:
    (model, new), example = pair(case, layout), layout.example()
    before, where = model(*example), memory(model)
    if case in NOT_PADDED:
        with pytest.raises(ValueError, match=NOT_PADDED[case]):
            swap(model, new)
        assert torch.equal(model(*example), before)
    else:
        swap(model, new)
        close(model(*example), new(*example), 1e-6)
        close(again(model, layout)(*example), new(*example), 1e-6)
    assert memory(model) == where


@over([(case, layout) for case, layout in PADDED if layout.name in ("linear", "experts")])
def test_ranks_grow_and_what_they_do_stays(case: str, layout: Layout) -> None:
    option, large, _ = sizes(case)
    (_, new), example = pair(case, layout), layout.example()
    before = new(*example)
    if reason := NOT_GROWN.get(case, NOT_PADDED.get(case)):
        with pytest.raises(ValueError, match=reason):
            prepare_model_for_compiled_hotswap(new, target_rank=large)
        assert torch.equal(new(*example), before)
        return
    prepare_model_for_compiled_hotswap(new, target_rank=large)
    close(new(*example), before, 1e-6)
    close(again(new, layout)(*example), before, 1e-6)
    # As large as what is to come.
    coming = another(case, layout, **{option: large})
    where = memory(new)
    swap(new, coming)
    close(new(*example), coming(*example), 1e-6)
    assert memory(new) == where


@pytest.mark.parametrize("case", ["LORA", "LOHA", "PEANUT", "VERA", "PSOFT", "LOKR"])
def test_ranks_that_are_prepared_for(case: str) -> None:
    layout = BY_NAME["linear"]
    model, example, counter = adapted(case, layout, r=1), layout.example(), CompileCounter()
    before = model(*example)
    prepare_model_for_compiled_hotswap(model, target_rank=4)
    close(model(*example), before, 1e-6)
    session = session_of(model)
    assert session is not None
    assert session.configs["a"].r == 4  # type: ignore[attr-defined]
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend=counter)
    with torch.no_grad():
        compiled(*example)
        frames = counter.frame_count
        for rank in (2, 4, 3):
            new = another(case, layout, r=rank)
            swap(compiled, new)
            close(compiled(*example), new(*example), 1e-6)
    assert counter.frame_count == frames


def test_what_is_refused_changes_nothing() -> None:
    layout = BY_NAME["linear"]
    model, example = adapted("OFT", layout), layout.example()
    before = model(*example)
    for new, why in (
        (another("HRA", layout), "Incompatible PEFT types"),
        (another("OFT", layout, use_cayley_neumann=False), "differs in use_cayley_neumann"),
    ):
        with pytest.raises(ValueError, match=why):
            swap(model, new)
        assert torch.equal(model(*example), before)
    for place in adapter_places(model):
        place.merge(("a",))
    with pytest.raises(ValueError, match="merged"):
        swap(model, another("OFT", layout))
    close(model(*example), before)


def test_nothing_is_half_done() -> None:
    """The second layer does not fit; the first one is as it was."""
    config = inlay.IA3Config(target_modules=["0", "1"], feedforward_modules=[])
    model = inlay.inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5)), "a")
    state = inlay.get_peft_model_state_dict(model, adapter_name="a")
    before = {k: t.clone() for k, t in state.items()}
    wrong = {k: torch.full_like(t, 3) if k.startswith("0.") else torch.ones(7, 1) for k, t in state.items()}
    with pytest.raises(ValueError, match="does not fit"):
        hotswap_adapter_from_state_dict(model, wrong, "a", config)
    after = inlay.get_peft_model_state_dict(model, adapter_name="a")
    assert all(torch.equal(t, before[k]) for k, t in after.items())


def test_retrained_modules_and_biases_come_along() -> None:
    def build(by: float) -> nn.Module:
        torch.manual_seed(0)
        base = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 5))
        config = inlay.LoraConfig(r=2, target_modules=["0"], modules_to_save=["1"], bias="lora_only")
        model = inlay.inject_adapter_in_model(config, base, "a")
        generator = torch.Generator().manual_seed(1)
        for q in model.parameters():
            if q.requires_grad:
                q.data += by * torch.randn(q.shape, generator=generator)
        return model

    model, new, x = build(0.3), build(-0.4), torch.randn(3, 4)
    swap(model, new)
    close(model(x), new(x), 1e-6)


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Embedding(9, 6), nn.Linear(6, 4)

    def forward(self, ids: torch.Tensor, task_ids: torch.Tensor | None = None) -> torch.Tensor:
        return self.last(self.table(ids))


def of_tokens(config: Any, by: float) -> Any:
    torch.manual_seed(0)
    model = inlay.get_peft_model(Tokens(), config, "a").eval()
    generator = torch.Generator().manual_seed(1)
    for q in model.parameters():
        if q.requires_grad:
            q.data += by * torch.randn(q.shape, generator=generator)
    return model


# What is no function of a weight, where the rank alone differs; and tokens, of which there may be fewer.
OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "lily": (inlay.LilyConfig(r=4, target_modules=["last"]), inlay.LilyConfig(r=2, target_modules=["last"]), {}),
    "poly": (inlay.PolyConfig(r=4, target_modules=["last"]), inlay.PolyConfig(r=3, target_modules=["last"]), {}),
    "tasks": (
        inlay.PolyConfig(r=4, n_tasks=3, target_modules=["last"]),
        inlay.PolyConfig(r=2, n_tasks=3, target_modules=["last"]),
        {"task_ids": torch.tensor([1, 2])},
    ),
    "activated": (
        inlay.LoraConfig(r=4, lora_alpha=3, alora_invocation_tokens=[5], target_modules=["last"]),
        inlay.LoraConfig(r=3, alora_invocation_tokens=[5], target_modules=["last"]),
        {},
    ),
    "tokens": (
        inlay.TrainableTokensConfig(token_indices=[1, 5, 7], target_modules=["table"]),
        inlay.TrainableTokensConfig(token_indices=[7, 1], target_modules=["table"]),
        {},
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_ranks_of_what_is_no_function_of_a_weight(name: str) -> None:
    large, small, call = OTHERS[name]
    model, new, ids = of_tokens(large, 0.3), of_tokens(small, -0.4), torch.tensor([[1, 5, 2, 7], [0, 4, 5, 1]])
    with torch.no_grad():
        wanted = new(ids, **call)
        assert differs(model(ids, **call), wanted)
        swap(model, new)
        close(model(ids, **call), wanted, 1e-5)


def test_tokens_that_are_not_there_are_refused() -> None:
    model = of_tokens(inlay.TrainableTokensConfig(token_indices=[1, 5], target_modules=["table"]), 0.3)
    other = of_tokens(inlay.TrainableTokensConfig(token_indices=[1, 6], target_modules=["table"]), 0.3)
    with pytest.raises(ValueError, match="token 6"):
        swap(model, other)
