"""Merging on disk gives the very bits of merging in memory, and leaves nothing behind when it is interrupted."""

from __future__ import annotations

import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    Wav2Vec2Model,
)

import inlay.methods  # noqa: F401  registers them
from inlay import LoraConfig, PeftModel, VeraConfig, from_pretrained_quantized, get_peft_model, quantize_
from inlay.core.method import METHODS, Method
from inlay.core.stores import store_of
from inlay.formats.direct import Output
from inlay.formats.streaming import Files, Shard, Writing, read_header
from inlay.operations.stream_merge import Rounding, StreamMerge, journal, working_folder
from inlay.operations.stream_merge.folder import SPARE

from .bases import adapter, both_ways, check_same, gpt2, in_memory, llama, load, mixtral, moved, saved, speech, tensors

# ---- every method -----------------------------------------------------------------------------------------------------------
FOLDABLE = [
    pytest.param(cls, options, id=f"{name}-{example}".rstrip("-"), marks=[] if example == "" else [pytest.mark.slow])
    for name, cls in METHODS.items()
    if not cls.unmergeable and name != "BEFT"
    for example, options in cls.examples.items()
    if not options.get("lora_bias")
]


@pytest.fixture(scope="module")
def bundled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of the bundled configuration's kind, in shards."""
    from inlay.training.models import bundled_base

    config = LlamaConfig.from_pretrained(bundled_base())
    for name, value in {"hidden_size": 32, "intermediate_size": 48, "head_dim": 8, "num_hidden_layers": 2, "vocab_size": 64}.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    return saved(LlamaForCausalLM(config), tmp_path_factory.mktemp("bundled") / "base", max_shard_size="20KB")


@pytest.mark.parametrize(("cls", "options"), FOLDABLE)
def test_every_method_merges_to_the_same_bits(cls: type[Method], options: dict[str, Any], bundled: Path, tmp_path: Path) -> None:
    named = cls.__dataclass_fields__["peft_type"].default in ("LN_TUNING", "TRAINABLE_TOKENS") or "target_modules" in options
    config = cls(**({} if named else {"target_modules": ["q_proj", "v_proj"]}), **options)
    folder = adapter(bundled, tmp_path / "adapter", config)
    reference = in_memory(bundled, [folder], tmp_path / "reference")
    assert check_same(bundled, StreamMerge(bundled, [folder]).run(tmp_path / "out"), reference)


# ---- what else an adapter is made of ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("tied", "options", "head_of_its_own"),
    [
        (False, {"target_modules": "all-linear", "modules_to_save": ["lm_head"]}, True),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, True),
        (True, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, False),
        (True, {"target_modules": ["embed_tokens"]}, True),
        (True, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, False),
        (True, {"target_modules": ["lm_head", "k_proj"]}, True),
        (True, {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]}, False),
        (False, {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2], "lm_head": [0, 3]}}, True),
        (False, {"target_modules": ["q_proj"], "bias": "all"}, True),
        (False, {"target_modules": ["q_proj", "down_proj"], "bias": "lora_only", "use_dora": True}, True),
        (False, {"target_parameters": ["0.mlp.down_proj.weight"], "target_modules": []}, True),
    ],
)
def test_what_stands_beside_a_method(tied: bool, options: dict[str, Any], head_of_its_own: bool, tmp_path: Path) -> None:
    base = saved(llama(tie_word_embeddings=tied, attention_bias=True, mlp_bias=True), tmp_path / "base")
    assert both_ways(tmp_path, base, adapter(base, tmp_path / "a", LoraConfig(r=2, **options)))
    assert ("lm_head.weight" in tensors(tmp_path / "out")) == head_of_its_own
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (tied and not head_of_its_own)


