"""Questions from files and answers into them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sft.errors import DataError
from sft.generation import batch_io
from sft.generation.stop import Answer


def rows_of(path: Path, system: str | None = None) -> list[object]:
    return [request.row for request in batch_io.read(path, system)]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_every_line_of_a_text_file_is_a_question_and_empty_lines_keep_their_place(tmp_path: Path) -> None:
    path = tmp_path / "q.txt"
    path.write_text("﻿one\r\n\ntwo  \n")
    assert rows_of(path, "S") == [
        {"messages": [{"role": "system", "content": "S"}, user("one")]},
        None,
        {"messages": [{"role": "system", "content": "S"}, user("two  ")]},
    ]


def test_rows_of_every_shape_are_read(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    rows = [
        {"user": "a", "assistant": "b", "system": "own"},
        {"prompt": "a"},
        {"question": "a", "answer": "b"},
        {"instruction": "a", "input": "c", "output": "b"},
        {"instruction": "a", "input": "", "output": "b"},
        {"messages": [user("a"), {"role": "assistant", "content": "b"}]},
        {"messages": [{"role": "system", "content": "own"}, user("a")], "tools": [{"name": "t"}]},
        {"input": "a", "target": "b"},
    ]
    path.write_text("\n\n".join(json.dumps(row) for row in rows))
    own, common = {"role": "system", "content": "own"}, {"role": "system", "content": "S"}
    assert rows_of(path, "S") == [
        {"messages": [own, user("a")]},
        {"messages": [common, user("a")]},
        {"messages": [common, user("a")]},
        {"messages": [common, user("a\n\nc")]},
        {"messages": [common, user("a")]},
        {"messages": [common, user("a")]},
        {"messages": [own, user("a")], "tools": [{"name": "t"}]},
        {"input": "a", "target": ""},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("q.csv", "a", "neither .txt nor .jsonl"),
        ("q.txt", " \n", "is empty"),
        ("q.jsonl", '{"user": "a"}\n{"user"', "not JSON"),
        ("q.jsonl", '{"user": "a"}\n[1]', "not a JSON object"),
        ("q.jsonl", '{"user": "a"}\n{"text": 1}', "no question in this row"),
        ("q.jsonl", '{"user": "a"}\n{"messages": [{"role": "system", "content": "x"}]}', "has no question"),
    ],
)
def test_a_file_without_questions_is_refused_with_the_line(
    tmp_path: Path, name: str, content: str, message: str
) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(DataError, match=message) as error:
        batch_io.read(path, None)
    if "\n{" in content or "\n[" in content:
        assert error.value.where == f"{path}:2"


def test_a_missing_or_binary_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such input file"):
        batch_io.read(tmp_path / "q.txt", None)
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe\x00x")
    with pytest.raises(DataError, match="cannot be read"):
        batch_io.read(tmp_path / "q.txt", None)


def test_answers_are_written_as_lines_or_as_rows_to_score(tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text('{"id": "x", "question": "a", "answer": "b"}\n{"prompt": "c"}\n')
    requests = batch_io.read(path, None)
    answers = [Answer([1], "first\nline \\", True, 2), Answer([], "", False, 0)]
    batch_io.write(tmp_path / "out" / "a.jsonl", requests, answers)
    assert [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()] == [
        {"id": "x", "source": "a", "prediction": "first\nline \\", "stopped": True, "tokens": 2, "reference": "b"},
        {"source": "c", "prediction": "", "stopped": False, "tokens": 0},
    ]
    batch_io.write(tmp_path / "a.txt", requests, [answers[0], None])
    assert (tmp_path / "a.txt").read_text() == "first\\nline \\\\\n\n"
