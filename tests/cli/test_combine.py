"""``inlay combine`` and ``inlay convert``, as a user calls them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import inlay
from inlay.cli.app import run
from inlay.cli.combine import gathered


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Adapters of one base of Llama's names: two of LoRA, one of DoRA, one of LoHa; and the base."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    pair = ["q_proj", "down_proj"]
    for name, config in {
        "one": inlay.LoraConfig(r=4, lora_alpha=6, target_modules=pair),
        "two": inlay.LoraConfig(r=2, use_rslora=True, target_modules=["q_proj", "embed_tokens"], layers_to_transform=None),
        "dora": inlay.LoraConfig(r=2, use_dora=True, target_modules=pair),
        "loha": inlay.LoHaConfig(r=2, target_modules=pair),
    }.items():
        model = inlay.get_peft_model(base(tmp_path), config)
        for q in model.parameters():
            if q.requires_grad:
                q.data += 0.2 * torch.randn_like(q)
        model.save_pretrained(tmp_path / name, save_embedding_layers=False)
    return tmp_path


def base(folder: Path) -> nn.Module:
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(folder / "base")


def logits(folder: Path, *names: str, weights: tuple[float, ...] = (1.0,)) -> torch.Tensor:
    """Of the base with these adapters' changes in it."""
    model = base(folder)
    plain = {k: v.clone() for k, v in model.state_dict().items()}
    sums = dict(plain)
    for name, weight in zip(names, weights, strict=True):
        merged = inlay.PeftModel.from_pretrained(base(folder), folder / name).merge_and_unload()  # type: ignore[operator]
        sums = {k: sums[k] + weight * (v - plain[k]) for k, v in merged.state_dict().items()}
    model.load_state_dict(sums)
    with torch.no_grad():
        return model(torch.arange(12).view(2, 6)).logits


def inlay_of(capsys: pytest.CaptureFixture[str], *words: Any) -> dict[str, Any]:
    code = run([*map(str, words), "--json"])
    shown = capsys.readouterr()
    assert code == 0, shown.err
    return json.loads(shown.out)


