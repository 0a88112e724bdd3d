"""The steps of `compare`: which sides and rows, the result as one dictionary, the files of the report."""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.config import paths
from sft.config.load import dump
from sft.data import store
from sft.errors import ConfigError, DataError
from sft.generation import targets as choosing
from sft.generation.targets import Target
from sft.metrics import greater_is_better
from sft.report import card, compare_page, comparison, paired, record
from sft.report.judge import Judge
from sft.report.judge import judge as ask
from sft.report.measure import OF_ANSWERS, Progress, Side
from sft.runs import Run

Result = dict[str, Any]
Row = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "tokenizers")  # that answers depend on
FOLDER, PAGE, RESULT, ANSWERS, CARD = "report", "index.html", "compare.json", "answers.jsonl", "README.md"


def targets(config: Path, sets: Sequence[str], folders: Sequence[Path], is_default: bool, root: Path) -> list[Target]:
    """The named adapters or whole models, else the newest run. Raises ModelError, RunError, ConfigError."""
    if not folders:
        return [choosing.choose(config, sets, is_default=is_default, root=root)]
    made = []
    for folder in folders:
        whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        adapter, merged = (None, folder) if whole else (folder, None)
        made.append(choosing.choose(config, sets, adapters=adapter, merged=merged, is_default=is_default, root=root))
    return made


def rows(target: Target, split: str | None, limit: int | None, root: Path) -> tuple[str, list[Row], Path]:
    """The split's name, its rows, and the training file. Raises DataError where there are none."""
    stage = store.paths(target.config.data, root)
    chosen = split or ("test" if stage.test is not None else "val")
    path = stage.test if chosen == "test" else stage.val
    if path is None:
        raise DataError(f"there are no {chosen} rows", where=f"data.{chosen}_path", mend="make process")
    limit = target.config.eval.limit if limit is None else limit
    found = store.read_rows(path)[: limit or None]
    if not found:
        raise DataError(f"there are no {chosen} rows", where=str(path), mend="make process")
    return chosen, found, stage.train


def judge(url: str | None, model: str | None) -> Judge | None:
    """The judge, asked once to see that it answers; None where none is wanted."""
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise ConfigError("a judge needs both --judge-url and --judge-model", mend="give both, or neither")
    made = Judge(url, model)
    made.check()
    return made


def result(
    sides_of: Sequence[Target], measured: Sequence[Side], general: Sequence[Row], split: str, seed: int,
    constant: Mapping[str, Any] | None, root: Path,
) -> Result:  # fmt: skip
    """compare.json: the sides' means, each tuned side's comparison, the settings and where it was measured."""
    first, base, tuned = sides_of[0], measured[0], measured[1:]
    made = [comparison.of_sides(base, side, split, seed) for side in tuned]
    for one, side in zip(made, tuned, strict=True):
        if found := comparison.parrot(side, constant):
            one["parrot"] = found
    scored = [name for name in base.values if name not in OF_ANSWERS]
    from sft.model import hardware

    device, config = hardware.probe(), first.config
    draws = paired.DRAWS if len(base.samples) <= paired.MANY_ROWS else paired.FEWER_DRAWS
    return {
        "run": first.name,
        "base": paths.model_name(config.model.name),
        "kind": base.kind,
        "split": split,
        "rows": len(base.samples),
        "first_metric": scored[0],
        "sides": comparison.spreads(measured, seed),
        "comparisons": made,
        "general": _general(base, tuned, general),
        "bootstrap": {"draws": draws, "seed": seed, "level": paired.LEVEL},
        "generation": {**config.generation.model_dump(), "do_sample": False},
        "hardware": {"device": device.name, "memory": f"{device.total_bytes / 2**30:.1f} GiB"},
        "versions": {"python": platform.python_version(), **runs.versions(LIBRARIES)},
        "training": record.summary(run_of(first, root)),
        "data": _ledgers(first, root),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def run_of(target: Target, root: Path) -> Run:
    """The run that a side belongs to; for a folder from elsewhere the place where its report goes."""
    return target.run or runs.at(root / "outputs" / target.name, root)


def _ledgers(target: Target, root: Path) -> dict[str, Any]:
    found = {"run": files.read_json(run_of(target, root).folder / "ledger.json")}
    if target.config.data.train_path is None:
        made = files.read_json(paths.resolve(root, target.config.data.processed_dir) / "ledger.json")
        kept = ("rows_read", "rows_written", "rows_named", "named", "splits", "verdict", "formats")
        found["processed"] = {name: made[name] for name in kept if name in made}
    return found


def _general(base: Side, tuned: Sequence[Side], rows: Sequence[Row]) -> list[Row]:
    everyone = [base, *tuned]
    return [
        {
            "id": row["id"],
            "kind": str(row.get("kind", "")),
            "prompt": base.general[at]["prompt"],
            "answers": {side.name: side.general[at]["prediction"] for side in everyone},
            "passed": {side.name: _or_none(side.general_values["passed"][at]) for side in everyone},
        }
        for at, row in enumerate(rows)
    ]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def answers(measured: Sequence[Side], metric: str) -> list[Row]:
    """A row each: question, reference, every side's answer and scores, and the tuned sides' change on `metric`."""
    base, tuned = measured[0], measured[1:]
    sign = 1.0 if greater_is_better(metric) else -1.0
    made = []
    for at, sample in enumerate(base.samples):
        changes = {side.name: sign * (side.values[metric][at] - base.values[metric][at]) for side in tuned}
        made.append(
            {
                "id": sample["id"],
                "prompt": sample["prompt"],
                "reference": sample["reference"],
                "base": sample["prediction"],
                "answers": {side.name: side.samples[at]["prediction"] for side in tuned},
                "stopped": {side.name: side.samples[at]["stopped"] for side in measured},
                "scores": {side.name: {k: _or_none(v[at]) for k, v in side.values.items()} for side in measured},
                "changes": {name: 0.0 if math.isnan(change) else change for name, change in changes.items()},
            }
        )
    return made


def add_judge(
    made: Result, judged_by: Judge, measured: Sequence[Side], limit: int, seed: int, on_progress: Progress | None
) -> None:
    """Puts the judge's marks of the first `limit` rows (0: all) into each comparison."""
    base = measured[0].samples[: limit or None]
    for one, side in zip(made["comparisons"], measured[1:], strict=True):
        pairs = zip(base, side.samples, strict=False)
        asked = [(mine["prompt"], mine["reference"], mine["prediction"], other["prediction"]) for mine, other in pairs]
        one["judge"] = ask(judged_by, asked, seed, on_progress)


def write(made: Result, measured: Sequence[Side], target: Target, root: Path) -> Path:
    """The report's folder: outputs/<run>/report, each file atomically, the page last."""
    run = run_of(target, root)
    folder = run.folder / FOLDER
    told = answers(measured, made["first_metric"])
    curves = record.curves(run)
    files.write_json(folder / RESULT, made)
    files.write_text(folder / ANSWERS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in told))
    files.write_text(folder / CARD, card.card(made, made["comparisons"][0], target.config))
    files.write_text(folder / PAGE, compare_page.page(made, told, curves, dump(target.config)))
    return folder
