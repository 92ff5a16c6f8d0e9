"""``inlay merge`` on the command line: what it writes, what it shows, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from inlay import LoraConfig, PeftModel, VeraConfig, get_peft_model
from inlay.cli import merge as verb
from inlay.cli.app import run
from inlay.operations.stream_merge import StreamMerge

from .. import tiny_chat_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and two adapters."""
    from transformers import AutoModelForCausalLM

    made = tmp_path_factory.mktemp("merge")
    base = tiny_chat_model.save(made / "base")
    configs = {
        "lora": LoraConfig(r=2, target_modules=["q_proj", "v_proj"], base_model_name_or_path=str(base)),
        "vera": VeraConfig(r=4, target_modules=["v_proj"], base_model_name_or_path=str(base)),
        "more": LoraConfig(r=3, target_modules=["q_proj", "v_proj"]),
    }
    for name, config in configs.items():
        tuned = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), config)
        generator = torch.Generator().manual_seed(len(name))
        for q in tuned.parameters():
            if q.requires_grad:
                q.data += 0.05 * torch.randn(q.shape, generator=generator)
        tuned.save_pretrained(made / name)
    (made / "other").mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(made / "lora" / file, made / "other")
    named = {"auto_mapping": {"base_model_class": "GPT2LMHeadModel", "parent_library": "transformers.models.gpt2.modeling_gpt2"}}
    config = json.loads((made / "other" / "adapter_config.json").read_text())
    (made / "other" / "adapter_config.json").write_text(json.dumps(config | named))
    return made


