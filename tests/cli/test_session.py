"""Every verb on a tiny model: files, figures, JSON and errors, as a user meets them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_train_writes_all_that_it_promises(session: Any) -> None:
    result = session["train"]
    assert result.code == 0, result.err
    run = session.folder / "run"
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "run.json", "metrics.jsonl", "report.html"):
        assert (run / name).stat().st_size > 0, name
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["checkpoint-4", "checkpoint-8"]
    config = json.loads((run / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"], config["lora_dropout"]) == ("LORA", 4, 8, 0.1)
    assert isinstance(config["lora_alpha"], int)
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]


def test_the_summary_counts_what_can_be_counted_by_hand(session: Any) -> None:
    summary = session["train"].json
    assert summary["status"] == "finished"
    assert summary["results"]["steps"] == 8
    train, validation = summary["data"]["train"], summary["data"]["validation"]
    assert (train["rows"], validation["rows"]) == (18, 6)
    # Numbers 0 to 9 have one digit, 10 to 23 two: "It is 7." and its end token are 9 tokens of one byte each.
    assert train["trained_tokens"] + validation["trained_tokens"] == 10 * 9 + 14 * 10
    # <|im_start|>user\nSay 7.<|im_end|>\n<|im_start|>assistant\nIt is 7.<|im_end|>\n
    assert train["tokens"] + validation["tokens"] == 10 * (1 + 5 + 6 + 1 + 1 + 1 + 10 + 8 + 1 + 1) + 14 * (35 + 2)
    # A of 4 x 32 and B of 32 (queries) or 16 (values) x 4, in two layers
    assert summary["parameters"]["trainable"] == 2 * (4 * 32 + 32 * 4 + 4 * 32 + 16 * 4)


def test_training_lowers_the_loss_and_the_record_says_so(session: Any) -> None:
    metrics = lines(session.folder / "run" / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    validations = [line for line in metrics if "val_loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 9))
    assert [line["step"] for line in validations] == [4, 8]
    assert steps[-1]["loss"] < steps[0]["loss"]
    record = json.loads((session.folder / "run" / "run.json").read_text())
    assert record["results"]["val_loss"] == min(line["val_loss"] for line in validations)
    assert record["settings"]["adapter"]["r"] == "4"
    assert record["command"][0] == "inlay"
    assert len(record["data"]["sha256"]) == 64
    perplexity = record["comparison"]["metrics"]["perplexity"]
    assert math.log(perplexity["tuned"]) == pytest.approx(record["results"]["val_loss"], abs=2e-3)  # the trainer's own mean
    assert perplexity["tuned"] < perplexity["base"]


def test_progress_is_for_people_and_json_for_programs(session: Any) -> None:
    result = session["train"]
    assert result.out.startswith("{")
    assert "18 rows to train on" in result.err
    assert "every mask verified" in result.err
    assert "step 8/8" in result.err
    assert re.search(r"step 4: validation loss \d\.\d{4}", result.err)


def test_a_resumed_run_is_the_uninterrupted_one(session: Any) -> None:
    assert session["resume"].code == 0, session["resume"].err
    timed = {"seconds", "tokens_per_second"}
    whole, resumed = (
        [{key: value for key, value in line.items() if key not in timed} for line in lines(session.folder / run / "metrics.jsonl")]
        for run in ("run", "resumed")
    )
    assert resumed == whole
    assert "resuming after step 4" in session["resume"].err
    weights = [(session.folder / run / "adapter_model.safetensors").read_bytes() for run in ("run", "resumed")]
    assert weights[0] == weights[1]


def test_a_finished_run_is_not_overwritten_by_chance(session: Any) -> None:
    assert session["again"].code == 2
    assert "holds a run already. Add --resume to go on with it, --overwrite to replace it" in session["again"].err


def test_settings_come_from_yaml_and_flags_win(session: Any) -> None:
    assert session["yaml"].code == 0, session["yaml"].err
    record = json.loads((session.folder / "ia3" / "run.json").read_text())
    assert (record["settings"]["method"], record["settings"]["lr"], record["settings"]["max_steps"]) == ("ia3", 0.01, 2)
    assert record["data"]["train"]["rows"] == 24
    assert json.loads((session.folder / "ia3" / "adapter_config.json").read_text())["peft_type"] == "IA3"
    assert "No rows were kept for validation" in (session.folder / "ia3" / "report.html").read_text()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("typo in yaml", "lora_alhpa: .* Did you mean lora_alpha?"),
        ("typo in flag", "--lora-alhpa: .* Did you mean --lora-alpha?"),
        ("typo in method", "--method lroa: no such method. Did you mean .*lora"),
        ("typo in model", "modle: no such folder. Did you mean model?"),
        ("typo in verb", "No such command 'trian'. Did you mean 'train'?"),
        ("bad row", r"bad\.jsonl:3: not valid JSON"),
        ("bad value", "--r many: input should be a valid integer"),
        ("no target", "q_prj"),
        ("too short", "no answer token is left within 8 tokens; raise --max-length"),
        ("compare nf5", "--quantization nf5: give none, nf4, fp4, int4, int8. Did you mean nf4?"),
        ("compare nothing", "give --data held_out.jsonl, or --prompt"),
        ("inspect nothing", "rum: no such folder. Did you mean run?"),
        ("merge again", "exists already; name a new folder"),
        ("adapter as model", "this is an adapter; give its base model here and the adapter with --adapter"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(session: Any, name: str, said: str) -> None:
    result = session[name]
    assert result.code == 2, result.err
    assert re.search(said, result.err), result.err
    assert result.err.startswith("error: ")
    assert result.err.count("\n") == 1
    assert "Traceback" not in result.err
    assert not (session.folder / "none").exists()  # nothing was written


def test_compare_measures_base_and_tuned_on_the_same_rows(session: Any) -> None:
    result = session["compare json"].json
    assert result["rows"] == 6
    perplexity = result["metrics"]["perplexity"]
    assert 1 < perplexity["tuned"] < perplexity["base"]
    interval = perplexity["interval_95"]
    assert interval["difference"] == pytest.approx(perplexity["tuned"] - perplexity["base"])
    assert interval["low"] <= interval["difference"] <= interval["high"] < 0
    assert perplexity["verdict"] == "better"
    assert [answer["reference"] for answer in result["answers"]] == [f"It is {number}." for number in range(50, 56)]


def test_compare_and_chat_keep_the_base_as_its_training_did(session: Any) -> None:
    """The dense base has another perplexity; who wants that says so."""
    assert session["train nf4"].code == 0, session["train nf4"].err
    quantised, checkpoint, dense = (session[n].json for n in ("compare nf4", "compare a checkpoint", "compare nf4 on dense"))
    assert [r["quantization"] for r in (quantised, checkpoint, dense)] == ["nf4", "nf4", "none"]
    base = [r["metrics"]["perplexity"]["base"] for r in (quantised, checkpoint, dense, session["compare json"].json)]
    assert base[0] == base[1] != base[2] == base[3]
    assert "in nf4 with" in " ".join(session["chat nf4"].err.split())
    assert json.loads(session["chat nf4"].out)["by"] == "tuned"


def test_compare_shows_own_prompts_with_their_brackets(session: Any) -> None:
    assert session["compare"].code == 0, session["compare"].err
    assert "Say [b]x[/b]." in session["compare"].out
    assert "perplexity" in session["compare"].out


def test_chat_switches_between_tuned_and_base(session: Any) -> None:
    assert session["chat"].code == 0, session["chat"].err
    turns = [json.loads(line) for line in session["chat"].out.splitlines()]
    assert [turn["by"] for turn in turns] == ["tuned", "base"]
    assert "now speaking: base" in session["chat"].err
    assert "forgotten" in session["chat"].err


def test_inspect_reads_an_adapter_from_its_files(session: Any) -> None:
    facts = session["inspect adapter"].json
    assert (facts["kind"], facts["method"], facts["parameters"]) == ("adapter", "lora", 896)
    assert facts["targets"] == ["q_proj", "v_proj"]
    assert facts["dtypes"] == {"f32": 8}
    groups = {row["group"]: row for row in facts["groups"]}
    assert set(groups) == {"self_attn.q_proj", "self_attn.v_proj"}
    assert groups["self_attn.q_proj"]["ranks"] == [4]
    assert groups["self_attn.q_proj"]["layers"] == 2
    assert groups["self_attn.q_proj"]["norm_mean"] == pytest.approx(mean_norm(session.folder / "run", "q_proj"), rel=1e-5)
    verdicts = {row["consumer"]: row["verdict"] for row in facts["consumers"]}
    assert verdicts["vLLM"] == "reads"
    assert verdicts["mlx-lm"] == "refuses"
    assert "self_attn.q_proj" in session["inspect for people"].out


def mean_norm(run: Path, module: str) -> float:
    """|alpha / r * B A| the long way round, over the layers."""
    from safetensors.torch import load_file

    tensors = load_file(run / "adapter_model.safetensors")
    norms = []
    for name, a in tensors.items():
        if module in name and "lora_A" in name:
            norms.append(float((8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ a).norm()))
    return sum(norms) / len(norms)


def test_inspect_reads_a_model_from_its_headers(session: Any) -> None:
    facts = session["inspect model"].json
    assert (facts["kind"], facts["architecture"], facts["layers"], facts["tied_embeddings"]) == ("model", "LlamaForCausalLM", 2, True)
    attention, mlp = 32 * 32 * 2 + 32 * 16 * 2, 3 * 32 * 48
    assert facts["parameters"] == 259 * 32 + 2 * (attention + mlp + 2 * 32) + 32
    assert facts["chat_template"] is True


def test_merge_gives_an_ordinary_model_with_the_same_logits(session: Any) -> None:
    result = session["merge"].json
    assert result["error"] < 1e-5
    merged = session.folder / "merged"
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {path.name for path in merged.iterdir()}
    assert not list(session.folder.glob(".merged*"))
    assert json.loads((merged / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_methods_fields_are_listed(session: Any) -> None:
    listed = session["fields"].json
    assert {"r", "lora_alpha", "target_modules"} <= {row["field"] for row in listed["fields"]}
    assert "lora" in listed["methods"]
