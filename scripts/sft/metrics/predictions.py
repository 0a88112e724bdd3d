"""Predictions and their scores as files and tables: a file of predictions, metrics.json, samples.jsonl."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sft import files
from sft.errors import DataError
from sft.metrics.scoring import by_tag, greater_is_better, score_rows
from sft.metrics.text import means, tags_of, text_stats

log = logging.getLogger("sft.metrics")
METRICS, SAMPLES = "metrics.json", "samples.jsonl"
Values = Mapping[str, float]
_SHAPE = 'a row is {"prediction": "...", "reference": "..." or ["...", "..."], "source": "..."} on one line'


# --- a file of predictions


@dataclass
class Predictions:
    """Columns of a predictions file; `sources` is None unless every row has one."""

    predictions: list[str] = field(default_factory=list)
    references: list[list[str]] = field(default_factory=list)
    sources: list[str] | None = field(default_factory=list)
    tags: list[list[str]] = field(default_factory=list)


def score_file(
    path: Path,
    names: Sequence[str],
    *,
    stemmer: bool = False,
    json_schema: dict[str, Any] | None = None,
    pattern: re.Pattern[str] | None = None,
    strict: bool,
) -> dict[str, Any]:
    """{"rows", "metrics", "by_tag" (where rows have tags)} of the file's answers, text statistics included.

    strict: every metric was named by the user; else SARI is left out, with a warning, where a row has no source.
    """
    table = read(path)
    if not strict and table.sources is None and "sari" in names:
        log.warning("no SARI: not every row has a source")
        names = [name for name in names if name != "sari"]
    extra = ["json_schema"] * (json_schema is not None) + ["format_adherence"] * (not strict or pattern is not None)
    scores = score_rows(
        list(dict.fromkeys([*names, *extra])), table.predictions, table.references, table.sources,
        stemmer=stemmer, json_schema=json_schema, pattern=pattern,
    )  # fmt: skip
    tags = by_tag(table.tags, scores, table.predictions, table.references)
    metrics = scores.means | means(text_stats(table.predictions))
    return {"rows": len(table.predictions), "metrics": metrics} | ({"by_tag": tags} if tags else {})


def read(path: Path) -> Predictions:
    """Raises DataError with file:line for what is missing, not JSON or not of the shape; blank lines do not count."""
    table = Predictions()
    for row, where in json_rows(read_text(path, "predictions file"), path, _SHAPE):
        table.tags.append(tags_of(row))
        table.predictions.append(_text(row, "prediction", where))
        reference = row.get("reference")
        is_list = isinstance(reference, list) and reference and all(isinstance(item, str) for item in reference)
        table.references.append(reference if is_list else [_text(row, "reference", where)])  # type: ignore[arg-type]
        if "source" not in row:
            table.sources = None
        elif table.sources is not None:
            table.sources.append(_text(row, "source", where))
    if not table.predictions:
        raise DataError("the predictions file has no rows", where=str(path), fix=_SHAPE)
    return table


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str):
        problem = "is missing" if key not in row else f"is {type(value).__name__}, not text"
        raise DataError(f'"{key}" {problem}', where=where, fix=_SHAPE)
    return value


def read_text(path: Path, what: str) -> str:
    """The text of a file, without a byte-order mark. what: as in "predictions file". Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no such {what}", where=str(path), fix="name another: see --help") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {what} cannot be read: {error}", where=str(path)) from None