def inlay(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = run([str(word) for word in words])
    said = capsys.readouterr()
    return code, said.out, said.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_several_adapters_with_weights(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    words = ["merge", folder / "base", "--adapter", folder / "lora", "--adapter", folder / "vera", "--weights", "0.7", "-0.3"]
    code, out, err = inlay(capsys, *words, "--out", tmp_path / "out", "--verify", "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert facts["error"] < 1e-5
    assert facts["dtype"] == "float32"
    assert [c["how"] for c in facts["changes"]] == ["LORA x 0.7", "LORA x 0.7 + VERA x -0.3"] * 2
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto"), folder / "lora")
    tuned.load_adapter(folder / "vera", "vera")
    tuned.set_scale("default", 0.7)
    tuned.set_scale("vera", -0.3)
    expected = tuned.merge_and_unload(adapter_names=["default", "vera"]).state_dict()
    assert all(torch.equal(t, expected[key]) for key, t in weights(tmp_path / "out").items())


def test_combined_in_another_dtype(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["merge", folder / "base", "--adapter", folder / "lora", "--adapter", folder / "more", "--weights", "0.7", "0.3"]
    more = ["--combine", "ties", "--density", "0.5", "--out-dtype", "bf16"]
    code, out, err = inlay(capsys, *words, *more, "--out", tmp_path / "out", "--verify")
    assert code == 0, err
    assert "merged model, bfloat16" in " ".join(out.split())
    assert float(out.split("largest one:")[1]) < 0.05
    by_hand = StreamMerge(folder / "base", [folder / "lora", folder / "more"], [0.7, 0.3], torch.bfloat16, combine="ties", density=0.5).run(
        tmp_path / "by hand"
    )
    assert all(torch.equal(t, weights(by_hand)[key]) for key, t in weights(tmp_path / "out").items())
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_base_in_half_precision_in_wider_numbers(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The merged weights are those of the base's numbers, which is no reason to refuse them."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16).save_pretrained(tmp_path / "base")
    words = ["merge", tmp_path / "base", "--adapter", folder / "lora", "--out", tmp_path / "out", "--out-dtype", "fp32"]
    code, out, err = inlay(capsys, *words, "--verify", "--json")
    assert code == 0, err
    assert 0 < json.loads(out)["error"] < 0.05
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {torch.float32}


def test_a_dry_run_writes_nothing(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = inlay(capsys, "merge", folder / "base", "--adapter", folder / "lora", "--dry-run", "--out", tmp_path / "out")
    assert code == 0, err
    assert "model.layers.*.self_attn.q_proj.weight" in out
    assert "4 of 20 tensors change" in out
    assert list(tmp_path.iterdir()) == []
    code, out, _ = inlay(capsys, "merge", "--adapter", folder / "lora", "--dry-run", "--json")  # the adapter names its base
    assert (code, json.loads(out)["tensors"]) == (0, 20)


def test_a_merge_that_does_not_verify_is_not_kept(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(verb, "_adapted", lambda planned: AutoModelForCausalLM.from_pretrained(str(planned.folder)))
    code, _, err = inlay(capsys, "merge", folder / "base", "--adapter", folder / "lora", "--out", tmp_path / "out", "--verify")
    assert code == 1
    assert "more than float32 explains; nothing was written" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("into", ["dequantized", "requantized", "original"])
def test_into_a_quantised_base(into: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoModelForCausalLM

    from inlay import from_pretrained_quantized, quantize_

    base = tmp_path / "nf4"
    shutil.copytree(folder / "base", base)
    quantize_(AutoModelForCausalLM.from_pretrained(folder / "base", dtype="auto"), "nf4").save_pretrained(base)
    words = ["merge", base, "--adapter", folder / "lora", "--out", tmp_path / "out", "--base-dtype", into, "--verify"]
    code, out, err = inlay(capsys, *words, *(["--original", folder / "base"] if into == "original" else []), "--json")
    assert code == 0, err
    facts = json.loads(out)
    assert ("quantised" in facts) == ("rounding" in facts) == (into == "requantized")
    assert facts["error"] < (0.2 if into == "requantized" else 1e-4)
    before = weights(folder / "base")["model.layers.0.self_attn.q_proj.weight"]
    if into == "requantized":
        assert 0.02 < facts["rounding"]["all"]["of_weight"] < 0.2
        assert len(facts["rounding"]["layers"]) == len(facts["changes"]) == 4
        assert from_pretrained_quantized(tmp_path / "out").get_parameter("model.layers.0.self_attn.q_proj.weight").shape == before.shape
    else:
        assert weights(tmp_path / "out")["model.layers.0.self_attn.q_proj.weight"].shape == before.shape
        assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    code, out, _ = inlay(capsys, *(tmp_path / "said" if w == tmp_path / "out" else w for w in words[:-3]), "--base-dtype", "requantized")
    assert "quantised again" in out
    assert "merged model, nf4" in " ".join(out.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--adapter is missing"),
        (["--adapter", "{folder}/lroa", "--out", "{out}"], "Did you mean lora"),
        (["--adapter", "{folder}/lora"], "--out is missing"),
        (["--adapter", "{folder}/lora", "--out", "{folder}"], "exists already"),
        (["{folder}/bsae", "--adapter", "{folder}/lora", "--out", "{out}"], "Did you mean base"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--weights", "1", "2"], "2 numbers for 1 adapters"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--out-dtype", "int4"], "give bf16, fp16, fp32"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--base-dtype", "requantized"], "is not quantised, so there is"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--base-dtype", "dequantised"], "Did you mean dequantized"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--base-dtype", "original"], "--original is missing"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--original", "{folder}/base"], "only --base-dtype original"),
        (["--adapter", "{folder}/lora", "--adapter", "{folder}/more", "--out", "{out}", "--combine", "tise"], "Did you mean 'ties'"),
        (["--adapter", "{folder}/lora", "--adapter", "{folder}/more", "--out", "{out}", "--combine", "ties", "--density=-1"], "share in"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--combine", "tise"], "Did you mean 'ties'"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--density", "0.4"], "name it with --combine"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--weights", "nan"], "are not finite"),
        (["--adapter", "{folder}/lora", "--out", "{out}", "--weights", '{{".*": [2]}}'], "say how to combine, such as 'cat'"),
        (["{folder}/base", "--adapter", "{folder}/other", "--out", "{out}"], "was made for a GPT2LMHeadModel, and"),
        (["{quantised}", "--adapter", "{folder}/lora", "--out", "{out}"], "Give the folder of the original, dense weights"),
    ],
)
def test_bad_input_is_one_line(words: list[str], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantised = folder / "quantised"
    if not quantised.exists():
        shutil.copytree(folder / "base", quantised)
        config: dict[str, Any] = json.loads((quantised / "config.json").read_text())
        (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "quanto"}}))
    out = tmp_path / "out"
    code, _, err = inlay(capsys, "merge", *(w.format(folder=folder, out=out, quantised=quantised) for w in words))
    assert (code, err.count("\n")) == (2, 1), err
    assert said in err
    assert list(tmp_path.iterdir()) == []