def test_transposed_weights_and_one_file(tmp_path: Path) -> None:
    base = saved(gpt2(), tmp_path / "base", torch.float32, max_shard_size="1GB")
    assert not (base / "model.safetensors.index.json").exists()
    changed = both_ways(tmp_path, base, adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["c_attn", "wte"], bias="lora_only")))
    assert len(changed) == 2 * 2 + 2  # weights and biases, the embedding and the head that was tied to it
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_embeddings_that_the_adapter_resized(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    model = load(base)
    model.resize_token_embeddings(44)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    moved(tuned)
    tuned.save_pretrained(tmp_path / "a", save_embedding_layers=True)
    reference = tmp_path / "reference"
    tuned.merge_and_unload().save_pretrained(reference)
    out = StreamMerge(base, [tmp_path / "a"]).run(tmp_path / "out")
    check_same(base, out, reference)
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 44
    assert load(out).get_output_embeddings().weight.shape == (44, 16)


def test_a_classifier_that_the_base_does_not_have(tmp_path: Path) -> None:
    base = saved(llama(pad_token_id=0), tmp_path / "base")
    config = LoraConfig(r=2, task_type="SEQ_CLS", target_modules=["q_proj"])
    folder = adapter(base, tmp_path / "a", config, cls=AutoModelForSequenceClassification, num_labels=3)
    reference = in_memory(base, [folder], tmp_path / "reference", cls=AutoModelForSequenceClassification, num_labels=3)
    out = StreamMerge(base, [folder]).run(tmp_path / "out")
    expected, found = tensors(reference), tensors(out)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert "score.weight" in found
    ids = torch.arange(8).unsqueeze(0)
    one, other = load(out, AutoModelForSequenceClassification), load(reference, AutoModelForSequenceClassification)
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


# ---- experts, in both layouts ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("one_by_one", [True, False])
@pytest.mark.parametrize("cls", ["LORA", "VERA", "HRA"])
def test_experts_stored_one_by_one_or_stacked(one_by_one: bool, cls: str, tmp_path: Path) -> None:
    base = saved(mixtral(), tmp_path / "base", save_original_format=one_by_one)
    assert any("experts.0.w1.weight" in key for key in tensors(base)) == one_by_one
    config = METHODS[cls](target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], r=2)  # type: ignore[call-arg]
    folder = adapter(base, tmp_path / "a", config)
    reference = tmp_path / "reference"
    merged = PeftModel.from_pretrained(load(base), folder).merge_and_unload()
    merged.save_pretrained(reference, save_original_format=one_by_one)
    changed = check_same(base, StreamMerge(base, [folder]).run(tmp_path / "out"), reference)
    assert len(changed) == 2 + 2 * (3 * 3 if one_by_one else 2)
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "out")(ids).logits, load(reference)(ids).logits)


