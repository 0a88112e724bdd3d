"""metrics.json and samples.jsonl, and the table that shows them."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft import files
from sft.metrics import greater_is_better

METRICS, SAMPLES = "metrics.json", "samples.jsonl"
Values = Mapping[str, float]


def merged(
    older: Mapping[str, Any],
    *,
    run: str,
    split: str,
    rows: int,
    sides: Mapping[str, Values],
    constant: Mapping[str, Any] | None,
    fields: Mapping[str, Values],
    tags: Mapping[str, Mapping[str, Values]] | None = None,
) -> dict[str, Any]:
    """The new contents of metrics.json: these sides, and the other one where `older` (the file as it was, {} where
    there was none) has it for this run and split.

    `about` says of each side when, and on how many rows, it was measured; `by_tag` has its metrics for each tag.
    """
    kept = older if (older.get("run"), older.get("split")) == (run, split) else {}
    made: dict[str, Any] = {"run": run, "split": split, "rows": rows}
    about = dict(kept.get("about", {}))
    for side in ("tuned", "base"):
        if side in sides:
            made[side] = {name: round(value, 6) for name, value in sides[side].items()}
            about[side] = {"rows": rows, "at": time.strftime("%Y-%m-%d %H:%M:%S")}
            if fields.get(side):
                about[side]["fields"] = {name: round(value, 6) for name, value in fields[side].items()}
        elif side in kept:
            made[side] = kept[side]
    by_tag = {**kept.get("by_tag", {}), **{side: found for side, found in (tags or {}).items() if found}}
    if by_tag:
        made["by_tag"] = by_tag
    if constant is not None or "constant" in kept:
        made["constant"] = constant if constant is not None else kept["constant"]
    made["about"] = about
    return made


def write(
    outputs: Path, run_folder: Path | None, result: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]
) -> None:
    """Writes both files into outputs/ and, where the run has a folder, there too; each atomically."""
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    for folder in [outputs, *([run_folder] if run_folder is not None and run_folder.is_dir() else [])]:
        files.write_json(folder / METRICS, result)
        files.write_text(folder / SAMPLES, text)


def both_sides(tuned: Sequence[dict[str, Any]], base: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The samples of the tuned model, each with the base's answer and scores beside it."""
    return [
        {**mine, "base": {"prediction": theirs["prediction"], "scores": theirs["scores"]}}
        for mine, theirs in zip(tuned, base, strict=True)
    ]


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the results: metric, base, tuned, change, best constant answer."""
    base, tuned = result.get("base", {}), result.get("tuned", {})
    constant = result.get("constant") or {}
    shown = {"base": base, "tuned": tuned, "change": base and tuned, "best constant answer": constant}
    rows = []
    for name in dict.fromkeys([*tuned, *base]):
        before, after = base.get(name), tuned.get(name)
        cells = (number(before), number(after), change(name, before, after), number(constant.get(name)))
        rows.append([name, *(cell for cell, there in zip(cells, shown.values(), strict=True) if there)])
    return ["metric", *(column for column, there in shown.items() if there)], rows


def tags_table(by_tag: Mapping[str, Values]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the scores by tag."""
    names = list(dict.fromkeys(name for values in by_tag.values() for name in values if name != "rows"))
    rows = [
        [tag, f"{values['rows']:.0f}", *(number(values.get(name)) for name in names)] for tag, values in by_tag.items()
    ]
    return ["tag", "rows", *names], rows


def number(value: float | None) -> str:
    """Three or four digits that matter; nothing for nothing."""
    if value is None:
        return ""
    return f"{value:.4f}" if abs(value) < 10 else f"{value:,.2f}"


def change(name: str, base: float | None, tuned: float | None) -> str:
    """The difference, marked where it is for the worse."""
    if base is None or tuned is None:
        return ""
    neutral = name.startswith("length")
    worse = not neutral and tuned != base and (tuned > base) != greater_is_better(name)
    return f"{tuned - base:+.4f}" + (" worse" if worse else "")


def other_rows(result: Mapping[str, Any]) -> str | None:
    """A warning when the two sides were measured on different numbers of rows."""
    counts = {side: about["rows"] for side, about in result["about"].items()}
    if len(set(counts.values())) < 2:
        return None
    told = ", ".join(f"{side} on {rows}" for side, rows in counts.items())
    return f"the sides were measured on different rows ({told}): score both anew to compare them"


def sample_text(sample: Mapping[str, Any]) -> str:
    """A row's question, reference and answers, for people."""
    lines = [f"\nprompt:    {sample['prompt']}", f"reference: {sample['reference']}"]
    if "base" in sample:
        lines.append(f"base:      {sample['base']['prediction']}")
    return "\n".join([*lines, f"answer:    {sample['prediction']}{'' if sample['stopped'] else ' [did not stop]'}"])
