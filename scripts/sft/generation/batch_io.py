"""Questions from a file and answers into a file: a line each in a .txt, a row each in a .jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sft import files
from sft.data import rows
from sft.errors import DataError
from sft.generation.stop import Answer
from sft.metrics import predictions

Row = dict[str, Any]
_QUESTION_KEYS = ("user", "prompt", "question", "instruction")
_REFERENCE_KEYS = ("reference", "assistant", "answer", "completion", "response", "output", "target")
_SHAPE = "a row has messages, user, prompt, question, instruction or input"


@dataclass(frozen=True)
class Request:
    """One question: the row for the encoder (None: an empty line), the question's text, and the row of the file."""

    row: Row | None
    source: str
    original: Row


def read(path: Path, system: str | None) -> list[Request]:
    """The questions of a .txt or .jsonl file. `system` precedes those without a system text of their own.

    Raises DataError (file:line) for a missing, empty or unreadable file, and for a row with no question in it.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{path.name} is neither .txt nor .jsonl", where=str(path), fix="rename or convert it")
    text = predictions.read_text(path, "input file").replace("\r\n", "\n").removesuffix("\n")
    if not text.strip():
        raise DataError("the input file is empty", where=str(path), fix="write one question a line")
    if kind == ".jsonl":
        return [_request(row, system, where) for row, where in predictions.json_rows(text, path, _SHAPE)]
    lines = text.split("\n")
    return [_request({"user": line}, system, "") if line.strip() else Request(None, "", {}) for line in lines]


def _request(row: Row, system: str | None, where: str) -> Request:
    if "messages" in row:
        return _conversation(row, system, where)
    key = next((key for key in _QUESTION_KEYS if isinstance(row.get(key), str)), None)
    extra = row["input"] if isinstance(row.get("input"), str) else ""
    if key is None and isinstance(row.get("input"), str):
        return Request({"input": extra, "target": ""}, extra, row)
    if key is None:
        raise DataError(f"no question in this row (it has {', '.join(row) or 'nothing'})", where=where, fix=_SHAPE)
    question = f"{row[key]}\n\n{extra}" if key == "instruction" and extra.strip() else row[key]
    turns = [{"role": "user", "content": question}]
    return replace(_conversation({"messages": turns}, row.get("system") or system, where), original=row)


def _conversation(row: Row, system: str | None, where: str) -> Request:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise DataError("messages is not a list of {role, content}", where=where)
    questions = [at for at, turn in enumerate(turns) if turn["role"] == "user"]
    if not questions:
        raise DataError("messages has no question", where=where)
    source = str(turns[questions[-1]].get("content") or "")
    while turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    if system and turns[0]["role"] not in ("system", "developer"):
        turns = [{"role": "system", "content": system}, *turns]
    tools = rows.tools(row)
    return Request({"messages": turns} | ({"tools": tools} if tools else {}), source, row)


def write(path: Path, requests: Sequence[Request], answers: Sequence[Answer | None]) -> None:
    """Answers in the order of the questions, atomically: .jsonl rows that `eval --predictions` reads (where the row
    had a reference), or lines of text with line breaks as \\n, empty for an empty question."""
    if path.suffix.lower() == ".jsonl":
        pairs = zip(requests, answers, strict=True)
        output = [json.dumps(_row(request, answer), ensure_ascii=False) for request, answer in pairs if answer]
    else:
        texts = [answer.text.strip() if answer else "" for answer in answers]
        output = [text.replace("\\", "\\\\").replace("\r", "").replace("\n", "\\n") for text in texts]
    try:
        files.write_text(path, "".join(line + "\n" for line in output))
    except OSError as error:
        raise DataError(f"the output file cannot be written: {error}", where=str(path), fix="--output_file") from None


def _row(request: Request, answer: Answer) -> Row:
    original = request.original
    row: Row = {"id": original["id"]} if "id" in original else {}
    row |= {"source": request.source, "prediction": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
    for key in _REFERENCE_KEYS:
        if isinstance(original.get(key), str | list):
            return {**row, "reference": original[key]}
    if "messages" in original and (reference := rows.reference(original)):
        row["reference"] = reference
    return row
