"""The law on bitsandbytes' embeddings: every method that acts on embeddings, in 4 bits and in 8."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from torch import Tensor, nn

from inlay import LoraConfig, PeftModel, TrainableTokensConfig, get_peft_model
from inlay.core.attach import attach
from inlay.core.inlaid import session_of
from inlay.core.targets import explain_targets

from .backends import state
from .cases import METHOD_CASES
from .layouts import Layout, Model, ids
from .support import ROWS, acting, adapter_places, adapters, close, config_of, differs, jitter, of_each_row

TOKENS = 24
DIMS = {"embedding-nf4": 64, "embedding-fp4": 64, "embedding-nf4-ragged": 40, "embedding-int8": 64, "embedding-int8-bfloat16": 64}
# What rounding takes of a merged weight, at most: of normally distributed numbers, which some methods' results are not.
LOSS = {"nf4": 0.2, "fp4": 0.25, "int8": 0.02}
CASES = sorted({case for case, _ in acting("embedding")})


def table(kind: str) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(TOKENS, DIMS[kind], dtype=torch.bfloat16 if kind.endswith("bfloat16") else torch.float32)


def embedding(kind: str) -> nn.Module:
    dense, options = table(kind), {"dtype": torch.bfloat16} if kind.endswith("bfloat16") else {}
    if "int8" in kind:
        made: nn.Module = bnb.nn.modules.Embedding8bit(TOKENS, DIMS[kind], **options)
    else:
        made = bnb.nn.modules.Embedding4bit(TOKENS, DIMS[kind], quant_type=kind.split("-")[1], **options)
    made.load_state_dict(dense.state_dict())
    return made.to("cpu").requires_grad_(False)


def layout(kind: str) -> Layout:
    return Layout(kind, lambda: embedding(kind), ids(5, TOKENS))


def model(kind: str) -> nn.Module:
    return Model(embedding(kind)).requires_grad_(False)


def rows(places_weight: Tensor, x: Tensor) -> Tensor:
    return nn.functional.embedding(x, places_weight.mT)


def pairs() -> list[Any]:
    found = [(c, k) for c in CASES for k in ("embedding-nf4", "embedding-int8")]
    found += [(c, k) for c in ("LORA", "TRAINABLE_TOKENS") for k in ("embedding-fp4", "embedding-nf4-ragged")]
    return [pytest.param(c, k, id=f"{c}/{k}", marks=[] if c in METHOD_CASES else [pytest.mark.slow]) for c, k in found]


@pytest.mark.parametrize(("case", "kind"), pairs())
def test_forward_gradients_merge_and_restore(case: str, kind: str) -> None:
    host, config = model(kind).eval(), config_of(case, layout(kind))
    (x,) = layout(kind).example()
    base = host(x)
    refused = explain_targets(host, config).refused
    if refused:
        assert all("quantised" in reason for reason in refused.values())
        return
    attach(host, config, "a")
    if not config.never_identity:
        close(host.eval()(x), base, 1e-4)
    jitter(host.eval(), "a")
    (place,) = adapter_places(host)
    close(rows(place.site.read()[0], x), base, 1e-6)
    w, _ = place.fold(("a",))
    after, by_fold = host(x), rows(w, x)
    close(after, by_fold, 1e-5)
    assert differs(after, base)
    wanted = [q for p in adapters(host) for q in p.parameters()]
    assert {id(q) for q in host.parameters() if q.requires_grad} == {id(q) for q in wanted}
    along = torch.randn_like(after)
    ours, theirs = (torch.autograd.grad((y * along).sum(), wanted) for y in (after, by_fold))
    for one, other in zip(ours, theirs, strict=True):
        close(one, other, 1e-4)

    before, own = state(place.site.module), host(x)
    place.merge(("a",))
    stored = place.site.module._parameters["weight"]
    assert type(stored).__name__ == ("Int8Params" if "int8" in kind else "Params4bit")
    merged = place.site.matrix(place.site.store.read(place.site.module, "weight"))
    assert (merged - w).norm() < LOSS[kind.split("-")[1]] * w.norm()
    assert place.rounding is not None
    assert place.rounding[0] == pytest.approx(float((merged - w).norm() / w.norm()), rel=1e-3)
    close(host(x), rows(merged, x), 1e-6)
    session = session_of(host)
    assert session is not None
    with session.local(()):
        close(host(x), base, 1e-6)
    place.unmerge()
    assert all(torch.equal(t, before[n]) for n, t in state(place.site.module).items())
    assert torch.equal(host(x), own)


@pytest.mark.parametrize("kind", DIMS)
def test_mixed_batches_and_copies(kind: str) -> None:
    host = model(kind)
    x = torch.randint(0, TOKENS, (4, 5))
    alone, together = of_each_row(host, x)
    session = session_of(host)
    assert session is not None
    tolerance = 2e-2 if kind.endswith("bfloat16") else 1e-5
    close(together, torch.stack([alone[n][i] for i, n in enumerate(ROWS)]), tolerance)
    assert differs(alone["a"], alone["b"])
    assert together.dtype == (torch.bfloat16 if kind.endswith("bfloat16") else torch.float32)
    other = copy.deepcopy(host)
    with session.local(("a",)):
        assert torch.equal(host(x), alone["a"])
    adapter_places(other)[0].merge(("b",))
    with session.local(("a",)):
        assert torch.equal(host(x), alone["a"])


class Bag(nn.Module):
    """A quantised table of embeddings, and a head."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.embed = embedding(kind)
        torch.manual_seed(2)
        self.head = nn.Linear(DIMS[kind], 8)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embed(ids).to(self.head.weight.dtype))


X = torch.arange(TOKENS).view(3, -1)


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["embed", "head"], init_lora_weights=False, seed=1)


def trained_tokens() -> TrainableTokensConfig:
    return TrainableTokensConfig(target_modules=["embed"], token_indices=[1, 5])


@pytest.mark.parametrize("make", [lora, trained_tokens])
@pytest.mark.parametrize("kind", DIMS)
def test_files_and_merging_out(kind: str, make: Any, tmp_path: Path) -> None:
    adapted: Any = get_peft_model(Bag(kind), make())
    for q in adapted.parameters():
        if q.requires_grad:
            q.data += 0.1
    base, before = Bag(kind)(X), adapted.eval()(X)
    assert differs(before, base)
    adapted.save_pretrained(tmp_path)
    again: Any = PeftModel.from_pretrained(Bag(kind), tmp_path)
    assert torch.equal(again.eval()(X), before)
    merged = adapted.merge_and_unload(base="dequantized")
    assert type(merged.embed) is nn.Embedding
    tolerance = 5e-2 if kind.endswith("bfloat16") else 1e-5
    close(merged(X), before, tolerance)
    half = again.merge_and_unload(base="dequantized", out_dtype=torch.float16)
    assert {q.dtype for q in half.parameters()} == {torch.float16}
    close(half(X).float(), before, 5e-2)


@pytest.mark.parametrize("kind", DIMS)
def test_merging_in_rounds_once_and_says_so(kind: str) -> None:
    adapted: Any = get_peft_model(Bag(kind), lora())
    before = adapted.eval()(X)
    with pytest.warns(UserWarning, match="1 merged weights were quantised again"):
        merged = adapted.merge_and_unload()
    assert type(merged.embed).__name__ == ("Embedding8bit" if "int8" in kind else "Embedding4bit")
    assert (merged(X) - before).norm() < LOSS[kind.split("-")[1]] * before.norm()
