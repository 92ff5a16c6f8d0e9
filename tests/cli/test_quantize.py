"""``inlay quantize``: what its folder holds, what memory it takes, and the report of what a LoRA can make up for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import inlay
from inlay.cli.app import run
from inlay.kernels.quantised_tensor import QuantizedTensor
from inlay.training.models import bundled_base, bundled_data, load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with the bundled one's tokenizer."""
    path = tmp_path_factory.mktemp("model")
    config = AutoConfig.from_pretrained(bundled_base())
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads = 1, 64, 64, 2
    config.num_key_value_heads, config.head_dim, config.max_position_embeddings, config.initializer_range = 1, 32, 32, 0.2
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(path)
    load_tokenizer("bundled").save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 27).view(2, 12)
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.parametrize("to", ["nf4", "fp4", "int8", "int4"])
def test_the_folder_holds_what_quantising_in_memory_gives(
    to: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a base in several files; transformers loads the folder with bitsandbytes, as users do."""
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    sharded = tmp_path / "sharded"
    dense.save_pretrained(sharded, max_shard_size="100KB")
    load_tokenizer("bundled").save_pretrained(sharded)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    out = tmp_path / "q"
    assert run(["quantize", str(sharded), "--to", to, "--out", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    expected = inlay.quantize_(dense, to)
    weights = [q for q in expected.parameters() if isinstance(q, QuantizedTensor)]
    assert len(weights) == 7
    assert found["quantised"] == sum(q.numel() for q in weights)
    assert found["bytes_per_parameter"] == pytest.approx(sum(q.stored_bytes for q in weights) / found["quantised"])
    assert found["bytes"] == sum(f.stat().st_size for f in out.iterdir())
    (usual := tmp_path / "usual").mkdir()
    (usual / "file").touch()
    assert {oct(f.stat().st_mode) for f in out.iterdir()} == {oct((usual / "file").stat().st_mode)}
    assert out.stat().st_mode == usual.stat().st_mode
    y = logits(expected)
    assert torch.equal(logits(inlay.from_pretrained_quantized(out)), y)
    assert load_tokenizer(str(out)).decode([3, 4]) == load_tokenizer("bundled").decode([3, 4])
    if to == "int4":  # which bitsandbytes has not
        return
    theirs: Any = AutoModelForCausalLM.from_pretrained(out, device_map="cpu")
    layer = theirs.model.layers[0].mlp.up_proj
    assert type(layer).__name__ == ("Linear8bitLt" if to == "int8" else "Linear4bit")
    # Training mode: for inference bitsandbytes rounds the scales on some CPUs. In 8 bits it rounds the inputs, too.
    with torch.no_grad():
        found_logits = theirs.train()(input_ids=torch.arange(3, 27).view(2, 12)).logits
    if to == "int8":
        assert (found_logits - y).norm() < 0.02 * y.norm()
    else:
        torch.testing.assert_close(found_logits, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("said", [True, False], ids=["in-the-config", "in-the-files"])
@pytest.mark.parametrize("to", ["nf4", "int4"])
def test_what_is_not_quantised_keeps_its_dtype(
    to: str, said: bool, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(base)
    load_tokenizer("bundled").save_pretrained(base)
    if not said:
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    stored = load_file(base / "model.safetensors")
    assert run(["quantize", str(base), "--to", to, "--out", str(tmp_path / "q"), "--json"]) == 0
    assert run(["quantize", str(base), "--to", to, "--out", str(tmp_path / "wide"), "--dtype", "float32", "--json"]) == 0
    written, wide = (load_file(tmp_path / name / "model.safetensors") for name in ("q", "wide"))
    left = [name for name in stored if written[name].is_floating_point()]
    assert len(left) == 5
    assert all(written[name].dtype == torch.bfloat16 and torch.equal(written[name], stored[name]) for name in left)
    assert all(wide[name].dtype == torch.float32 for name in left)
    assert json.loads((tmp_path / "q" / "config.json").read_text())["dtype"] == "bfloat16"


def test_what_is_skipped_stays(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["quantize", str(folder), "--out", str(tmp_path / "q"), "--skip", "down_proj", "--skip", "self_attn", "--skip", "lm_head"]
    assert run([*words, "--skip", "embed_tokens", "--no-double", "--block", "32", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes_per_parameter"] == pytest.approx(0.5 + 4 / 32)
    names = {n for n, q in inlay.from_pretrained_quantized(tmp_path / "q").named_parameters() if isinstance(q, QuantizedTensor)}
    assert names == {"model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.gate_proj.weight"}
    for words, said in (
        (["--to", "nf5"], "--to nf5: give nf4, fp4, int4, int8. Did you mean nf4?"),
        (["--skip", "q_porj"], "skip='q_porj' fits no module"),
        (["--block", "33"], "33"),
        (["--out", str(tmp_path / "q")], "exists already; name a new folder"),
    ):
        assert run(["quantize", str(folder), "--out", str(tmp_path / "none"), *words]) == 2
        assert said in " ".join(capsys.readouterr().err.split())
        assert not (tmp_path / "none").exists()
    assert run(["quantize", str(tmp_path / "q"), "--to", "int8", "--out", str(tmp_path / "none")]) == 2
    assert "quantized to 'nf4' already" in " ".join(capsys.readouterr().err.split()).replace("quantised", "quantized")


# Memory of the process, with the model's files not counted: they are mapped.
PEAK = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import inlay, transformers, transformers.quantizers, inlay.training.sft
from inlay.cli.app import run
from inlay.training.models import bundled_base

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024

# A first one, so that what stays in memory of libraries is not counted.
assert run(["quantize", "bundled", "--out", sys.argv[2] + "-first", "--json"]) == 0
start, peak, going = held(), 0, True
def watch():
    global peak
    while going:
        peak = max(peak, held())
        time.sleep(0.001)
watcher = threading.Thread(target=watch)
watcher.start()
if sys.argv[3] == "command":
    assert run(["quantize", sys.argv[1], "--out", sys.argv[2], "--json"]) == 0
else:
    model = inlay.AutoPeftModelForCausalLM.from_pretrained(sys.argv[2], quantization="nf4")
going = False
watcher.join()
print(peak - start)
"""


@pytest.mark.parametrize("how", ["command", "loading"])
def test_the_dense_model_is_never_in_memory(how: str, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(bundled_base())
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.num_attention_heads = 12, 768, 2048, 12
    config.num_key_value_heads, config.head_dim = 12, 64
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    dense = sum(q.numel() for q in model.parameters()) * 4
    largest = max(q.numel() for q in model.parameters()) * 4
    model.save_pretrained(tmp_path / "base")
    load_tokenizer("bundled").save_pretrained(tmp_path / "base")
    if how == "loading":
        peft: Any = inlay.get_peft_model(model, inlay.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        peft.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
        peft.save_pretrained(tmp_path / "out")
    inlay.quantize_(peft.unload() if how == "loading" else model)
    result = sum(q.stored_bytes if isinstance(q, QuantizedTensor) else 4 * q.numel() for q in model.parameters())
    words = [sys.executable, "-c", PEAK, str(tmp_path / "base"), str(tmp_path / "out"), how]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    peak = int(done.stdout.split()[-1])
    allowed = result + 3 * largest + 32e6
    assert allowed < 0.5 * dense
    assert peak < allowed, f"{peak / 1e6:.0f} MB at the peak; allowed {allowed / 1e6:.0f}, dense {dense / 1e6:.0f}"


def test_the_report_as_json(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bundled_data("commands")
    words = ["quantize", str(folder), "--to", "nf4", "--out", str(tmp_path / "q"), "--report-init", "--calibration", str(data)]
    assert run([*words, "--rank", "4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    starts = found["starts"]
    assert starts["rank"] == 4
    assert starts["measured_on"] == "held out"
    assert len(starts["layers"]) == 7
    for error in (starts["output"], *(layer["output"] for layer in starts["layers"])):
        assert error["cloq"] < error["own"] < error["plain"]
        assert error["loftq"] < error["plain"]
    for layer in starts["layers"]:
        # Of the weight itself, LoftQ leaves least.
        assert layer["weight"]["loftq"] < layer["weight"]["cloq"] < layer["weight"]["plain"]
    assert (tmp_path / "q" / "model.safetensors").is_file()


def test_the_report_as_a_table(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--report-init"]) == 0
    shown = capsys.readouterr().out
    assert "Error of the outputs (own samples) with a LoRA of rank 16" in shown
    assert "CLoQ, own samples" in shown
    assert "CLoQ, data" not in shown
    assert "self_attn.q_proj" in shown


def test_what_cannot_be(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"text": "ls"}) + "\n")
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--calibration", str(rows)]) == 2
    assert "--calibration: only --report-init has a use for data" in capsys.readouterr().err
    assert run(["quantize", str(folder), "--out", str(tmp_path / "q"), "--calibration", str(rows), "--report-init"]) == 2
    assert "1 rows can be used; give at least 4" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "q").exists()
