"""Is the tuned model better than its base on held-out rows, and what has it forgotten? From models to report folder.

Base and tuned models answer the same rows greedily; every metric is compared row by row (`bootstrap`). A small general
set with answers that a program can check shows forgetting. A general row is {"user", "assistant"} or any other
processed row; the assistant's text is a good answer, on which the loss is measured. Everything in its `check` (CHECKS)
must hold for an answer.
"""

from __future__ import annotations

import gc
import json
import math
import platform
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from itertools import count
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.config.load import display_path, dump_config, model_name, resolve_path, shipped
from sft.config.schema import PREFERENCES, Config
from sft.data import rows as records
from sft.data import store
from sft.errors import DataError, ModelError
from sft.generation import engine, evaluate, load
from sft.generation.engine import LoadedModel
from sft.generation.load import Target
from sft.metrics.scoring import greater_is_better, number
from sft.model.files import Kind
from sft.report import bootstrap, compare_page, judge, model_card
from sft.report.bootstrap import Difference
from sft.runs import Run

SHIPPED = "data/samples/general.jsonl"
FORGETTING_LOSS = 0.1  # nats a token above which general answers count as forgotten: a perplexity a tenth higher
UNKNOWING_LOSS = 6.0  # nats a token of good answers above which the base itself does not know them
MOST_REHEARSED = 0.5  # share of rehearsal beyond which it is not raised
MIN_STOP_RATE = 0.9  # share of answers that end by themselves, below which there is a warning
ROW_LOSS = "row_loss"  # of a row: mean over its labelled tokens (`loss` in metrics.json weighs every token alike)
OF_ANSWERS = ("stop_rate", "loop_rate", "repetition", "empty_rate", "length_tokens")  # metrics that need no reference
NEUTRAL = {"length_tokens", "length_words"}  # neither direction is better
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "tokenizers")  # that answers depend on
LEDGER = ("rows_read", "rows_written", "rows_named", "named", "splits", "verdict", "formats")  # keys that are shown
FOLDER, PAGE, RESULT, ANSWERS, CARD = "report", "index.html", "compare.json", "answers.jsonl", "README.md"
Row = dict[str, Any]
Values = dict[str, list[float]]
Progress = Callable[..., None]  # rows done, of how many, and whose answers


@dataclass(frozen=True)
class Side:
    """What one model answered, and the value of each row: `{metric: [one a row]}`; nan if a row has none."""

    name: str
    kind: Kind
    samples: list[Row]
    values: Values
    general: list[Row]
    general_values: Values


# Which models, which rows


def targets(config: Path, sets: Sequence[str], folders: Sequence[Path], is_default: bool, root: Path) -> list[Target]:
    """The named adapters or whole models, else the newest run. Raises ModelError, RunError, ConfigError."""
    if not folders:
        return [load.resolve_model(config, sets, is_default=is_default, root=root)]
    resolved = []
    for folder in folders:
        whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        adapter, merged = (None, folder) if whole else (folder, None)
        target = load.resolve_model(config, sets, adapters=adapter, merged=merged, is_default=is_default, root=root)
        resolved.append(target)
    bases = dict.fromkeys((target.config.model.name, target.config.model.revision) for target in resolved)
    if len(bases) > 1:
        shown = " and ".join(f"{name}{f' ({revision})' if revision else ''}" for name, revision in bases)
        raise ModelError(f"the adapters have different bases: {shown}", fix="compare adapters of one base at a time")
    return resolved


def unique_names(targets: Sequence[Target]) -> list[str]:
    """A name for each target, no two alike, and none of them `base`."""
    names = ["base"]
    for target in targets:
        numbered = (f"{target.name} ({number})" if number > 1 else target.name for number in count(1))
        names.append(next(name for name in numbered if name not in names))
    return names[1:]


