"""``inlay diff`` and ``inlay extract``: the numbers against plain dense algebra, and adapters against the models they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import inlay
from inlay.cli.app import run
from inlay.core.inlaid import places
from inlay.core.place import Place

from ..tiny import ids, llama, logits, mixtral, stir


def saved(folder: Path, seed: int, config: Any) -> Any:
    model = inlay.get_peft_model(llama(), config).eval()
    stir(model, seed=seed)
    model.save_pretrained(folder)
    return model


def deltas(model: Any) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return {p.path: p.fold(("default",))[0] - p.fold(())[0] for p in places(model) if isinstance(p, Place)}


def said(words: list[Any], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert run([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


# ---- diff -----------------------------------------------------------------------------------------------------------------
def test_lora_is_compared_from_its_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = deltas(saved(tmp_path / "a", 1, inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])))
    b = deltas(saved(tmp_path / "b", 2, inlay.LoraConfig(r=2, lora_alpha=3, use_rslora=True, target_modules=["q_proj", "o_proj"])))
    found = said(["diff", tmp_path / "a", tmp_path / "b"], capsys)
    assert found["from_files_alone"]
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert set(layers) == {*a, *b}
    for name, layer in layers.items():
        x, y = a.get(name), b.get(name)
        assert layer["norm_a"] == pytest.approx(0 if x is None else x.norm().item(), rel=1e-4)
        assert layer["norm_b"] == pytest.approx(0 if y is None else y.norm().item(), rel=1e-4)
        assert (layer["rank_a"], layer["rank_b"]) == (0 if x is None else 4, 0 if y is None else 2)
        if x is None or y is None:
            assert layer["cosine"] is layer["overlap_in"] is layer["conflicts"] is None
            continue
        assert layer["distance"] == pytest.approx((x - y).norm().item(), rel=1e-4)
        assert layer["cosine"] == pytest.approx(torch.cosine_similarity(x.flatten(), y.flatten(), 0).item(), abs=1e-5)
        assert layer["conflicts"] == pytest.approx((x * y < 0).double().mean().item(), abs=1e-3)
        (u1, _, v1), (u2, _, v2) = torch.linalg.svd(x), torch.linalg.svd(y)
        for key, one, other in (("out", u1[:, :4], u2[:, :2]), ("in", v1[:4].T, v2[:2].T)):
            cosines = torch.linalg.svdvals(one.T @ other)
            assert layer[f"overlap_{key}"] == pytest.approx(cosines.square().mean().item(), abs=1e-4)
            assert torch.tensor(layer[f"angles_{key}"]).deg2rad().cos().tolist() == pytest.approx(cosines.tolist(), abs=1e-4)


def test_an_adapter_and_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "a", 1, inlay.LoraConfig(r=4, target_modules=["q_proj"]))
    for layer in said(["diff", tmp_path / "a", tmp_path / "a"], capsys)["layers"]:
        assert layer["cosine"] == pytest.approx(1)
        assert layer["overlap_in"] == pytest.approx(1, abs=1e-5)
        assert layer["overlap_out"] == pytest.approx(1, abs=1e-5)
        assert layer["conflicts"] == layer["distance"] == 0


def test_other_methods_need_the_base(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llama().save_pretrained(tmp_path / "base")
    a = deltas(saved(tmp_path / "a", 1, inlay.OFTConfig(oft_block_size=4, target_modules=["q_proj", "v_proj"])))
    b = deltas(saved(tmp_path / "b", 2, inlay.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])))
    assert run(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 2
    assert "--base" in capsys.readouterr().err
    found = said(["diff", tmp_path / "a", tmp_path / "b", "--base", tmp_path / "base", "--dtype", "float32"], capsys)
    assert not found["from_files_alone"]
    for layer in found["layers"]:
        x, y = a[layer["name"]], b[layer["name"]]
        assert layer["distance"] == pytest.approx((x - y).norm().item(), rel=1e-3)
        assert layer["cosine"] == pytest.approx(torch.cosine_similarity(x.flatten(), y.flatten(), 0).item(), abs=1e-4)
        assert layer["rank_b"] == 2


def test_diff_for_people_and_the_heat_map(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        saved(tmp_path / name, seed, inlay.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]))
    picture = tmp_path / "diff.png"
    assert run(["diff", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(picture)]) == 0
    out = capsys.readouterr().out
    # The table folds a long name as the width asks.
    assert "model.layers.1." in out
    assert "heat map" in " ".join(out.split())
    data = picture.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    assert int.from_bytes(data[16:20], "big") > 400


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=128, n_embd=16, n_layer=1, n_head=2, n_positions=16)).eval()


def test_an_embedding_that_is_saved_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files of adapted embeddings hold the base's own weight too; it goes along, whatever the model calls the embedding."""
    model = inlay.get_peft_model(gpt2(), inlay.LoraConfig(r=3, target_modules=["c_attn", "wte"])).eval()
    stir(model, seed=1)
    model.save_pretrained(tmp_path / "a")
    found = said(["diff", tmp_path / "a", tmp_path / "a"], capsys)
    assert found["from_files_alone"]
    assert {layer["name"]: layer["distance"] for layer in found["layers"]}["transformer.wte"] == 0
    assert not said(["combine", tmp_path / "a", tmp_path / "a", "--weights", "0.25 0.75", "--out", tmp_path / "b"], capsys)["base_read"]
    loaded = inlay.PeftModel.from_pretrained(gpt2(), tmp_path / "b").eval()
    torch.testing.assert_close(logits(loaded, ids()), logits(model, ids()), rtol=1e-4, atol=1e-5)


