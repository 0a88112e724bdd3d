"""Questions from a file, and answers into one: a line a question in a .txt, a row a question in a .jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sft import files
from sft.data import rows
from sft.errors import DataError
from sft.metrics import text as lines

if TYPE_CHECKING:
    from sft.generation.engine import Answer


Row = dict[str, Any]
_KEYS = ("user", "prompt", "question", "instruction")
_SHAPE = "a row has messages, user, prompt, question, instruction or input"


@dataclass(frozen=True)
class Request:
    """One question: the row that the encoder takes (None: an empty line), what was asked, and the row as given."""

    row: Row | None
    source: str
    given: Row


def read(path: Path, system: str | None) -> list[Request]:
    """The questions of a .txt or .jsonl file. `system` stands before those that have no system text of their own.

    Raises DataError (file:line) for a missing, empty or unreadable file, and for a row with no question in it.
    """
    kind = path.suffix.lower()
    if kind not in (".txt", ".jsonl"):
        raise DataError(f"{path.name} is neither .txt nor .jsonl", where="--input_file", fix="rename or convert it")
    text = lines.text_of(path, "input file").replace("\r\n", "\n").removesuffix("\n")
    if not text.strip():
        raise DataError("the input file is empty", where=str(path), fix="put a question on a line")
    if kind == ".txt":
        asked = text.split("\n")
        return [_request({"user": line}, system, "") if line.strip() else Request(None, "", {}) for line in asked]
    return [_request(row, system, where) for row, where in lines.rows(text, path, _SHAPE)]


def _request(row: Row, system: str | None, where: str) -> Request:
    if "messages" in row:
        return _conversation(row, system, where)
    key = next((key for key in _KEYS if isinstance(row.get(key), str)), None)
    if key is None:
        if isinstance(row.get("input"), str):
            return Request({"input": row["input"], "target": ""}, row["input"], row)
        raise DataError(f"no question in this row (it has {', '.join(row) or 'nothing'})", where=where, fix=_SHAPE)
    asked = row[key]
    if key == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
        asked = f"{asked}\n\n{row['input']}"
    return Request({"messages": _with_system(row.get("system") or system, [_said("user", asked)])}, asked, row)


def _conversation(row: Row, system: str | None, where: str) -> Request:
    turns = row["messages"]
    if not isinstance(turns, list) or not all(isinstance(turn, dict) and "role" in turn for turn in turns):
        raise DataError("messages is not a list of {role, content}", where=where)
    turns = list(turns)
    while turns and turns[-1]["role"] == "assistant":
        turns.pop()
    if not any(turn["role"] == "user" for turn in turns):
        raise DataError("messages has no question", where=where)
    own = turns[0]["role"] in ("system", "developer")
    asked = next(turn for turn in reversed(turns) if turn["role"] == "user")
    made: Row = {"messages": turns if own else _with_system(system, turns)}
    if rows.tools(row):
        made["tools"] = rows.tools(row)
    return Request(made, str(asked.get("content") or ""), row)


def _said(role: str, text: str) -> Row:
    return {"role": role, "content": text}


def _with_system(system: str | None, turns: list[Row]) -> list[Row]:
    return [*([_said("system", system)] if system else []), *turns]


def write(path: Path, requests: Sequence[Request], answers: Sequence[Answer | None]) -> None:
    """Answers in the order of the questions, atomically: .jsonl rows that `eval --predictions` reads (where the row
    had a reference), or lines of text with line breaks as \\n, empty for an empty question."""
    if path.suffix.lower() == ".jsonl":
        text = "".join(
            json.dumps(_answered(request, answer), ensure_ascii=False) + "\n"
            for request, answer in zip(requests, answers, strict=True)
            if answer is not None
        )
    else:
        text = "".join((_one_line(answer.text) if answer is not None else "") + "\n" for answer in answers)
    try:
        files.write_text(path, text)
    except OSError as error:
        raise DataError(f"the output file cannot be written: {error}", where=str(path), fix="--output_file") from None


def _one_line(text: str) -> str:
    return text.strip().replace("\\", "\\\\").replace("\r", "").replace("\n", "\\n")


def _answered(request: Request, answer: Answer) -> Row:
    made: Row = {"id": request.given["id"]} if "id" in request.given else {}
    made |= {"source": request.source, "prediction": answer.text, "stopped": answer.stopped, "tokens": answer.tokens}
    for key in ("reference", "assistant", "answer", "completion", "response", "output", "target"):
        if isinstance(request.given.get(key), str | list):
            return {**made, "reference": request.given[key]}
    if "messages" in request.given and (reference := rows.reference(request.given)):
        made["reference"] = reference
    return made