def general_rows(path: Path | None, root: Path) -> list[Row]:
    """The general questions of the user's file, or the shipped set. Raises DataError for a check that is not known."""
    rows = store.read_rows(path or shipped(root, SHIPPED))
    for row in rows:
        check, where = row.get("check", {}), str(row.get("origin"))
        unknown = sorted(set(check) - set(CHECKS)) if isinstance(check, dict) else [str(check)]
        if unknown:
            raise DataError(f"no such check: {', '.join(unknown)}", where=where, fix=f"use {', '.join(CHECKS)}")
        for pattern in _patterns(check.get("matches", [])) + _patterns(check.get("excludes", [])):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"{pattern!r} is not a regular expression: {error}", where=where) from None
    return rows


# What each model answers


def measure_sides(
    targets: Sequence[Target], rows: Sequence[Row], general: Sequence[Row], root: Path, on_progress: Progress | None
) -> list[Side]:
    """The base first, then each target; the base is measured with the first adapter switched off if there is one."""
    sides: list[Side] = []
    base: Side | None = None
    answers, before = (len(targets) + 1) * (len(rows) + len(general)), 0

    def part(name: str, count: int) -> engine.Progress:
        """The progress of the next `count` answers within all."""
        nonlocal before
        start, before = before, before + count
        return lambda done, total: on_progress(start + done * count / total, answers, name) if on_progress else None

    for name, target in zip(unique_names(targets), targets, strict=True):
        config = _greedy(target.config)
        model = load.open_model(config, adapter=target.adapter, merged=target.merged, root=root)
        sides.append(_measure(model, name, rows, general, config, root, part))
        if base is None and target.adapter is not None:
            with model.base_only():
                base = _measure(model, "base", rows, general, config, root, part)
        del model
        gc.collect()
    if base is None:
        config = _greedy(targets[0].config)
        base = _measure(load.open_model(config, root=root), "base", rows, general, config, root, part)
    return [base, *sides]


def _greedy(config: Config) -> Config:
    """The config without sampling, so that answers do not depend on luck, and without endless repetition."""
    update = {"do_sample": False, "stop_loops": True}
    return config.model_copy(update={"generation": config.generation.model_copy(update=update)})


def _measure(
    model: LoadedModel, name: str, rows: Sequence[Row], general: Sequence[Row], config: Config, root: Path,
    part: Callable[[str, int], engine.Progress],
) -> Side:  # fmt: skip
    measure = evaluate.evaluate_base if name == "base" else evaluate.evaluate
    evaluation = measure(model, rows, config, root, part(name, len(rows)))
    values: Values = {name: of_rows for name, of_rows in evaluation.values.items() if name != "length_words"}
    values[ROW_LOSS] = []
    for row, loss in zip(rows, evaluation.row_losses, strict=True):  # a row's loss belongs to its last answer
        last_only = config.eval.turns == "last" or records.is_rendered(row)
        earlier = 0 if last_only else len(evaluate.answer_turns(row)) - 1
        values[ROW_LOSS] += [*[math.nan] * earlier, loss]
    if not general:
        return Side(name, model.kind, evaluation.samples, values, [], {})
    plain = {"metrics": ["token_f1"], "json_schema": None, "shots": 0, "format": None, "turns": "last"}
    section = config.model_copy(update={"eval": config.eval.model_copy(update=plain)})
    of_general = measure(model, general, section, root, part(name, len(general)))
    pairs = zip(of_general.samples, general, strict=True)
    passed = [passes(answer["prediction"], row.get("check", {})) for answer, row in pairs]
    general_values = {ROW_LOSS: of_general.row_losses, "passed": passed, "stopped": of_general.values["stop_rate"]}
    return Side(name, model.kind, evaluation.samples, values, of_general.samples, general_values)


