"""Files: HF's format, written whole or not at all, read strictly."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import inlay
from inlay.formats import folder as files

from ..tiny import assert_same, bert_classifier, ids, llama, logits, snapshot, stir


@pytest.fixture
def saved(tmp_path):
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    stir(model)
    model.save_pretrained(tmp_path)
    return tmp_path, logits(model.eval(), ids())


def test_what_is_written(saved):
    path, _ = saved
    assert sorted(p.name for p in path.iterdir()) == ["README.md", "adapter_config.json", "adapter_model.safetensors"]
    config = json.loads((path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["inference_mode"], config["target_modules"]) == ("LORA", 4, True, ["q_proj", "v_proj"])
    assert config["peft_version"] == "0.21.2"
    tensors = load_file(path / "adapter_model.safetensors")
    assert len(tensors) == 8
    assert tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"].shape == (4, 32)
    assert "library_name: peft" in (path / "README.md").read_text()


def test_round_trip(saved):
    path, y = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    assert type(model) is inlay.PeftModelForCausalLM
    assert torch.equal(logits(model, ids()), y)
    assert not any(q.requires_grad for q in model.parameters())
    again = inlay.PeftModel.from_pretrained(llama(), path, is_trainable=True)
    assert sum(q.requires_grad for q in again.parameters()) == 8


def test_shards_with_an_index(saved, tmp_path):
    path, y = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    out = tmp_path / "sharded"
    model.save_pretrained(out, max_shard_size="1KiB")
    shards = sorted(p.name for p in out.glob("*.safetensors"))
    assert len(shards) == 4
    assert not (out / "adapter_model.safetensors").exists()
    assert torch.equal(logits(inlay.PeftModel.from_pretrained(llama(), out), ids()), y)
    model.save_pretrained(out)
    assert not (out / "adapter_model.safetensors.index.json").exists()
    assert torch.equal(logits(inlay.PeftModel.from_pretrained(llama(), out), ids()), y)


def test_several_adapters_go_to_subfolders(saved, tmp_path):
    path, y = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    model.add_adapter("other", inlay.LoraConfig(target_modules=["k_proj"]))
    out = tmp_path / "two"
    model.save_pretrained(out)
    assert (out / "other" / "adapter_model.safetensors").is_file()
    assert torch.equal(logits(inlay.PeftModel.from_pretrained(llama(), out), ids()), y)
    with pytest.raises(ValueError, match="other.*subfolder"):
        (out / "adapter_config.json").unlink()
        inlay.PeftModel.from_pretrained(llama(), out)
    assert list(inlay.PeftModel.from_pretrained(llama(), out, subfolder="other").peft_config) == ["default"]


def damage(path, how):
    file = path / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    if how == "missing":
        del tensors[first]
    elif how == "unexpected":
        tensors["base_model.model.model.layers.0.self_attn.o_proj.lora_A.weight"] = torch.zeros(4, 32)
    elif how == "misshaped":
        tensors[first] = torch.zeros(5, 32)
    elif how == "nan":
        tensors[first][0, 0] = float("nan")
    save_file(tensors, file)
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-100])
    if how == "no json":
        (path / "adapter_config.json").write_text("{")
    if how == "10 GB":
        config = json.loads((path / "adapter_config.json").read_text())
        (path / "adapter_config.json").write_text(json.dumps(config | {"r": 10**9}))
    return first


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "1 tensors are missing: base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"),
        ("unexpected", "o_proj.lora_A.weight"),
        ("misshaped", r"\(5, 32\) in the file and \(4, 32\) in the model"),
        ("nan", "not finite"),
        ("truncated", "truncated"),
        ("no json", "adapter_config.json is no valid JSON"),
        ("10 GB", r"in the file and \(1000000000, 32\) in the model"),
    ],
)
def test_bad_files_change_nothing(saved, how, message):
    path, _ = saved
    damage(path, how)
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        inlay.PeftModel.from_pretrained(model, path)
    assert_same(before, snapshot(model))
    peft_model = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]))
    state = snapshot(peft_model)
    with pytest.raises(ValueError, match=message):
        peft_model.load_adapter(path, "bad")
    assert_same(state, snapshot(peft_model))


def test_not_strict_loads_what_fits_and_says_what_not(saved):
    path, _ = saved
    missing = damage(path, "missing")
    with pytest.warns(UserWarning, match="1 tensors are missing"):
        model = inlay.PeftModel.from_pretrained(llama(), path, strict=False)
    assert all(q.device.type == "cpu" for q in model.parameters())
    state = model.state_dict()
    assert torch.isfinite(logits(model, ids())).all()
    assert missing.endswith("lora_A.weight")
    assert len([k for k in state if "lora_" in k]) == 8


def test_a_report_for_those_who_ask(saved):
    path, _ = saved
    tensors = load_file(path / "adapter_model.safetensors")
    first = next(iter(tensors))
    del tensors[first]
    tensors["base_model.model.nowhere.lora_A.weight"] = torch.zeros(1)
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    report = inlay.set_peft_model_state_dict(model, tensors)
    assert report.missing_keys == ["model.layers.0.self_attn.q_proj.adapters.default.lora_A"]
    assert report.unexpected_keys == ["base_model.model.nowhere.lora_A.weight"]


def test_pickles_are_read_only_on_request(saved, tmp_path):
    path, y = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    out = tmp_path / "pickled"
    model.save_pretrained(out, safe_serialization=False)
    assert (out / "adapter_model.bin").is_file()
    with pytest.raises(ValueError, match="allow_pickle=True"):
        inlay.PeftModel.from_pretrained(llama(), out)
    assert torch.equal(logits(inlay.PeftModel.from_pretrained(llama(), out, allow_pickle=True), ids()), y)


@pytest.mark.parametrize("name", ["../x", "a/b", "a.b", "", "__base__", "keys", ".."])
def test_names_that_are_no_names(name, saved):
    path, _ = saved
    model = llama()
    before = snapshot(model)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"]), name)
    with pytest.raises(ValueError, match="cannot name an adapter"):
        inlay.PeftModel.from_pretrained(model, path, name)
    assert_same(before, snapshot(model))


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / files.INDEX_NAME).write_text(json.dumps({"weight_map": {"x": "../secret.safetensors"}}))
    with pytest.raises(ValueError, match="outside its folder"):
        files.weight_files(tmp_path)


def test_a_save_that_fails_leaves_the_old_files(saved, monkeypatch):
    path, _ = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    stir(model, by=1.0)
    before = {p.name: p.read_bytes() for p in path.iterdir()}
    monkeypatch.setattr(files.json, "dumps", lambda *a, **k: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(path)
    monkeypatch.undo()
    assert {p.name: p.read_bytes() for p in path.iterdir()} == before


def test_saving_asks_no_hub(saved, monkeypatch, tmp_path):
    import huggingface_hub

    path, _ = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    model.peft_config["default"].base_model_name_or_path = "someone/model"

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    for name in ("hf_hub_download", "file_exists", "HfApi"):
        monkeypatch.setattr(huggingface_hub, name, refuse)
    model.save_pretrained(tmp_path / "out")
    assert "base_model: someone/model" in (tmp_path / "out" / "README.md").read_text()


def test_a_model_card_of_the_user_is_kept(saved):
    path, _ = saved
    (path / "README.md").write_text("---\nlicense: mit\ntags: [mine]\n---\n# My adapter\n")
    model = inlay.PeftModel.from_pretrained(llama(), path)
    model.save_pretrained(path)
    text = (path / "README.md").read_text()
    assert "license: mit" in text
    assert "# My adapter" in text
    assert "- mine" in text
    assert "library_name: peft" in text


def test_state_of_a_sharded_model_is_taken_from_what_is_given(saved, tmp_path):
    path, _ = saved
    model = inlay.PeftModel.from_pretrained(llama(), path)
    gathered = {f"module.{k}": v * 2 for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "out", state_dict=gathered)
    first = load_file(path / "adapter_model.safetensors")
    doubled = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert first.keys() == doubled.keys()
    assert all(torch.equal(2 * first[k], doubled[k]) for k in first)
    with pytest.raises(ValueError, match="lacks"):
        model.save_pretrained(tmp_path / "out", state_dict={})
    empty = {k: (v[:0] if "lora_A" in k else v) for k, v in gathered.items()}
    with pytest.raises(ValueError, match="gather"):
        model.save_pretrained(tmp_path / "out", state_dict=empty)


def test_bfloat16_adapters_keep_their_dtype_in_files(tmp_path):
    model = inlay.get_peft_model(llama().to(torch.bfloat16), inlay.LoraConfig(target_modules=["q_proj"]), autocast_adapter_dtype=False)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    loaded = inlay.PeftModel.from_pretrained(llama().to(torch.bfloat16), tmp_path)
    assert {q.dtype for n, q in loaded.named_parameters() if "lora_" in n} == {torch.float32}


def test_auto_model_from_the_folder_alone(tmp_path):
    base = llama()
    base.save_pretrained(tmp_path / "base")
    from transformers import AutoModelForCausalLM

    model = inlay.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), inlay.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    for cls in (inlay.AutoPeftModel, inlay.AutoPeftModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "adapter")
        assert type(loaded) is inlay.PeftModelForCausalLM
        assert torch.equal(logits(loaded, ids()), logits(model.eval(), ids()))
    with pytest.raises(ValueError, match="for the task CAUSAL_LM"):
        inlay.AutoPeftModelForSeq2SeqLM.from_pretrained(tmp_path / "adapter")


@pytest.mark.parametrize("to", ["nf4", "int8", {"to": "nf4", "double": False, "skip": ["down_proj", "lm_head", "embed_tokens"]}], ids=str)
def test_auto_model_on_a_quantised_base(to, tmp_path):
    """The base is quantised as it is read; the adapter is the same."""
    llama().save_pretrained(tmp_path / "base")
    base = inlay.from_pretrained_quantized(tmp_path / "base", **({"to": to} if isinstance(to, str) else to))
    model = inlay.get_peft_model(base, inlay.LoraConfig(target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"))
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    for cls in (inlay.AutoPeftModel, inlay.AutoPeftModelForCausalLM):
        loaded = cls.from_pretrained(tmp_path / "adapter", quantization=to)
        assert torch.equal(logits(loaded, ids()), logits(model.eval(), ids()))
        kinds = {n: type(q).__name__ for n, q in loaded.get_base_model().named_parameters()}
        assert kinds["model.layers.0.self_attn.q_proj.weight"] == "QuantizedTensor"
        assert kinds["model.layers.0.mlp.down_proj.weight"] == ("QuantizedTensor" if isinstance(to, str) else "Parameter")
    with pytest.raises(ValueError, match="'nf5'"):
        inlay.AutoPeftModel.from_pretrained(tmp_path / "adapter", quantization="nf5")
    with pytest.raises(ValueError, match=r"'dubble'; its options are .* Did you mean 'double'"):
        inlay.AutoPeftModel.from_pretrained(tmp_path / "adapter", quantization={"to": "nf4", "dubble": True})


def test_auto_model_with_a_task_head_on_a_quantised_base(tmp_path):
    bert_classifier().save_pretrained(tmp_path / "base")
    from transformers import AutoModelForSequenceClassification

    dense = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model = inlay.get_peft_model(dense, inlay.LoraConfig(target_modules=["query"], task_type="SEQ_CLS"))
    stir(model)
    model.save_pretrained(tmp_path / "adapter")
    loaded = inlay.AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", quantization="nf4", is_trainable=True)
    kinds = {n: type(q).__name__ for n, q in loaded.named_parameters()}
    assert sum(kind == "QuantizedTensor" for kind in kinds.values()) == 2 * 6 + 1  # six in a layer, and the pooler
    assert not [n for n, kind in kinds.items() if "classifier" in n and kind == "QuantizedTensor"]
    y, expected = logits(loaded.eval(), ids()), logits(model.eval(), ids())
    assert 0 < (y - expected).norm() / expected.norm() < 0.3
    loaded.train()(input_ids=ids(), labels=torch.tensor([0, 1])).loss.backward()
    assert any(q.grad is not None for n, q in loaded.named_parameters() if "classifier" in n)


def test_nothing_is_imported_because_a_file_asks_for_it(tmp_path):
    model = inlay.get_peft_model(llama(), inlay.LoraConfig(target_modules=["q_proj"]))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config |= {"auto_mapping": {"parent_library": "antigravity", "base_model_class": "fly"}, "base_model_name_or_path": "x"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="load the base yourself"):
        inlay.AutoPeftModel.from_pretrained(tmp_path)


def test_tied_retrained_ends_stay_one_weight_after_loading(tmp_path):
    config = inlay.LoraConfig(target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    model = inlay.get_peft_model(llama(tie_word_embeddings=True), config)
    stir(model)
    model.save_pretrained(tmp_path)
    loaded = inlay.PeftModel.from_pretrained(llama(tie_word_embeddings=True), tmp_path, is_trainable=True)
    base = loaded.get_base_model()
    assert base.lm_head.adapters["default"].weight is base.model.embed_tokens.adapters["default"].weight
    assert torch.equal(logits(loaded.eval(), ids()), logits(model.eval(), ids()))


def test_files_name_their_targets_and_hold_no_seed(tmp_path):
    import warnings

    import peft

    for i, targets in enumerate((None, "all-linear", ["q_proj"], r".*q_proj")):
        config = inlay.LoraConfig(target_modules=targets, seed=3, lora_alpha=32.0)
        inlay.get_peft_model(llama(), config).save_pretrained(tmp_path / str(i))
        plain = json.loads((tmp_path / str(i) / "adapter_config.json").read_text())
        linear = ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]
        assert plain["target_modules"] == [["q_proj", "v_proj"], linear, ["q_proj"], r".*q_proj"][i]
        assert plain["lora_alpha"] == 32
        assert type(plain["lora_alpha"]) is int
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert peft.PeftConfig.from_pretrained(tmp_path / str(i)).r == 8


def test_all_linear_is_spelled_out_where_ends_of_names_would_mean_too_much(tmp_path):
    model = torch.nn.ModuleDict({"proj": torch.nn.Linear(2, 2), "norms": torch.nn.ModuleDict({"proj": torch.nn.LayerNorm(2)})})
    config = inlay.LoraConfig(target_modules="all-linear")
    inlay.inject_adapter_in_model(config, model)
    assert config.target_modules == "proj"
    assert inlay.explain_targets(model, config).matched == ["proj"]
