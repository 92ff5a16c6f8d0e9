"""The whole promise: a fresh installation fine-tunes the bundled model, shows what changed, and HF peft reads the adapter."""

import json
import os
import subprocess
import sys

import peft
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import inlay
from inlay.training.models import bundled_base


def test_the_quickstart_shows_a_gain_and_its_adapter_works_in_peft(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "inlay", "quickstart", "--json", "--out", str(out)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    measured = result["metrics"]
    assert result["rows"] == 60
    assert measured["perplexity"]["base"] > 5
    assert measured["perplexity"]["tuned"] < 2.5
    assert measured["token accuracy"]["tuned"] > 0.8 > measured["token accuracy"]["base"]
    assert measured["exact match"]["tuned"] > 0.25 > measured["exact match"]["base"]
    assert {m["verdict"] for m in measured.values()} == {"better"}
    assert "<svg" in (out / "report.html").read_text()

    base = bundled_base()
    x = AutoTokenizer.from_pretrained(base)("Show me all pods.", return_tensors="pt").input_ids
    logits = []
    for library in (inlay, peft):
        model = library.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), out)
        with torch.no_grad():
            logits.append(model(x).logits)
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-5)
