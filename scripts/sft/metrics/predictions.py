"""Reads a file of answers that were made elsewhere: JSON lines of {"prediction", "reference", "source"}."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import DataError

_SHAPE = 'a row is {"prediction": "...", "reference": "..." or ["...", "..."], "source": "..."} on one line'


@dataclass
class Answers:
    """Columns of the file; `sources` is None unless every row has one."""

    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    sources: list[str] | None = field(default_factory=list)


def read(path: Path) -> Answers:
    """Raises DataError with file:line for what is missing, not JSON or not of the shape; blank lines do not count."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError("there is no such predictions file", where=str(path), mend="check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the predictions file cannot be read: {error}", where=str(path)) from None
    answers = Answers()
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            _add(answers, line, f"{path}:{number}")
    if not answers.predictions:
        raise DataError("the predictions file has no rows", where=str(path), mend=_SHAPE)
    return answers


def _add(answers: Answers, line: str, where: str) -> None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        raise DataError("this line is not JSON", where=where, mend=_SHAPE) from None
    if not isinstance(row, dict):
        raise DataError("this line is not a JSON object", where=where, mend=_SHAPE)
    answers.predictions.append(_text(row, "prediction", where))
    reference = row.get("reference")
    if isinstance(reference, list) and reference and all(isinstance(item, str) for item in reference):
        answers.references.append(reference)
    else:
        answers.references.append([_text(row, "reference", where)])
    if "source" not in row:
        answers.sources = None
    elif answers.sources is not None:
        answers.sources.append(_text(row, "source", where))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        said = "is missing" if key not in row else f"is {type(value).__name__}, not text"
        raise DataError(f'"{key}" {said}', where=where, mend=_SHAPE)
    return value
