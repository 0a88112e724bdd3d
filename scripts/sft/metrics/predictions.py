"""Reads a file of answers that were made elsewhere: JSON lines of {"prediction", "reference", "source"}."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import DataError
from sft.metrics.scoring import score
from sft.metrics.text import text_stats

log = logging.getLogger("sft.metrics")
_SHAPE = 'a row is {"prediction": "...", "reference": "..." or ["...", "..."], "source": "..."} on one line'


@dataclass
class Answers:
    """Columns of the file; `sources` is None unless every row has one."""

    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    sources: list[str] | None = field(default_factory=list)


def score_file(
    path: Path, names: Sequence[str], *, stemmer: bool = False, json_schema: dict[str, Any] | None = None, strict: bool
) -> tuple[int, dict[str, float]]:
    """The number of rows, and the metrics and text statistics of their answers.

    strict: every metric was asked for by name; else SARI is left out, with a warning, where a row has no source.
    """
    answers = read(path)
    if not strict and answers.sources is None and "sari" in names:
        log.warning("no SARI: not every row has a source")
        names = [name for name in names if name != "sari"]
    if json_schema is not None:
        names = list(dict.fromkeys([*names, "json_schema"]))
    values = score(
        names, answers.predictions, answers.references, answers.sources, stemmer=stemmer, json_schema=json_schema
    )
    return len(answers.predictions), values | text_stats(answers.predictions)


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
