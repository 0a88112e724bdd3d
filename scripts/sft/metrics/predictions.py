"""Reads a file of answers that were made elsewhere: JSON lines of {"prediction", "reference", "source"}."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft.errors import DataError
from sft.metrics import text
from sft.metrics.scoring import by_tag, score_rows
from sft.metrics.text import text_stats

log = logging.getLogger("sft.metrics")
_SHAPE = 'a row is {"prediction": "...", "reference": "..." or ["...", "..."], "source": "..."} on one line'


@dataclass
class Answers:
    """Columns of the file; `sources` is None unless every row has one."""

    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    sources: list[str] | None = field(default_factory=list)
    tags: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class FileScores:
    """Of a file: its number of rows, the metrics and text statistics of the answers, and the metrics by tag."""

    rows: int
    metrics: dict[str, float]
    by_tag: dict[str, dict[str, float]]


def score_file(
    path: Path,
    names: Sequence[str],
    *,
    stemmer: bool = False,
    json_schema: dict[str, Any] | None = None,
    pattern: re.Pattern[str] | None = None,
    strict: bool,
) -> FileScores:
    """Reads and scores the file.

    strict: every metric was asked for by name; else SARI is left out, with a warning, where a row has no source.
    """
    answers = read(path)
    if not strict and answers.sources is None and "sari" in names:
        log.warning("no SARI: not every row has a source")
        names = [name for name in names if name != "sari"]
    extra = ["json_schema"] * (json_schema is not None) + ["format_adherence"] * (not strict or pattern is not None)
    scores = score_rows(
        list(dict.fromkeys([*names, *extra])), answers.predictions, answers.references, answers.sources,
        stemmer=stemmer, json_schema=json_schema, pattern=pattern,
    )  # fmt: skip
    return FileScores(
        len(answers.predictions),
        scores.means | text_stats(answers.predictions),
        by_tag(answers.tags, scores, answers.predictions, answers.references),
    )


def read(path: Path) -> Answers:
    """Raises DataError with file:line for what is missing, not JSON or not of the shape; blank lines do not count."""
    answers = Answers()
    for row, where in text.rows(text.text_of(path, "predictions file"), path, _SHAPE):
        _add(answers, row, where)
    if not answers.predictions:
        raise DataError("the predictions file has no rows", where=str(path), fix=_SHAPE)
    return answers


def _add(answers: Answers, row: dict[str, Any], where: str) -> None:
    answers.tags.append(text.of(row))
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
        raise DataError(f'"{key}" {said}', where=where, fix=_SHAPE)
    return value
