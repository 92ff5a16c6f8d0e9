"""How much of an adapter acts, layer by layer and in a model: merged, tied, and written to a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch

import inlay
from inlay.core.inlaid import adapters_of, places
from inlay.core.place import Place

from ..tiny import ids, llama, logits, stir

NEAR = {"rtol": 1e-5, "atol": 1e-6}


def places_of(model: Any) -> list[Place]:
    return [p for p in places(model) if isinstance(p, Place)]


def test_layers_are_scaled_one_by_one_and_together() -> None:
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules=["q_proj", "v_proj"]))
    stir(model)
    first = model.base_model.model.model.layers[0].self_attn.q_proj
    first.set_scale("default", 0.25)
    first.scale_layer(2)
    assert [p.strength for p in adapters_of(model, "default")] == [0.5, 1, 1, 1]
    first.unscale_layer(2)
    assert first.adapters["default"].strength == 0.25
    first.unscale_layer()
    model.set_scale("default", {r"layers\.1\.self_attn\.v_proj": 0, "layers.1.*": 3})
    assert [p.strength for p in adapters_of(model, "default")] == [1, 1, 3, 0]
    model.set_scale("default", 0)
    x = ids()
    after = logits(model, x)
    with model.disable_adapter():
        torch.testing.assert_close(after, logits(model, x), rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"layers\.7.*names no layer"):
        model.set_scale("default", {"layers.0.*": 1, "layers.7.*": 2})
    with pytest.raises(ValueError, match="finite"):
        model.set_scale("default", float("nan"))
    with pytest.raises(ValueError, match="not found"):
        model.set_scale("defualt", 1)
    assert {p.strength for p in adapters_of(model, "default")} == {0}


def test_merged_weights_follow() -> None:
    model = inlay.get_peft_model(llama(tie_word_embeddings=True), inlay.LoraConfig(target_modules=["embed_tokens", "q_proj"]))
    model.add_adapter("other", inlay.IA3Config(target_modules=["q_proj", "down_proj"], feedforward_modules=["down_proj"]))
    for name in ("default", "other"):
        stir(model, name)
    model.set_adapter(["other", "default"])
    x = ids()
    model.merge_adapter()
    model.set_scale("default", 2)
    merged = logits(model, x)
    assert all(p.merged for p in places(model))
    model.unmerge_adapter()
    torch.testing.assert_close(logits(model, x), merged, **NEAR)


def test_merged_adapters_keep_their_order() -> None:
    """Also where the first layer of the model has only the one that was merged last."""
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules=["q_proj", "v_proj"]), "a", mixed=True)
    model.add_adapter("b", inlay.HRAConfig(r=2, target_modules=["v_proj"]))
    for name in "ab":
        stir(model, name, by=0.3)
    model.set_adapter(["b", "a"])
    x = ids()
    wanted = logits(model, x)
    model.merge_adapter(["b"])
    model.merge_adapter(["a"])
    for scale in (0.5, 1.0):
        model.set_scale("a", scale)
        assert [place.merged for place in places_of(model.get_base_model())] == [("a",), ("b", "a")] * 2
    torch.testing.assert_close(logits(model, x), wanted, **NEAR)
    model.set_adapter(["a", "b"])
    model.unmerge_adapter()
    assert (logits(model, x) - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("method", [inlay.LoraConfig, inlay.TrainableTokensConfig, inlay.IA3Config])
def test_both_ends_of_a_tie_have_one_strength(method: Any, tie: bool) -> None:
    needed = {inlay.TrainableTokensConfig: {"token_indices": [3, 5]}, inlay.IA3Config: {"feedforward_modules": []}}
    more: dict[str, Any] = needed.get(method, {})
    if not (tie and method is inlay.TrainableTokensConfig):
        more["ensure_weight_tying"] = tie
    model = inlay.get_peft_model(llama(tie_word_embeddings=True), method(target_modules=["embed_tokens"], **more))
    stir(model)
    base = {p.path: p.fold(())[0] for p in places_of(model)}
    once = {p.path: p.fold(("default",))[0] - base[p.path] for p in places_of(model)}
    model.set_scale("default", 0.5)
    x = ids()
    half = logits(model, x)
    for place in places_of(model):
        torch.testing.assert_close(place.fold(("default",))[0] - base[place.path], once[place.path] / 2, **NEAR)
    torch.testing.assert_close(logits(model.merge_and_unload(), x), half, **NEAR)


# ---- files ----------------------------------------------------------------------------------------------------------------
SCALES = {"uniform": 0.3, "by layer": {"layers.0.*": 2.0, r"layers\.1\.self_attn\.v_proj": 0.5}}
LORA: dict[str, dict[str, Any]] = {
    "": {},
    "rslora": {"use_rslora": True, "lora_bias": True},
    "patterns": {"rank_pattern": {"v_proj": 4}, "alpha_pattern": {"layers.0.self_attn.v_proj": 5, "q_proj": 3}},
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("options", LORA)
def test_every_reader_has_the_strength_of_lora(options: str, scale: str, tmp_path: Path) -> None:
    x = ids()
    model = inlay.get_peft_model(llama(attention_bias=True), inlay.LoraConfig(target_modules=["q_proj", "v_proj"], **LORA[options])).eval()
    stir(model)
    plain = logits(model, x)
    model.set_scale("default", SCALES[scale])
    scaled = logits(model, x)
    model.save_pretrained(tmp_path / "kept", keep_strength=True)
    model.save_pretrained(tmp_path / "plain")
    for library in (peft, inlay):
        for folder, expected in (("kept", scaled), ("plain", plain)):
            loaded = library.PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / folder).eval()
            torch.testing.assert_close(logits(loaded, x), expected, **NEAR)
    # What it was is not touched by saving.
    assert model.peft_config["default"].lora_alpha == 8


@pytest.mark.parametrize("scale", SCALES)
def test_a_scaled_adapter_of_the_real_library_is_one_of_ours(scale: str, tmp_path: Path) -> None:
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(), config).eval()
    theirs.save_pretrained(tmp_path)
    ours = inlay.PeftModel.from_pretrained(llama(), tmp_path).eval()
    for i, number in enumerate((0.5, 3.0)):
        for model in (theirs, ours):
            layer = model.base_model.model.model.layers[i].self_attn.q_proj
            layer.set_scale("default", number)
            layer.scale_layer(2.0)
    torch.testing.assert_close(logits(ours, ids()), logits(theirs, ids()), **NEAR)


OTHERS: dict[str, Any] = {
    "dora": lambda: inlay.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
    "pissa": lambda: inlay.LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights="pissa"),
    "bias": lambda: inlay.LoraConfig(target_modules=["q_proj", "v_proj"], bias="all"),
    "tokens": lambda: inlay.LoraConfig(target_modules=["q_proj", "v_proj"], trainable_token_indices=[1, 2]),
    "ia3": lambda: inlay.IA3Config(target_modules=["q_proj", "v_proj"], feedforward_modules=[]),
    "oft": lambda: inlay.OFTConfig(target_modules=["q_proj", "v_proj"], oft_block_size=4, overrides={"v_proj": {"oft_block_size": 8}}),
}


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("method", OTHERS)
def test_other_methods_are_read_back_as_they_were(method: str, scale: str, tmp_path: Path) -> None:
    x = ids()
    model = inlay.get_peft_model(llama(attention_bias=True), OTHERS[method]()).eval()
    stir(model)
    model.set_scale("default", SCALES[scale])
    scaled = logits(model, x)
    model.save_pretrained(tmp_path, keep_strength=True)
    loaded = inlay.PeftModel.from_pretrained(llama(attention_bias=True), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, x), scaled, **NEAR)
    # Once more, and back to the adapter itself.
    loaded.save_pretrained(tmp_path / "again", keep_strength=True)
    again = inlay.PeftModel.from_pretrained(llama(attention_bias=True), tmp_path / "again").eval()
    torch.testing.assert_close(logits(again, x), scaled, **NEAR)
    if method == "tokens" and isinstance(SCALES[scale], dict):
        # Only layers of plain LoRA are scaled: the alphas say it.
        return
    for one in (model, again):
        one.set_scale("default", 1.0)
    torch.testing.assert_close(logits(again, x), logits(model, x), **NEAR)
    again.save_pretrained(tmp_path / "whole", keep_strength=True)
    assert "strength" not in (tmp_path / "whole" / "adapter_config.json").read_text()


@pytest.mark.parametrize("strength", [0.0, 2.0, -0.5])
@pytest.mark.parametrize("options", [{"bias": "all"}, {"bias": "lora_only"}, {"lora_bias": True}, {"use_dora": True}], ids=str)
def test_what_is_made_of_a_scaled_adapter_is_scaled(options: dict[str, Any], strength: float, tmp_path: Path) -> None:
    """Combined and converted, at the weights and at every bias that it retrains."""

    def build() -> Any:
        return llama(attention_bias=True, mlp_bias=True)

    model, x = inlay.get_peft_model(build(), inlay.LoraConfig(r=4, target_modules=["q_proj"], **options)).eval(), ids()
    stir(model, by=0.3)
    once = logits(model, x)
    model.set_scale("default", strength)
    scaled = logits(model, x)
    weight = 1 / strength if strength else 1.0
    model.add_weighted_adapter(["default"], [weight], "new", "cat")
    with model.use_adapters("new"):
        torch.testing.assert_close(logits(model, x), once if strength else scaled, rtol=1e-4, atol=1e-5)
    inlay.save_as_lora(tmp_path, model, 1.0)
    loaded = inlay.PeftModel.from_pretrained(build(), tmp_path).eval()
    torch.testing.assert_close(logits(loaded, x), scaled, rtol=1e-4, atol=1e-5)


def test_prompts_have_none() -> None:
    model = inlay.get_peft_model(llama(), inlay.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="only adapters of weights have a strength"):
        model.set_scale("default", 0.5)
