"""Rows in six spellings become the same conversations; a bad row is named with its line and a remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from inlay.training.data import read, split
from inlay.training.errors import InputError

ASK = {"role": "user", "content": "2 + 2?"}
REPLY = {"role": "assistant", "content": "4"}
SYSTEM = {"role": "system", "content": "Be brief."}


def write(folder: Path, *rows: Any, name: str = "rows.jsonl") -> Path:
    path = folder / name
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("row", "schema", "messages"),
    [
        ({"messages": [SYSTEM, ASK, REPLY]}, "messages", [SYSTEM, ASK, REPLY]),
        (
            {"conversations": [{"from": "human", "value": "2 + 2?"}, {"from": "gpt", "value": "4"}], "system": "Be brief."},
            "ShareGPT conversations",
            [SYSTEM, ASK, REPLY],
        ),
        ({"conversations": [ASK, REPLY]}, "ShareGPT conversations", [ASK, REPLY]),
        ({"prompt": "2 + 2?", "completion": "4"}, "prompt/completion", [ASK, REPLY]),
        ({"prompt": [SYSTEM, ASK], "completion": [REPLY]}, "prompt/completion", [SYSTEM, ASK, REPLY]),
        ({"instruction": "2 + 2?", "output": "4"}, "instruction/output", [ASK, REPLY]),
        (
            {"instruction": "Add.", "input": "2 + 2", "output": "4"},
            "instruction/output",
            [{"role": "user", "content": "Add.\n\n2 + 2"}, REPLY],
        ),
        ({"question": "2 + 2?", "answer": "4", "id": 7}, "question/answer", [ASK, REPLY]),
        ({"messages": [ASK, REPLY, ASK]}, "messages", [ASK, REPLY]),  # a turn behind the last answer teaches nothing
    ],
)
def test_every_schema_is_found_by_its_keys(tmp_path: Path, row: dict[str, Any], schema: str, messages: list[dict[str, str]]) -> None:
    data = read(write(tmp_path, row))
    assert data.schema == schema
    assert data.samples[0].messages == messages
    assert data.samples[0].reference == "4"


def test_text_has_no_turns(tmp_path: Path) -> None:
    sample = read(write(tmp_path, {"text": "Once upon a time"})).samples[0]
    assert (sample.messages, sample.text) == ([], "Once upon a time")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"instruction": "a", "output": "b"}, "{broken"], r"rows\.jsonl:2: not valid JSON .* every line is one JSON object"),
        ([{"instruction": "a", "output": "  "}], r"rows\.jsonl:1: 'output' is empty; fill it in or remove the row"),
        ([{"instruction": "a", "output": 4}], r"rows\.jsonl:1: 'output' is a number, expected text"),
        (
            [{"instrution": "a", "output": "b"}],
            r"rows\.jsonl:1: keys \(instrution, output\) fit no known schema\. Did you mean",
        ),
        ([{"text": "a"}, {"question": "a", "answer": "b"}], r"rows\.jsonl:2: this row is question/answer, the rows before it are text"),
        ([{"messages": [ASK]}], r"rows\.jsonl:1: 'messages' has no assistant turn"),
        ([{"messages": [{"role": "robot", "content": "x"}]}], r"rows\.jsonl:1: messages\[1\] has the role 'robot'"),
        ([{"conversations": [{"from": "human", "value": None}]}], r"conversations\[1\]\.value is missing"),
        (["[1]"], r"rows\.jsonl:1: the row is a list, expected an object"),
        ([], "no rows in it"),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_a_remedy(tmp_path: Path, rows: list[Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        read(write(tmp_path, *rows))


def test_blank_lines_keep_the_count_of_lines(tmp_path: Path) -> None:
    path = write(tmp_path, {"text": "a"}, "", {"text": ""})
    with pytest.raises(InputError, match=r"rows\.jsonl:3: 'text' is empty"):
        read(path)


def test_a_mistyped_file_gets_its_neighbour_suggested(tmp_path: Path) -> None:
    write(tmp_path, {"text": "a"}, name="training.jsonl")
    with pytest.raises(InputError, match=r"no such file\. Did you mean training\.jsonl\?"):
        read(tmp_path / "trainig.jsonl")


def test_json_csv_parquet_and_a_byte_order_mark_give_the_same_rows(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    rows = [{"question": f"{n}?", "answer": str(n)} for n in range(3)]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8-sig")
    (tmp_path / "a.csv").write_text("question,answer\n0?,0\n1?,1\n2?,2\n", encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    wanted = [sample.messages for sample in read(write(tmp_path, *rows)).samples]
    for name in ("a.json", "a.csv", "a.parquet"):
        assert [sample.messages for sample in read(tmp_path / name).samples] == wanted, name


def test_the_split_is_seeded_complete_and_keeps_the_order(tmp_path: Path) -> None:
    samples = read(write(tmp_path, *({"text": str(number)} for number in range(40)))).samples
    training, validation = split(samples, 0.1, seed=3)
    assert (len(training), len(validation)) == (36, 4)
    assert sorted(int(sample.text) for sample in training + validation) == list(range(40))
    assert [int(sample.text) for sample in training] == sorted(int(sample.text) for sample in training)
    assert split(samples, 0.1, seed=3)[1] == validation
    assert split(samples, 0.1, seed=4)[1] != validation
    assert split(samples, 0.0, seed=3) == (samples, [])
