"""Rows of a file, whatever their spelling, as conversations: a table of schemas, detected by their keys."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import InputError, near_miss

Message = dict[str, Any]

SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
}


@dataclass(frozen=True)
class Sample:
    """One row: a conversation that ends in an answer, or plain text (then ``messages`` is empty)."""

    where: str  # file:line, for messages to the user
    messages: list[Message] = field(default_factory=list)
    text: str = ""
    tools: list[Any] | None = None

    @property
    def prompt(self) -> list[Message]:
        """The conversation up to the last answer."""
        return self.messages[:-1]

    @property
    def reference(self) -> str:
        """The last answer."""
        return str(self.messages[-1].get("content") or "") if self.messages else ""


class RowError(Exception):
    """Why a row cannot be used; the reader adds file and line."""


@dataclass(frozen=True)
class Schema:
    """How one spelling of a row is recognised and read."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[dict[str, Any]], dict[str, Any]]
    also: tuple[str, ...] = ()


def _string(row: dict[str, Any], key: str, may_be_empty: bool = False) -> str:
    value = row.get(key)
    if value is None and may_be_empty:
        return ""
    if not isinstance(value, str):
        raise RowError(f"'{key}' is {_kind(value)}, expected text")
    if not value.strip() and not may_be_empty:
        raise RowError(f"'{key}' is empty; fill it in or remove the row")
    return value


def _kind(value: Any) -> str:
    names = {type(None): "missing", str: "text", list: "a list", dict: "an object", bool: "a truth value"}
    return names.get(type(value), "a number")