def test_lora_needs_no_base(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folders / "base").rename(folders / "away")
    words = ("combine", folders / "one", folders / "two", "--weights", "0.7", "-0.3", "--combine", "cat", "--out", folders / "new")
    facts = inlay_of(capsys, *words)
    (folders / "away").rename(folders / "base")
    assert (facts["weights"], facts["base_read"], facts["peft_type"]) == ([0.7, -0.3], False, "LORA")
    torch.testing.assert_close(logits(folders, "new"), logits(folders, "one", "two", weights=(0.7, -0.3)), rtol=1e-4, atol=1e-4)
    assert sorted(p.name for p in (folders / "new").iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    assert json.loads((folders / "new" / "adapter_config.json").read_text())["auto_mapping"]["base_model_class"] == "LlamaForCausalLM"


def test_weights_may_differ_by_layer(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    by_layer = '{"layers.0.*": [1, 0], ".*": [0.5, -2]}'
    words = ("combine", folders / "one", folders / "two", "--weights", by_layer, "--combine", "cat", "--out", folders / "new")
    assert inlay_of(capsys, *words)["weights"] == {"layers.0.*": [1, 0], ".*": [0.5, -2]}
    model: Any = inlay.PeftModel.from_pretrained(base(folders), folders / "one", "one")
    model.load_adapter(folders / "two", "two")
    model.add_weighted_adapter(["one", "two"], json.loads(by_layer), "both", "cat")
    model.set_adapter("both")
    with torch.no_grad():
        torch.testing.assert_close(logits(folders, "new"), model.eval()(torch.arange(12).view(2, 6)).logits, rtol=1e-4, atol=1e-4)
    assert "| `two` | 0 at layers.0.*, -2 at .* |" in (folders / "new" / "README.md").read_text()


def test_cards_say_what_was_made_of_what(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("combine", folders / "one", folders / "two", "--weights", "0.7", "-0.3", "--combine", "ties", "--density", "0.4")
    inlay_of(capsys, *words, "--out", folders / "new")
    inlay_of(capsys, "convert", folders / "loha", "--rank", "2", "--base", folders / "base", "--out", folders / "lora")
    inlay.save_as_lora(folders / "saved", inlay.PeftModel.from_pretrained(base(folders), folders / "loha"), 2)
    for name, said in (
        ("new", ["`ties`", "density 0.4", "majority sign total", "| `one` | 0.7 |", "| `two` | -0.3 |", "- merge"]),
        ("lora", ["LOHA adapter `loha`", "model.layers.0.self_attn.q_proj` | 2 |"]),
        ("saved", ["LOHA adapter `default`", "model.layers.1.mlp.down_proj` | 2 |"]),
    ):
        card = (folders / name / "README.md").read_text()
        for words_of_it in (f"base_model: {folders / 'base'}", "library_name: peft", *said):
            assert words_of_it in card
        assert not {str(folders / n) for n in ("one", "two", "loha") if str(folders / n) in card}, "a path of this machine"


def test_other_libraries_read_what_was_combined(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import peft

    for kind in ("ties", "dare_linear_svd", "svd"):
        inlay_of(capsys, "combine", folders / "one", folders / "two", "--combine", kind, "--seed", "1", "--out", folders / kind)
        model = peft.PeftModel.from_pretrained(base(folders), folders / kind).eval()
        with torch.no_grad():
            torch.testing.assert_close(model(torch.arange(12).view(2, 6)).logits, logits(folders, kind), rtol=1e-4, atol=1e-4)


def test_other_methods_read_the_base(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("combine", folders / "one", folders / "dora", "--weights", "1,0.5", "--base", folders / "base", "--out", folders / "new")
    facts = inlay_of(capsys, *words)
    assert (facts["base_read"], facts["peft_type"]) == (True, "FULL")
    torch.testing.assert_close(logits(folders, "new"), logits(folders, "one", "dora", weights=(1, 0.5)), rtol=1e-4, atol=1e-4)
    facts = inlay_of(capsys, *words[:-1], folders / "cut", "--rank", "3")
    assert (facts["peft_type"], facts["r"]) == ("LORA", 3)


def test_convert_shows_the_errors(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("convert", folders / "loha", "--base", folders / "base", "--rank")
    found = inlay_of(capsys, *words, "1.0", "--out", folders / "exact")
    assert found["largest_error"] < 1e-4
    torch.testing.assert_close(logits(folders, "exact"), logits(folders, "loha"), rtol=1e-3, atol=1e-3)
    found = inlay_of(capsys, *words, "2", "--out", folders / "two_only")
    assert len(found["layers"]) == 4
    assert {layer["rank"] for layer in found["layers"]} == {2}
    assert 0.01 < found["largest_error"] == max(layer["error"] for layer in found["layers"]) < 1
    assert run([*map(str, words), "2", "--out", str(folders / "shown")]) == 0
    shown = capsys.readouterr().out
    assert "largest error" in shown
    assert "layers.0.self_attn.q_proj" in shown


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["one", "two", "--combine", "tise"], "Did you mean 'ties'"),
        (["one", "two", "--weights", "0.7"], "1 numbers for 2 adapters"),
        (["one", "two", "--weights=a,b"], "give numbers"),
        (["one", "two", "--weights", '{"a": 1}'], "lists of numbers by pattern"),
        (["one", "two", "--weights", '{".*": [1]}'], "1 weights for 2 adapters"),
        (["one", "tow"], "Did you mean two"),
        (["one", "two", "--combine", "ties", "--density", "-1"], "share in"),
        (["one", "two", "--rank", "1.5"], "positive integer, or a share"),
        (["one", "dora"], "needed; give it with --base"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(folders: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str) -> None:
    config = folders / "dora" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": None}))
    given = [str(folders / w) if w in ("one", "two", "tow", "dora") else w for w in words]
    assert run(["combine", *given, "--out", str(folders / "new")]) == 2
    assert message in capsys.readouterr().err
    assert not (folders / "new").exists()


def test_help_lists_the_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["combine", "--help"]) == 0
    shown = capsys.readouterr().out
    for name, way in inlay.COMBINATIONS.items():
        assert f"  {name} " in shown
        assert way.summary in shown


def test_numbers_after_weights() -> None:
    assert gathered(["a", "b", "--weights", "0.7", "-0.3", "--out", "x"]) == ["a", "b", "--weights=0.7,-0.3", "--out", "x"]
    assert gathered(["--weights", "1,2", "a"]) == ["--weights", "1,2", "a"]