REFUSED = [
    (["a", "bb"], "Did you mean b?"),
    (["a", "b", "--out", "x.jpg"], "x.png"),
    (["a", "b", "--out", "no/x.png"], "no folder"),
]


@pytest.mark.parametrize(("words", "why"), REFUSED)
def test_what_diff_refuses(words: list[str], why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        saved(tmp_path / name, 1, inlay.LoraConfig(r=2, target_modules=["q_proj"]))
    assert run(["diff", *words]) == 2
    assert why in capsys.readouterr().err


# ---- extract --------------------------------------------------------------------------------------------------------------
def two_models(tmp_path: Path, rank: int, names: tuple[str, ...], others: tuple[str, ...] = (), **options: Any) -> tuple[Any, Any]:
    """A base, and the same model after a change of this rank."""
    base, tuned = llama(**options), llama(**options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, q in tuned.named_parameters():
            if any(n in name for n in names) and q.ndim == 2:
                q += 0.05 * torch.randn(q.shape[0], rank, generator=generator) @ torch.randn(rank, q.shape[1], generator=generator)
            elif any(n in name for n in others):
                q += 0.1 * torch.randn(q.shape, generator=generator)
    base.save_pretrained(tmp_path / "base", max_shard_size="20kB")
    tuned.save_pretrained(tmp_path / "tuned")
    return base, tuned


@pytest.mark.parametrize("tie", [False, True])
def test_what_is_of_the_rank_is_taken_out_whole(tie: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("q_proj", "down_proj", "embed_tokens")
    _, tuned = two_models(tmp_path, 3, names, tie_word_embeddings=tie)
    found = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 3, "--out", tmp_path / "lora"], capsys)
    assert len(found["layers"]) == 5
    assert all(layer["rank"] == 3 and layer["error"] < 1e-3 for layer in found["layers"])
    assert found["others"] == []
    loaded = inlay.PeftModel.from_pretrained(llama(tie_word_embeddings=tie), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded, ids()), logits(tuned, ids()), rtol=1e-4, atol=1e-5)


def test_the_error_is_what_is_cut_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = two_models(tmp_path, 6, ("q_proj", "up_proj"))
    found = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "lora"], capsys)
    for layer in found["layers"]:
        change = tuned.get_parameter(layer["name"]).detach() - base.get_parameter(layer["name"]).detach()
        s = torch.linalg.svdvals(change.double())
        assert layer["norm"] == pytest.approx(change.norm().item(), rel=1e-4)
        assert layer["error"] == pytest.approx((s[2:].square().sum() / s.square().sum()).sqrt().item(), rel=1e-3)
    share = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 0.9, "--out", tmp_path / "most"], capsys)
    assert all(0 < layer["error"] <= 0.1**0.5 for layer in share["layers"])