def _exchange(row: dict[str, Any], question: str, answer: str) -> dict[str, Any]:
    system = _string(row, "system", may_be_empty=True)
    messages = [{"role": "system", "content": system}] if system else []
    return {"messages": [*messages, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def _messages(row: dict[str, Any], key: str = "messages") -> dict[str, Any]:
    turns = _turns(row, key)
    messages = []
    for number, turn in enumerate(turns, 1):
        role, content = turn.get("role"), turn.get("content")
        if role not in ("system", "developer", "user", "assistant", "tool"):
            raise RowError(f"{key}[{number}] has the role {role!r}, expected system, user, assistant or tool")
        if not isinstance(content, str) and not (role == "assistant" and turn.get("tool_calls")):
            raise RowError(f"{key}[{number}].content is {_kind(content)}, expected text")
        messages.append({name: value for name, value in turn.items() if value is not None} | {"content": content or ""})
    return {"messages": _until_last_answer(messages, key), "tools": _tools(row)}


def _sharegpt(row: dict[str, Any]) -> dict[str, Any]:
    messages = []
    system = _string(row, "system", may_be_empty=True)
    if system:
        messages.append({"role": "system", "content": system})
    for number, turn in enumerate(_turns(row, "conversations"), 1):
        if "role" in turn and "from" not in turn:
            return _messages(row, "conversations")
        role, content = SHAREGPT_ROLES.get(str(turn.get("from")).lower()), turn.get("value")
        if role is None:
            raise RowError(f"conversations[{number}].from is {turn.get('from')!r}, expected human, gpt, system or tool")
        if not isinstance(content, str):
            raise RowError(f"conversations[{number}].value is {_kind(content)}, expected text")
        messages.append({"role": role, "content": content})
    return {"messages": _until_last_answer(messages, "conversations"), "tools": _tools(row)}


def _turns(row: dict[str, Any], key: str) -> list[dict[str, Any]]:
    turns = row.get(key)
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise RowError(f"'{key}' is {_kind(turns) if turns else 'empty'}, expected a list of turns")
    return turns


def _until_last_answer(messages: list[Message], key: str) -> list[Message]:
    """Turns after the last answer teach nothing; a conversation without an answer is an error."""
    answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        raise RowError(f"'{key}' has no assistant turn, so there is nothing to learn; add the answer or remove the row")
    return messages[: answers[-1] + 1]


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError:
            raise RowError("'tools' is text that is not JSON") from None
    return tools or None


def _prompt_completion(row: dict[str, Any]) -> dict[str, Any]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if isinstance(prompt, list) and isinstance(completion, list):
        return _messages({**row, "messages": [*prompt, *completion]})
    return _exchange(row, _string(row, "prompt"), _string(row, "completion"))


def _instruction(row: dict[str, Any]) -> dict[str, Any]:
    question, extra = _string(row, "instruction"), _string(row, "input", may_be_empty=True)
    return _exchange(row, f"{question}\n\n{extra}" if extra.strip() else question, _string(row, "output"))


# The first schema whose keys a row has is taken, so the more telling keys come first.
SCHEMAS = (
    Schema("messages", ("messages",), _messages, ("tools",)),
    Schema("ShareGPT conversations", ("conversations",), _sharegpt, ("system", "tools")),
    Schema("prompt/completion", ("prompt", "completion"), _prompt_completion, ("system", "tools")),
    Schema("instruction/output", ("instruction", "output"), _instruction, ("input", "system")),
    Schema(
        "question/answer",
        ("question", "answer"),
        lambda row: _exchange(row, _string(row, "question"), _string(row, "answer")),
        ("system",),
    ),
    Schema("text", ("text",), lambda row: {"text": _string(row, "text")}),
)


def detect(row: dict[str, Any]) -> Schema | None:
    """The schema of a row, or None."""
    return next((schema for schema in SCHEMAS if all(key in row for key in schema.needs)), None)


def _no_schema(row: dict[str, Any]) -> str:
    known = [key for schema in SCHEMAS for key in schema.needs]
    hints = [near_miss(key, known).strip() for key in row if key not in known]
    hint = next((f" {hint}" for hint in hints if hint), "")
    keys = ", ".join(map(str, row)) or "none"
    return f"keys ({keys}) fit no known schema.{hint} Use one of: {'; '.join(', '.join(schema.needs) for schema in SCHEMAS)}."


@dataclass(frozen=True)
class Data:
    """A file of samples, all of one schema."""

    path: Path
    schema: str
    samples: list[Sample]
    sha256: str


def read(path: Path, flag: str = "DATA") -> Data:
    """Read a .jsonl, .json, .csv or .parquet file.

    Raises:
        InputError: no such file, an unknown format, or a row that cannot be used; the message gives file:line and the remedy.
    """
    if not path.is_file():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        what = "is a folder, expected a file" if path.is_dir() else "no such file"
        raise InputError(f"{flag} {path}: {what}.{near_miss(path.name, siblings)}")
    schema: Schema | None = None
    samples = []
    for where, row in _rows(path):
        if not isinstance(row, dict):
            raise InputError(f'{where}: the row is {_kind(row)}, expected an object such as {{"instruction": ..., "output": ...}}.')
        found = detect(row)
        if found is None:
            raise InputError(f"{where}: {_no_schema(row)}")
        if schema is not None and found is not schema:
            raise InputError(f"{where}: this row is {found.name}, the rows before it are {schema.name}; keep one schema in a file.")
        schema = found
        try:
            samples.append(Sample(where=where, **schema.read(row)))
        except RowError as problem:
            raise InputError(f"{where}: {problem}.") from None
    if schema is None:
        raise InputError(f"{flag} {path}: no rows in it.")
    return Data(path, schema.name, samples, hashlib.sha256(path.read_bytes()).hexdigest())


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line or file:row number, row)."""
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".ndjson"):
        yield from _json_lines(path)
    elif suffix == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise InputError(f"{path}:{getattr(error, 'lineno', 1)}: not valid JSON ({_json_problem(error)}).") from None
        if not isinstance(rows, list):
            raise InputError(f"{path}: holds {_kind(rows)}, expected a list of rows; one object a line belongs into a .jsonl file.")
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(rows, 1))
    elif suffix in (".csv", ".parquet"):
        yield from ((f"{path}: row {number}", row) for number, row in enumerate(_table(path), 1))
    else:
        raise InputError(f"{path}: cannot read '{suffix or path.name}' files; convert it to .jsonl, .json, .csv or .parquet.")


def _json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    number = 0
    with path.open(encoding="utf-8-sig") as lines:  # -sig: editors on Windows put a byte-order mark in front
        try:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield f"{path}:{number}", json.loads(line)
        except UnicodeDecodeError as error:
            raise InputError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8.") from None
        except ValueError as error:
            raise InputError(f"{path}:{number}: not valid JSON ({_json_problem(error)}); every line is one JSON object.") from None


def _json_problem(error: ValueError) -> str:
    column = getattr(error, "colno", None)
    return f"{getattr(error, 'msg', error)} at column {column}".lower() if column else str(error)


def _table(path: Path) -> list[dict[str, Any]]:
    if path.suffix.lower() == ".csv":
        import csv

        with path.open(encoding="utf-8-sig", newline="") as lines:
            return list(csv.DictReader(lines))
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(path).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise InputError(f"{path}: not a parquet file ({str(error).splitlines()[0]}).") from None


def split(samples: list[Sample], fraction: float, seed: int) -> tuple[list[Sample], list[Sample]]:
    """(training, validation): a seeded choice that keeps the order; none for validation when the share is less than half a row."""
    count = round(len(samples) * fraction)
    chosen = set(random.Random(seed).sample(range(len(samples)), count))
    kept = [sample for number, sample in enumerate(samples) if number not in chosen]
    return kept, [samples[number] for number in sorted(chosen)]