def _patterns(value: str | Sequence[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _matches(answer: str, pattern: str) -> bool:
    return re.search(pattern, answer, re.IGNORECASE | re.DOTALL) is not None


def _is_json(answer: str, keys: Sequence[str]) -> bool:
    try:
        value = json.loads(answer)
    except ValueError:
        return False
    return set(keys) <= set(value) if isinstance(value, dict) else not keys


CHECKS: dict[str, Callable[[str, Any], bool]] = {  # of an answer without spaces around it, and the check's value
    "number": lambda answer, value: number(answer) == Decimal(str(value)),  # the answer's last number
    "matches": lambda answer, value: all(_matches(answer, pattern) for pattern in _patterns(value)),
    "excludes": lambda answer, value: not any(_matches(answer, pattern) for pattern in _patterns(value)),
    "json": _is_json,  # JSON with at least these keys
    "max_words": lambda answer, value: len(answer.split()) <= value,
    "lines": lambda answer, value: sum(bool(line.strip()) for line in answer.splitlines()) == value,  # with text
}


def passes(answer: str, check: Mapping[str, Any]) -> float:
    """1 if the answer is not empty and every check holds, else 0; nan without checks."""
    answer = answer.strip()
    holds = bool(answer) and all(CHECKS[name](answer, value) for name, value in check.items())
    return float(holds) if check else math.nan


# What it means


def compare_side(base: Side, tuned: Side, split: str, seed: int, remedy: str = "") -> dict[str, Any]:
    """One tuned model against the base: metrics, verdict, stopping, forgetting (and the remedy for it)."""
    metrics = {
        name: _difference(name, base.values, tuned.values, seed)
        for name in ordered_metrics(tuned) if name in base.values
    }  # fmt: skip
    same_text = [a["prediction"] for a in base.samples] == [b["prediction"] for b in tuned.samples]
    compared: dict[str, Any] = {
        "name": tuned.name,
        "verdict": verdict(tuned.name, metrics, same_text, split),
        "metrics": {name: entry.to_json() for name, entry in metrics.items()},
        "stopping": stopping(tuned),
    }
    if tuned.general:
        loss = _difference(ROW_LOSS, base.general_values, tuned.general_values, seed)
        passed = bootstrap.difference(base.general_values["passed"], tuned.general_values["passed"], seed=seed)
        checked = passed if passed.rows else None
        stopped = bootstrap.difference(base.general_values["stopped"], tuned.general_values["stopped"], seed=seed)
        compared["general"] = {
            **forgetting(loss, checked, stopped, remedy), "stopped": stopped.to_json(),
            "rows": len(tuned.general), ROW_LOSS: loss.to_json(), "passed": checked.to_json() if checked else None,
        }  # fmt: skip
    return compared


def ordered_metrics(side: Side) -> list[str]:
    """The side's metrics, those that compare with references first."""
    return sorted(side.values, key=lambda name: name in OF_ANSWERS)


def _difference(name: str, base: Values, tuned: Values, seed: int) -> Difference:
    entry = bootstrap.difference(base[name], tuned[name], greater_is_better=greater_is_better(name), seed=seed)
    return replace(entry, finding="differs") if name in NEUTRAL and entry.finding in {"better", "worse"} else entry


def verdict(name: str, metrics: Mapping[str, Difference], same_text: bool, split: str) -> dict[str, str]:
    """finding (same, better, worse, mixed, unclear, too few rows), headline, words."""
    judged = {key: entry for key, entry in metrics.items() if key not in OF_ANSWERS}
    rows = max((entry.rows for entry in judged.values()), default=0)
    by_finding: dict[str, list[str]] = {}
    for key, entry in judged.items():
        by_finding.setdefault(entry.finding, []).append(key)
    if same_text and set(by_finding) <= {"same"}:
        headline = f"No difference: {name} answers exactly as its base does"
        return {"finding": "same", "headline": headline, "words": f"on all {rows:,} rows"}
    about = f"{split} split, {rows:,} rows; each metric with its 95 % interval"
    better, worse = by_finding.get("better", []), by_finding.get("worse", [])
    parts = [f"{word} on {', '.join(keys)}" for word, keys in (("better", better), ("worse", worse)) if keys]
    if unclear := [*by_finding.get("unclear", []), *by_finding.get("same", [])]:
        parts.append(f"no clear difference on {', '.join(unclear)}")
    words = f"{'; '.join(parts)} ({about})"
    if rows < bootstrap.MIN_ROWS:
        finding, headline, words = "too few rows", f"Too few rows to tell whether {name} is better than its base", about
    elif better and worse:
        finding, headline = "mixed", f"{name} is better than its base in some metrics and worse in others"
    elif better or worse:
        finding = "better" if better else "worse"
        headline = f"{name} is {finding} than its base"
    else:
        finding, headline = "unclear", f"No clear difference between {name} and its base"
    return {"finding": finding, "headline": headline, "words": words}


def stopping(side: Side) -> dict[str, Any]:
    """Whether answers end by themselves."""
    stopped, rows = side.values["stop_rate"], len(side.samples)
    share = sum(stopped) / rows if rows else 0.0
    if share >= MIN_STOP_RATE:
        headline = f"{side.name} stops by itself in {share:.0%} of its answers"
    else:
        endless, looped = rows - int(sum(stopped)), int(sum(side.values.get("loop_rate", ())))
        headline = f"{side.name} often does not stop: {endless:,} of {rows:,} answers did not end"
        headline += f" ({looped:,} only repeated themselves and were cut)" if looped else ""
    return {"share": round(share, 6), "headline": headline, "good": share >= MIN_STOP_RATE}


def forgetting(
    loss: Difference, passed: Difference | None, stopped: Difference | None = None, remedy: str = ""
) -> dict[str, str]:
    """level, headline and words on the general questions, by the loss of good answers, the share of checks passed and
    the share of answers that end by themselves. remedy: added to the words of what is forgotten.

    forgotten: the loss has risen by more than FORGETTING_LOSS beyond its interval, or fewer checks pass, or fewer
    answers end, beyond theirs. slight: the loss has risen beyond its interval, by less than that. unknown: too few
    questions, or the base cannot answer them itself. Else none.
    """
    reasons = {
        "fewer answers pass their checks": passed is not None and passed.finding == "worse",
        "answers no longer end by themselves": stopped is not None and stopped.finding == "worse",
        "good general answers have become much less likely": loss.finding == "worse" and loss.low > FORGETTING_LOSS,
    }
    if any(reasons.values()):
        reason = " and ".join(reason for reason, holds in reasons.items() if holds)
        level, headline = "forgotten", f"It has forgotten general abilities: {reason}"
    elif loss.finding == "worse":
        level, headline = "slight", "Slight forgetting: general answers have become a little less likely"
    elif loss.finding == "too few rows":
        level, headline = "unknown", "Too few general questions to tell whether it forgot"
    elif loss.base > UNKNOWING_LOSS and (passed is None or passed.base < 0.1):
        level, headline = "unknown", "The general questions show little: the base itself cannot answer them"
    else:
        level, headline = "none", "No sign of forgetting on the general questions"
    words = (
        f"perplexity of good answers x{math.exp(min(loss.difference, 50.0)):.3g} (loss {loss.difference:+.3f}, "
        f"95 % interval {loss.low:+.3f} to {loss.high:+.3f})"
    )
    if passed is not None:
        words += (
            f"; checks passed: {passed.base:.0%}, now {passed.tuned:.0%} (interval of the change "
            f"{passed.low:+.0%} to {passed.high:+.0%}, {passed.rows} questions)"
        )
    if stopped is not None:
        words += f"; answers that end by themselves: {stopped.base:.0%}, now {stopped.tuned:.0%}"
    if level == "forgotten" and remedy:
        words += f"; {remedy}"
    return {"level": level, "headline": headline, "words": words}


def against_forgetting(target: Target, root: Path) -> str:
    """The command for the run again with what may keep the rest: rehearsal, more of it, or a lower learning rate."""
    run, train = run_of(target, root), target.config.train
    share = train.rehearsal.share if "rehearsal" in files.read_json(run.folder / "ledger.json") else 0
    if (train.objective in PREFERENCES or share >= MOST_REHEARSED) and train.learning_rate != "auto":
        setting = f"train.learning_rate={train.learning_rate / 2:g}"
    elif target.config.tuning.mode == "full":  # where rehearsal was not enough, and was with an adapter: RESULTS.md
        without = " train.ewc.strength=0" if train.ewc.strength else ""
        setting = f'"tuning.mode=lora train.learning_rate=auto{without} train.rehearsal.rows=100"'
    else:
        setting = f"train.rehearsal.share={min(MOST_REHEARSED, 2 * share):g}" if share else "train.rehearsal.rows=100"
    config = f"CONFIG={display_path(run.settings, root)} " if run.settings.is_file() else ""
    return f"to keep more of the rest: make train {config}SET={setting}"


def constant_baseline(side: Side, constant: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Whether the same answer to every question would do as well, by the first metric that it has."""
    names = [name for name in side.values if constant and isinstance(constant.get(name), float)]
    if constant is None or not names or not side.samples:
        return None
    name = names[0]
    mean = sum(side.values[name]) / len(side.samples)
    good = mean > constant[name]
    verdict = "does better than one fixed answer to every question" if good else "is no better than one fixed answer"
    words = f"{name}: {mean:.3f} against {constant[name]:.3f} for “{constant['answer']}” to every question"
    headline = f"{side.name} {verdict}"
    return {"headline": headline, "words": words, "good": good, "metric": name, "constant": constant[name]}


# What is written


def build_result(
    sides_of: Sequence[Target], measured: Sequence[Side], general: Sequence[Row], split: str, seed: int,
    constant: Mapping[str, Any] | None, root: Path,
) -> dict[str, Any]:  # fmt: skip
    """compare.json: the models' means, each tuned model's comparison, the settings and where it was measured."""
    from sft.model import hardware

    first, base, tuned = sides_of[0], measured[0], measured[1:]
    comparisons = [
        compare_side(base, side, split, seed, against_forgetting(target, root))
        for side, target in zip(tuned, sides_of, strict=True)
    ]
    for compared, side in zip(comparisons, tuned, strict=True):
        if baseline := constant_baseline(side, constant):
            compared["constant_baseline"] = baseline
        compared["sound"] = compared["stopping"]["good"] and (baseline is None or baseline["good"])
    device, config = hardware.probe(), first.config
    return {
        "run": first.name,
        "base": model_name(config.model.name),
        "kind": base.kind,
        "split": split,
        "rows": len(base.samples),
        "first_metric": next(name for name in base.values if name not in OF_ANSWERS),
        "sides": {
            metric: {side.name: _spread(side.values[metric], seed) for side in measured if metric in side.values}
            for metric in dict.fromkeys(metric for side in measured for metric in ordered_metrics(side))
        },
        "comparisons": comparisons,
        "general": [
            {
                "id": row["id"],
                "kind": str(row.get("kind", "")),
                "prompt": base.general[index]["prompt"],
                "answers": {side.name: side.general[index]["prediction"] for side in measured},
                "passed": {side.name: _none_if_nan(side.general_values["passed"][index]) for side in measured},
            }
            for index, row in enumerate(general)
        ],
        "bootstrap": {"draws": bootstrap.draws_for(len(base.samples)), "seed": seed, "level": bootstrap.LEVEL},
        "generation": {**config.generation.model_dump(), "do_sample": False},
        "hardware": {"device": device.name, "memory": f"{device.total_bytes / 2**30:.1f} GiB"},
        "versions": {"python": platform.python_version(), **runs.versions(LIBRARIES)},
        "training": training_summary(run_of(first, root)),
        "data": _ledgers(first, root),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def _spread(values: Sequence[float], seed: int) -> dict[str, float]:
    """A side's own mean with its interval."""
    values = [value for value in values if not math.isnan(value)]
    low, high = bootstrap.interval(values, seed=seed)
    spread = {"value": math.fsum(values) / max(1, len(values)), "low": low, "high": high}
    return {key: round(value, 6) for key, value in spread.items()}


def _none_if_nan(value: float) -> float | None:
    return None if math.isnan(value) else value


def run_of(target: Target, root: Path) -> Run:
    """The run that a model belongs to; for a folder from elsewhere, the place where its report goes."""
    return target.run or runs.at(root / "outputs" / target.name, root)


def training_summary(run: Run) -> dict[str, Any]:
    """The run's finished.json without machine paths."""
    return {name: value for name, value in files.read_json(run.folder / runs.FINISHED).items() if name != "output"}


def _ledgers(target: Target, root: Path) -> dict[str, Any]:
    """What became of the rows: of `make process`, where the run used its files, and of the run itself."""
    ledgers = {"run": files.read_json(run_of(target, root).folder / "ledger.json")}
    if target.config.data.train_path is None:
        ledger = files.read_json(resolve_path(root, target.config.data.processed_dir) / "ledger.json")
        ledgers["processed"] = {key: ledger[key] for key in LEDGER if key in ledger}
    return ledgers


def log_curves(run: Run) -> dict[str, list[tuple[float, float]]]:
    """{name: [(step, value)]} from the run's log.jsonl."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for entry in runs.read_log(run.folder / "log.jsonl"):
        for name in entry.keys() - {"step"}:
            if isinstance(entry[name], int | float):
                curves.setdefault(name, []).append((entry["step"], entry[name]))
    return curves


def answer_rows(measured: Sequence[Side], metric: str) -> list[Row]:
    """answers.jsonl: question, reference, all answers and scores, and the tuned models' change on `metric`."""
    base, tuned = measured[0], measured[1:]
    sign = 1.0 if greater_is_better(metric) else -1.0
    rows = []
    for index, sample in enumerate(base.samples):
        changes = {side.name: sign * (side.values[metric][index] - base.values[metric][index]) for side in tuned}
        scores = {s.name: {name: _none_if_nan(v[index]) for name, v in s.values.items()} for s in measured}
        rows.append({
            "id": sample["id"],
            "prompt": sample["prompt"],
            "reference": sample["reference"],
            "base": sample["prediction"],
            "answers": {side.name: side.samples[index]["prediction"] for side in tuned},
            "stopped": {side.name: side.samples[index]["stopped"] for side in measured},
            "scores": scores,
            "changes": {name: 0.0 if math.isnan(change) else change for name, change in changes.items()},
        })  # fmt: skip
    return rows


def add_judge_scores(
    result: dict[str, Any], opened: judge.Judge, measured: Sequence[Side], limit: int, seed: int,
    on_progress: Progress | None,
) -> None:  # fmt: skip
    """Puts the judge's scores of the first `limit` rows (0: all) into each comparison."""
    base = measured[0].samples[: limit or None]
    for compared, side in zip(result["comparisons"], measured[1:], strict=True):
        pairs = zip(base, side.samples, strict=False)
        rows = [(mine["prompt"], mine["reference"], mine["prediction"], other["prediction"]) for mine, other in pairs]
        compared["judge"] = judge.score_rows(opened, rows, seed, on_progress)


def write(result: dict[str, Any], measured: Sequence[Side], target: Target, root: Path) -> Path:
    """Writes outputs/<run>/report, each file atomically, the page last. Returns the folder."""
    run = run_of(target, root)
    folder = run.folder / FOLDER
    rows = answer_rows(measured, result["first_metric"])
    files.write_json(folder / RESULT, result)
    files.write_text(folder / ANSWERS, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    form = "hf" if target.config.tuning.mode == "full" else model_card.ADAPTER  # of what training left
    name, system = result["comparisons"][0]["name"], load.system_text(target.config, target.folder, root)
    files.write_text(folder / CARD, model_card.card(target.config, name, form, result=result, system=system))
    files.write_text(folder / PAGE, compare_page.page(result, rows, log_curves(run), dump_config(target.config)))
    return folder