def json_rows(text: str, path: Path, shape: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row of JSON lines with its `file:line`, blank lines passed over. shape: of a row. Raises DataError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError("this line is not JSON", where=where, fix=shape) from None
        if not isinstance(row, dict):
            raise DataError("this line is not a JSON object", where=where, fix=shape)
        yield row, where


# --- metrics.json and samples.jsonl


def merge_metrics(
    previous: Mapping[str, Any], *, run: str, split: str, rows: int,
    sides: Mapping[str, Mapping[str, Any]], constant: Mapping[str, Any] | None,
) -> dict[str, Any]:  # fmt: skip
    """The new contents of metrics.json: these sides ("tuned", "base"), and the other one where `previous` (the file's
    contents, {} without a file) has it for this run and split.

    sides: of each the `metrics`, `fields` and `by_tag` of its evaluation. `about` has when and on how many rows each
    was measured.
    """
    previous = previous if (previous.get("run"), previous.get("split")) == (run, split) else {}
    result: dict[str, Any] = {"run": run, "split": split, "rows": rows}
    about, by_tag = dict(previous.get("about", {})), dict(previous.get("by_tag", {}))
    for side in ("tuned", "base"):
        if side in sides:
            result[side] = _rounded(sides[side]["metrics"])
            about[side] = {"rows": rows, "at": sides[side].get("at")}
            if fields := sides[side].get("fields"):
                about[side]["fields"] = _rounded(fields)
            by_tag[side] = sides[side].get("by_tag")
        elif side in previous:
            result[side] = previous[side]
    constant = constant if constant is not None else previous.get("constant")
    more = {"by_tag": {side: values for side, values in by_tag.items() if values}, "constant": constant}
    return result | {key: value for key, value in more.items() if value} | {"about": about}


def _rounded(values: Values) -> dict[str, float]:
    return {name: round(value, 6) for name, value in values.items()}


def write_results(
    outputs: Path, run_folder: Path | None, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Writes both files into outputs/ and, where the run has a folder, there too; each atomically."""
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    for folder in [outputs, *([run_folder] if run_folder is not None and run_folder.is_dir() else [])]:
        files.write_json(folder / METRICS, result)
        files.write_text(folder / SAMPLES, text)


def metrics_table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a metrics.json: metric, base, tuned, change, best constant answer; empty columns left out."""
    base, tuned, constant = result.get("base", {}), result.get("tuned", {}), result.get("constant") or {}
    shown = {"base": base, "tuned": tuned, "change": base and tuned, "best constant answer": constant}
    rows = []
    for name in dict.fromkeys([*tuned, *base]):
        before, after = base.get(name), tuned.get(name)
        cells = (number(before), number(after), change(name, before, after), number(constant.get(name)))
        rows.append([name, *(cell for cell, values in zip(cells, shown.values(), strict=True) if values)])
    return ["metric", *(column for column, values in shown.items() if values)], rows


def tags_table(by_tag: Mapping[str, Values]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the scores by tag."""
    names = list(dict.fromkeys(name for values in by_tag.values() for name in values if name != "rows"))
    rows = [
        [tag, f"{values['rows']:.0f}", *(number(values.get(name)) for name in names)] for tag, values in by_tag.items()
    ]
    return ["tag", "rows", *names], rows


def number(value: float | None) -> str:
    """A metric with four decimals, from 10 on with two; nothing for None."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def change(name: str, base: float | None, tuned: float | None) -> str:
    """tuned - base, marked where it is for the worse; lengths are neither better nor worse."""
    if base is None or tuned is None:
        return ""
    worse = not name.startswith("length") and tuned != base and (tuned > base) != greater_is_better(name)
    return f"{tuned - base:+.4f}" + (" worse" if worse else "")


def unequal_rows(result: Mapping[str, Any]) -> str | None:
    """A warning when base and tuned were evaluated on different numbers of rows."""
    counts = {side: about["rows"] for side, about in result["about"].items()}
    if len(set(counts.values())) < 2:
        return None
    each = ", ".join(f"{side} on {rows}" for side, rows in counts.items())
    return f"base and tuned were evaluated on different numbers of rows ({each}): evaluate both again (--both)"


def sample_text(sample: Mapping[str, Any]) -> str:
    """A row's question, reference and answers, as readable text."""
    lines = [f"\nprompt:    {sample['prompt']}", f"reference: {sample['reference']}"]
    if "base" in sample:
        lines.append(f"base:      {sample['base']['prediction']}")
    return "\n".join([*lines, f"answer:    {sample['prediction']}{'' if sample['stopped'] else ' [did not stop]'}"])