# ---- quantised bases -----------------------------------------------------------------------------------------------------------
def same_values(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Descriptions are JSON with spaces behind it; all else is equal to the bit."""
    assert found.keys() == expected.keys()
    for key, tensor in found.items():
        if "quant_state" in key:
            one, other = (json.loads(bytes(t.tolist())) for t in (tensor, expected[key]))
            assert one.pop("nested_offset", 0) == pytest.approx(other.pop("nested_offset", 0), rel=1e-6)
            assert one == other
        else:
            assert tensor.dtype == expected[key].dtype, key
            assert torch.equal(tensor, expected[key]), key


@pytest.mark.parametrize("into", ["dequantized", "requantized"])
@pytest.mark.parametrize(
    ("to", "double", "make"),
    [("nf4", True, llama), ("nf4", False, gpt2), ("fp4", True, llama), ("int8", True, llama), ("int8", True, gpt2), ("int4", True, gpt2)],
)
def test_quantised_bases(to: str, double: bool, make: Any, into: str, tmp_path: Path) -> None:
    base = tmp_path / "base"
    model = load(saved(make(), tmp_path / "dense", torch.float32))
    quantize_(model, to, double=double)
    model.save_pretrained(base, max_shard_size="6KB")
    targets = ["q_proj", "down_proj"] if make is llama else ["c_attn", "c_fc"]
    tuned = get_peft_model(from_pretrained_quantized(base), LoraConfig(r=2, target_modules=targets))
    moved(tuned)
    tuned.save_pretrained(tmp_path / "a")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        tuned.merge_and_unload(base=into).save_pretrained(tmp_path / "reference")
    merge = StreamMerge(base, [tmp_path / "a"], base_dtype=into)
    out = merge.run(tmp_path / "out")
    same_values(tensors(out), tensors(tmp_path / "reference"))
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == (into == "requantized")
    assert len(merge.rounding) == (len(merge.changes) if into == "requantized" else 0)
    ids = torch.arange(8).unsqueeze(0)
    one, other = (from_pretrained_quantized(f) if into == "requantized" else load(f) for f in (out, tmp_path / "reference"))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_what_rounding_lost_is_told(tmp_path: Path) -> None:
    model = load(saved(llama(), tmp_path / "dense", torch.float32))
    quantize_(model, "nf4").save_pretrained(tmp_path / "base")
    folder = adapter(tmp_path / "dense", tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    merge = StreamMerge(tmp_path / "base", [folder], base_dtype="requantized")
    dense = tensors(StreamMerge(tmp_path / "base", [folder], base_dtype="dequantized").run(tmp_path / "wanted"))
    found = from_pretrained_quantized(merge.run(tmp_path / "out"))
    before = from_pretrained_quantized(tmp_path / "base")
    for key, told in merge.rounding.items():
        now, was = (m.get_parameter(key).dequantize() for m in (found, before))
        assert told.of_weight == pytest.approx(((now - dense[key]).norm() / dense[key].norm()).item(), rel=1e-4)
        assert told.of_change == pytest.approx(((now - dense[key]).norm() / (dense[key] - was).norm()).item(), rel=1e-4)
    assert 0.02 < Rounding.total(merge.rounding.values()).of_weight < 0.2


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("into", ["dequantized", "requantized"])
def test_what_bitsandbytes_wrote(bits: int, into: str, tmp_path: Path) -> None:
    from transformers import BitsAndBytesConfig

    dense = saved(llama(hidden_size=64, intermediate_size=128), tmp_path / "dense", torch.float32)
    options = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_quant_storage": torch.float32}
    asked = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, **(options if bits == 4 else {}))
    base = tmp_path / "base"
    load(dense, quantization_config=asked).save_pretrained(base)
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    out = StreamMerge(base, [folder], base_dtype=into).run(tmp_path / "out")
    tuned = PeftModel.from_pretrained(load(base), folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        expected = tuned.merge_and_unload(base=into)
    found = load(out)
    for name in ("q_proj", "k_proj"):
        one, other = (m.model.layers[1].self_attn.get_submodule(name) for m in (found, expected))
        torch.testing.assert_close(*(store_of(m).read(m, "weight") for m in (one, other)), rtol=1e-6, atol=1e-7)


def test_the_weights_from_before(tmp_path: Path) -> None:
    dense = saved(llama(), tmp_path / "dense")
    quantize_(load(dense), "nf4").save_pretrained(tmp_path / "base")
    folder = adapter(dense, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    out = StreamMerge(tmp_path / "base", [folder], base_dtype="original", original=dense).run(tmp_path / "out")
    check_same(dense, out, in_memory(dense, [folder], tmp_path / "reference"))
    for options, said in [
        ({}, "Say what to merge into"),
        ({"base_dtype": "original"}, "name their folder"),
        ({"base_dtype": "original", "original": tmp_path / "base"}, "is quantised as well"),
        ({"base_dtype": "dequantised"}, "Did you mean 'dequantized'"),
        ({"base_dtype": "dequantized", "original": dense}, "only if the base's dtype is 'original'"),
    ]:
        with pytest.raises(ValueError, match=said):
            StreamMerge(tmp_path / "base", [folder], **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is not quantised"):
        StreamMerge(dense, [folder], base_dtype="requantized")


# ---- blocks that are run through more than once ----------------------------------------------------------------------------
@pytest.mark.parametrize("make", [llama, gpt2])
def test_repeated_blocks_are_written(make: Any, tmp_path: Path) -> None:
    base = saved(make(), tmp_path / "base")
    targets = ["q_proj", "v_proj"] if make is llama else ["c_attn"]
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=targets, layer_replication=[(0, 2), (1, 2), (0, 1)]))
    merged = PeftModel.from_pretrained(load(base), folder).merge_and_unload()
    out = StreamMerge(base, [folder]).run(tmp_path / "out")
    found, expected = tensors(out), merged.state_dict()
    assert set(expected) - set(found) == ({"lm_head.weight"} if make is gpt2 else set())
    assert [k for k in found if not torch.equal(found[k], expected[k])] == []
    ids = torch.arange(8).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(load(out)(ids).logits, merged(ids).logits)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("num_hidden_layers", config.get("n_layer")) == 4


def test_trained_biases(tmp_path: Path) -> None:
    base = saved(llama(attention_bias=True), tmp_path / "base")
    changed = both_ways(tmp_path, base, adapter(base, tmp_path / "a", METHODS["BEFT"](target_modules=["v_proj"])))
    assert changed == {f"model.layers.{i}.self_attn.v_proj.bias" for i in range(2)}
    plain = saved(llama(), tmp_path / "plain")
    with pytest.raises(ValueError, match="the layers of this architecture have none"):
        StreamMerge(plain, [adapter(plain, tmp_path / "b", METHODS["BEFT"](target_modules=["v_proj"]))]).run(tmp_path / "none")


# ---- several adapters -----------------------------------------------------------------------------------------------------------
def test_adapters_of_two_methods_in_the_order_in_which_they_act(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    one = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    other = adapter(base, tmp_path / "b", METHODS["OFT"](target_modules=["v_proj", "o_proj"], oft_block_size=4), 2)  # type: ignore[call-arg]
    assert len(both_ways(tmp_path, base, one, other)) == 6
    shutil.rmtree(tmp_path / "reference")
    turned_round = in_memory(base, [other, one], tmp_path / "reference")
    with pytest.raises(AssertionError):
        check_same(base, tmp_path / "out", turned_round)


def test_weights_are_strengths(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    one = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    other = adapter(base, tmp_path / "b", VeraConfig(r=4, target_modules=["v_proj"]), 2)
    both_ways(tmp_path, base, one, other, weights=[0.5, -2.0])
    with pytest.raises(ValueError, match="1 weights for 2 adapters; give one a piece"):
        StreamMerge(base, [one, other], [1.0])


@pytest.mark.parametrize(
    ("how", "more"), [("linear", {}), ("cat", {}), ("ties", {"density": 0.5}), ("dare_linear", {"density": 0.5, "seed": 3})]
)
def test_combinations(how: str, more: dict[str, Any], tmp_path: Path) -> None:
    base = saved(llama(tie_word_embeddings=False), tmp_path / "base", torch.float32)
    options = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["lm_head"], "trainable_token_indices": [1, 4]}
    one = adapter(base, tmp_path / "a", LoraConfig(r=2, **options))  # type: ignore[arg-type]
    other = adapter(base, tmp_path / "b", LoraConfig(r=3, **options), 2)  # type: ignore[arg-type]
    tuned = PeftModel.from_pretrained(load(base), one)
    tuned.load_adapter(other, "other")
    tuned.add_weighted_adapter(["default", "other"], [0.7, 0.3], "both", how, **more)
    tuned.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "reference")
    out = StreamMerge(base, [one, other], [0.7, 0.3], combine=how, **more).run(tmp_path / "out")
    expected, found = tensors(tmp_path / "reference"), tensors(out)
    assert expected.keys() == found.keys()
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", ["cat", "ties"])
@pytest.mark.parametrize("count", [1, 2])
def test_weights_by_layer(count: int, how: str, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base", torch.float32)
    folders = [adapter(base, tmp_path / "ab"[i], LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), i) for i in range(2)][:count]
    weights = {"layers.0.*": [1.0, -0.5][:count], ".*": [0.25, 2.0][:count]}
    tuned = PeftModel.from_pretrained(load(base), folders[0])
    for folder in folders[1:]:
        tuned.load_adapter(folder, "other")
    tuned.add_weighted_adapter(["default", "other"][:count], weights, "both", how, density=0.5)
    tuned.merge_and_unload(adapter_names=["both"]).save_pretrained(tmp_path / "reference")
    expected = tensors(tmp_path / "reference")
    found = tensors(StreamMerge(base, folders, weights, combine=how, density=0.5).run(tmp_path / "out"))
    for key in expected:
        torch.testing.assert_close(found[key], expected[key], rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="say how to combine"):
        StreamMerge(base, folders, weights)
    with pytest.raises(ValueError, match="are not finite"):
        StreamMerge(base, folders, [float("nan")] * count)


# ---- files ------------------------------------------------------------------------------------------------------------------------
def test_other_dtype_and_other_files(tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base", torch.float32)
    (base / "vocab.txt").write_text("of the base")
    (base / "notes.md").write_text("kept")
    (base / "pytorch_model.bin").write_bytes(b"never read")
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    (folder / "tokenizer_config.json").write_text('{"of": "the adapter"}')
    reference = tensors(in_memory(base, [folder], tmp_path / "reference"))
    out = StreamMerge(base, [folder], out_dtype=torch.bfloat16).run(tmp_path / "out")
    found = tensors(out)
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[key], reference[key].bfloat16()) for key in found)
    assert load(out).dtype == torch.bfloat16
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "generation_config.json", "notes.md", "tokenizer_config.json"} <= names
    assert not {"pytorch_model.bin", "vocab.txt", journal.NAME} & names
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in found.values())
    for key, file in index["weight_map"].items():
        assert key in read_header(out / file)[0]
    assert [p for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("where", [3, {}, {"model.norm.weight": None}, None])
def test_an_index_that_says_nothing(where: Any, tmp_path: Path) -> None:
    base = saved(llama(), tmp_path / "base")
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(ValueError, match="does not say which tensor is in which file"):
        StreamMerge(base, [folder])


def test_headers_come_first_and_tensors_in_any_order(tmp_path: Path) -> None:
    given = {"a": torch.randn(3, 5), "b": torch.arange(7), "c": torch.randn(2, 2).bfloat16(), "none": torch.empty(0, 4)}
    names = {torch.float32: "F32", torch.int64: "I64", torch.bfloat16: "BF16"}
    shard = Shard(tmp_path / "s.safetensors", [(k, names[t.dtype], tuple(t.shape), t.nbytes) for k, t in given.items()], {"format": "pt"})
    shard.put("c", given["c"])
    shard.put("a", given["a"][1:], skipped=20)
    shard.put("a", given["a"][:1])
    shard.put("b", given["b"])
    shard.close()
    assert all(torch.equal(found, given[key]) for key, found in load_file(shard.file).items())
    check = shard.check()
    assert shard.is_whole(check)
    with Files() as files:
        entry = read_header(shard.file)[0]["a"]
        assert torch.equal(files.read(entry, slice(1, 3)), given["a"][1:3])
    with shard.file.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")
    assert not shard.is_whole(check)


# ---- refusals -----------------------------------------------------------------------------------------------------------------------
@pytest.fixture
def small(tmp_path: Path) -> tuple[Path, Path]:
    base = saved(llama(), tmp_path / "base")
    return base, adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["q_proj"]))


def test_what_cannot_be_merged_is_refused_with_the_remedy(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    config = json.loads((base / "config.json").read_text())

    def refused(match: str, base: Path = base, folder: Path = folder, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=match):
            StreamMerge(base, [folder]).run(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        assert not working_folder(tmp_path / "out").exists()

    quantised = tmp_path / "quantised"
    shutil.copytree(base, quantised)
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "vptq"}}))
    refused("quantised .vptq.*Give the folder of the original, dense weights.*--original.*or load the model", quantised)
    (quantised / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "bitsandbytes"}}))
    refused("quantised .bitsandbytes.*Say what to merge into", quantised)

    packed = tmp_path / "packed"
    shutil.copytree(base, packed)
    shard = next(p for p in packed.glob("*.safetensors") if "model.layers.0.self_attn.q_proj.weight" in load_file(p))
    save_file({k: t.to(torch.int8) if "q_proj" in k else t for k, t in load_file(shard).items()}, shard, {"format": "pt"})
    refused("stored as int8.*dense weights", packed)

    pickled = tmp_path / "pickled"
    pickled.mkdir()
    shutil.copy(base / "config.json", pickled)
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refused("pickles.*Save them as safetensors first", pickled)

    other = saved(llama(hidden_size=32), tmp_path / "other")
    refused("made for another base", other)

    cut = tmp_path / "cut"
    shutil.copytree(base, cut)
    first = sorted(cut.glob("*.safetensors"))[0]
    first.write_bytes(first.read_bytes()[:-2])
    refused("no whole safetensors file", cut)

    prompt = tmp_path / "prompt"
    prompt.mkdir()
    (prompt / "adapter_config.json").write_text('{"peft_type": "PROMPT_TUNING", "num_virtual_tokens": 2, "task_type": "CAUSAL_LM"}')
    refused("acts on the inputs", folder=prompt, error=TypeError)

    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = broken / "adapter_model.safetensors"
    save_file({k: t * float("nan") for k, t in load_file(file).items()}, file)
    refused("not finite", folder=broken)

    lacking = tmp_path / "lacking"
    shutil.copytree(folder, lacking)
    file = lacking / "adapter_model.safetensors"
    save_file(dict(list(load_file(file).items())[1:]), file)
    refused("its file lacks 1 tensors", folder=lacking)


def test_the_disk_is_measured_before_anything_is_written(small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, folder = small
    merge = StreamMerge(base, [folder])
    assert merge.size == sum(file.stat().st_size for file in base.glob("*.safetensors"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=merge.size + SPARE - 1))
    with pytest.raises(OSError, match="GB free and the merged model needs .* make room"):
        merge.run(tmp_path / "out")
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a"}
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=merge.size + SPARE))
    assert merge.run(tmp_path / "out").is_dir()
    with pytest.raises(ValueError, match="exists already"):
        merge.run(tmp_path / "out")


def test_what_examines_the_result_may_undo_it(small: tuple[Path, Path], tmp_path: Path) -> None:
    def examine(folder: Path) -> None:
        assert load(folder).config.vocab_size == 40
        raise RuntimeError("no")

    base, folder = small
    with pytest.raises(RuntimeError, match="no"):
        StreamMerge(base, [folder]).run(tmp_path / "out", examine=examine)
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a"}


# ---- interruptions --------------------------------------------------------------------------------------------------------------------
class Killed(BaseException):
    pass


def interrupted(merge: StreamMerge, out: Path, after: int) -> None:
    written = 0

    def progress(count: int) -> None:
        nonlocal written
        written += count
        if written >= after:
            raise Killed

    with pytest.raises(Killed):
        merge.run(out, progress)


def test_an_interrupted_merge_goes_on_where_it_was(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    reference = in_memory(base, [folder], tmp_path / "reference")
    out = tmp_path / "out"
    merge = StreamMerge(base, [folder])
    interrupted(merge, out, merge.size // 2)
    assert not out.exists()
    working = working_folder(out)
    finished = json.loads((working / journal.NAME).read_text())["finished"]
    assert 0 < len(finished) < len(merge.shards)
    before = {name: (working / name).stat().st_mtime_ns for name in finished}
    broken = sorted(finished)[0]
    with (working / broken).open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\x7f")
    counted: list[int] = []
    StreamMerge(base, [folder]).run(out, counted.append)
    assert sum(counted) == sum(t.nbytes for t in tensors(base).values())
    check_same(base, out, reference)
    kept = {name for name, at in before.items() if (out / name).stat().st_mtime_ns == at}
    assert kept == set(finished) - {broken}


def test_what_is_interrupted_while_it_is_examined_is_kept(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    working = working_folder(tmp_path / "out")

    def written() -> dict[str, int]:
        return {file.name: file.stat().st_mtime_ns for file in working.glob("*.safetensors")}

    found: list[dict[str, int]] = []

    def examine(_: Path) -> None:
        found.append(written())
        if len(found) == 1:
            raise Killed

    with pytest.raises(Killed):
        StreamMerge(base, [folder]).run(tmp_path / "out", examine=examine)
    assert written() == found[0]
    out = StreamMerge(base, [folder]).run(tmp_path / "out", examine=examine)
    assert found[1] == found[0]
    assert not working.exists()
    assert not (out / journal.NAME).exists()
    check_same(base, out, in_memory(base, [folder], tmp_path / "reference"))


@pytest.mark.parametrize(("after", "whole"), [(1, 0), (6, 1)])
def test_a_disk_that_fills_up(after: int, whole: int, small: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard of which something is missing is not taken for finished; the others are."""
    base, folder = small
    reference = in_memory(base, [folder], tmp_path / "reference")
    out, count = tmp_path / "out", itertools.count()

    def until_full(write: Any) -> Any:
        def full(*given: Any) -> None:
            if next(count) >= after:
                raise OSError(errno.ENOSPC, "full")
            write(*given)

        return full

    for way in ("write", "copy"):
        monkeypatch.setattr(Output, way, until_full(getattr(Output, way)))
    with pytest.raises(OSError, match="full"):
        StreamMerge(base, [folder]).run(out)
    monkeypatch.undo()
    working, expected = working_folder(out), tensors(reference)
    finished = json.loads((working / journal.NAME).read_text())["finished"]
    assert len(finished) == whole < len(StreamMerge(base, [folder]).shards)
    for name in finished:
        assert all(torch.equal(t, expected[key]) for key, t in load_file(working / name).items())
    check_same(base, StreamMerge(base, [folder]).run(out), reference)


def test_what_was_submitted_after_a_failure_is_not_begun() -> None:
    done: list[str] = []

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"), Writing() as writing:
        writing.submit(lambda: done.append("first"), 1)
        writing.afterwards(lambda: done.append("flushed"))
        writing.submit(lambda: [time.sleep(0.05), fail()], 1)
        writing.submit(lambda: done.append("second"), 1)
        writing.afterwards(lambda: done.append("flushed again"))
    assert done == ["first", "flushed"]


def test_another_merge_into_the_same_folder_begins_anew(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    merge = StreamMerge(base, [folder])
    interrupted(merge, tmp_path / "out", merge.size // 2)
    reference = in_memory(base, [folder], tmp_path / "reference", [0.5])
    check_same(base, StreamMerge(base, [folder], [0.5]).run(tmp_path / "out"), reference)


PROGRAM = """
import sys, time
from inlay.operations.stream_merge import StreamMerge
def slowly(count):
    print(count, flush=True)
    time.sleep(0.05)
StreamMerge(sys.argv[1], [sys.argv[2]]).run(sys.argv[3], slowly)
"""


def test_killed_outright(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    program = subprocess.Popen([sys.executable, "-c", PROGRAM, str(base), str(folder), str(tmp_path / "out")], stdout=subprocess.PIPE)
    noted, until = working_folder(tmp_path / "out") / journal.NAME, time.monotonic() + 60
    while time.monotonic() < until and not (noted.is_file() and '.safetensors"' in noted.read_text()):
        time.sleep(0.005)
    program.send_signal(signal.SIGKILL)
    program.wait()
    assert not (tmp_path / "out").exists()
    assert json.loads(noted.read_text())["finished"]
    reference = in_memory(base, [folder], tmp_path / "reference")
    check_same(base, StreamMerge(base, [folder]).run(tmp_path / "out"), reference)


def test_nothing_changes_without_a_run(small: tuple[Path, Path], tmp_path: Path) -> None:
    base, folder = small
    merge = StreamMerge(base, [folder], [0.5])
    assert [(c.name, c.shape, c.how) for c in merge.changes] == [
        (f"model.layers.{i}.self_attn.q_proj.weight", (16, 16), "LORA x 0.5") for i in range(2)
    ]
    assert merge.config_changes == {}
    assert {p.name for p in tmp_path.iterdir()} == {"base", "a"}


def test_a_model_of_speech(tmp_path: Path) -> None:
    base = saved(speech(), tmp_path / "base", torch.float32)
    folder = adapter(base, tmp_path / "a", LoraConfig(r=2, target_modules=["conv_layers.1.conv", "q_proj"]), cls=Wav2Vec2Model)
    reference = in_memory(base, [folder], tmp_path / "reference", cls=Wav2Vec2Model)
    out = StreamMerge(base, [folder]).run(tmp_path / "out")
    changed = check_same(base, out, reference)
    assert changed == {"feature_extractor.conv_layers.1.conv.weight", "encoder.layers.0.attention.q_proj.weight"}