def test_what_is_no_matrix_is_reported_and_brought_along(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = ids()
    _, tuned = two_models(tmp_path, 2, ("q_proj",), ("norm", "q_proj.bias", "k_proj.bias"), attention_bias=True)
    words = ["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 2]
    plain = said([*words, "--out", tmp_path / "plain"], capsys)
    norms = {"norm", "input_layernorm", "post_attention_layernorm"}
    assert {o["name"].split(".")[-2] for o in plain["others"]} == {"q_proj", "k_proj", *norms}
    assert not any(o["kept"] for o in plain["others"])
    whole = said([*words, "--out", tmp_path / "whole", "--retrain-others"], capsys)
    assert all(o["kept"] for o in whole["others"])
    outputs = {}
    for name in ("plain", "whole"):
        loaded = inlay.PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / name).eval()
        outputs[name] = logits(loaded, x)
    torch.testing.assert_close(outputs["whole"], logits(tuned, x), rtol=1e-4, atol=1e-5)
    assert (outputs["plain"] - logits(tuned, x)).abs().max() > 1e-2


def test_experts_are_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Files keep the experts of Mixtral one by one; the model has them in a stack, and so has the LoRA."""
    base, tuned, generator = mixtral(), mixtral(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        layer: Any = tuned.model.layers[0]
        stack = layer.mlp.experts.down_proj
        each = (torch.randn(*shape, generator=generator) for shape in ((*stack.shape[:2], 2), (stack.shape[0], 2, stack.shape[2])))
        stack += 0.1 * next(each) @ next(each)
        layer.self_attn.q_proj.weight[0] += 0.1
        layer.mlp.experts.gate_up_proj[1, 3] += 0.1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 2, "--out", tmp_path / "lora"], capsys)
    assert found["others"] == []
    experts = "model.layers.0.mlp.experts"
    assert {o["name"] for o in found["layers"]} == {
        "model.layers.0.self_attn.q_proj.weight",
        f"{experts}.gate_up_proj",
        f"{experts}.down_proj",
    }
    assert all(o["error"] < 1e-3 for o in found["layers"])
    loaded = inlay.PeftModel.from_pretrained(mixtral(), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded, ids()), logits(tuned, ids()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", ["base", "tuned"])
def test_ties_that_one_of_the_models_has(tied: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, tuned = (llama(tie_word_embeddings=tied == name) for name in ("base", "tuned"))
    own = tuned.state_dict()
    with torch.no_grad():
        for name, q in base.state_dict().items():
            own[name].copy_(q)
        for q in {id(q): q for name, q in tuned.named_parameters() if name in ("model.embed_tokens.weight", "lm_head.weight")}.values():
            q += 0.1 * torch.outer(q[:, 0], q[0])
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 0.999999, "--out", tmp_path / "lora"], capsys)
    assert {o["name"] for o in found["layers"]} == {"model.embed_tokens.weight", "lm_head.weight"}
    loaded = inlay.PeftModel.from_pretrained(llama(tie_word_embeddings=tied == "base"), tmp_path / "lora").eval()
    torch.testing.assert_close(logits(loaded, ids()), logits(tuned, ids()), rtol=1e-2, atol=1e-3)


def test_convolutions_are_matrices(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import ViTConfig, ViTModel

    def vit() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
        return ViTModel(ViTConfig(**sizes, image_size=8, patch_size=4), add_pooling_layer=False).eval()

    base, tuned = vit(), vit()
    with torch.no_grad():
        tuned.embeddings.patch_embeddings.projection.weight[2] += 0.1
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    found = said(["extract", tmp_path / "base", tmp_path / "tuned", "--rank", 1, "--out", tmp_path / "lora"], capsys)
    (layer,) = found["layers"]
    assert (layer["rank"], layer["error"] < 1e-5, found["others"]) == (1, True, [])
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    loaded = inlay.PeftModel.from_pretrained(vit(), tmp_path / "lora").eval()
    with torch.no_grad():
        close = torch.testing.assert_close
        close(loaded(pixel_values=images).last_hidden_state, tuned(images).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_what_extract_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    two_models(tmp_path, 2, ("q_proj",))
    llama(layers=1).save_pretrained(tmp_path / "smaller")
    normed = llama()
    normed.model.norm.weight.data += 1
    normed.save_pretrained(tmp_path / "normed")
    out = ["--out", str(tmp_path / "lora")]
    for words, why in (
        (["base", "base"], "the two are the same"),
        (["base", "normed"], "no matrix differs, but 'model.norm.weight' does"),
        (["base", "normed", "--retrain-others"], "norms alone are no LoRA"),
        (["smaller", "base"], "base has 'model.layers.1."),
        (["base", "tund"], "Did you mean tuned?"),
        (["base", "smaller"], "base has 'model.layers.1."),
        (["base", "tuned", "--rank", "0"], "--rank 0"),
    ):
        paths = [str(tmp_path / w) if w in ("base", "tuned", "tund", "smaller", "normed") else w for w in words]
        assert run(["extract", *paths, *out]) == 2
        assert why in capsys.readouterr().err
        assert not (tmp_path / "lora").exists()


def test_blocks_come_in_their_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 1), ("b", 2)):
        base = torch.nn.Sequential(*(torch.nn.Linear(5, 5) for _ in range(11)))
        model = inlay.get_peft_model(base, inlay.LoraConfig(r=2, target_modules="all-linear"))
        stir(model, seed=seed)
        model.save_pretrained(tmp_path / name)
    found = said(["diff", tmp_path / "a", tmp_path / "b"], capsys)["layers"]
    assert [layer["name"] for layer in found] == [str(i) for i in range(11)]
    assert run(["diff", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    total = next(line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("all of them"))
    assert float(total[3]) == pytest.approx(sum(layer["norm_a"] ** 2 for layer in found) ** 0.5, rel=1e-2)
    assert float(total[5]) == pytest.approx(sum(layer["distance"] ** 2 for layer in found) ** 0.5, rel=1e-2)
