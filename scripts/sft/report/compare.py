"""What a fine-tune must not unlearn: a small general set with answers that a program can check, and the verdict on it.

A row is {"user", "assistant"} or any other processed row; the assistant's text is a good answer, on which the loss is
measured. `check` says what an answer must be; all that stands in it must hold:
  number: the answer's last number         matches: a pattern (a list: each)    excludes: a pattern that must be absent
  json: the answer is JSON with these keys  max_words, lines: at most so many words; exactly so many lines with text
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
from pathlib import Path
from typing import Any

from sft import files, runs
from sft.config import load as config_load
from sft.config.load import dump_config, shipped
from sft.config.schema import Config
from sft.data import rows as records
from sft.data import store
from sft.errors import ConfigError, DataError, ModelError
from sft.generation import evaluate, load
from sft.generation.engine import Kind
from sft.generation.evaluate import Evaluation
from sft.generation.evaluate import answers as evaluate_answers
from sft.generation.load import LoadedModel, Target
from sft.metrics import greater_is_better, text
from sft.metrics.scoring import number
from sft.report import compare_page, model_card, results
from sft.report.judge import Judge
from sft.report.judge import judge as ask
from sft.report.results import Difference
from sft.runs import FINISHED, Run

SHIPPED = "data/samples/general.jsonl"
MATTERS = 0.1  # nats a token: a perplexity a tenth higher
UNKNOWING = 6.0  # nats a token of good answers above which a base knows next to nothing of them
CHECKS = ("number", "matches", "excludes", "json", "max_words", "lines")
_FLAGS = re.IGNORECASE | re.DOTALL
Row = dict[str, Any]


def read(named: Path | None, root: Path) -> list[Row]:
    """The rows of the user's file, or of the set that is shipped. Raises DataError for a check that cannot be read."""
    rows = store.read_rows(named or shipped(root, SHIPPED))
    for row in rows:
        check = row.get("check", {})
        wrong = sorted(set(check) - set(CHECKS)) if isinstance(check, dict) else [str(check)]
        if wrong:
            fix = f"`check` knows {', '.join(CHECKS)}"
            raise DataError(f"no such check: {', '.join(wrong)}", where=str(row.get("origin")), fix=fix)
        for pattern in _patterns(check, "matches") + _patterns(check, "excludes"):
            try:
                re.compile(pattern)
            except re.error as error:
                raise DataError(f"{pattern!r} is no pattern: {error}", where=str(row.get("origin"))) from None
    return rows


def _patterns(check: Mapping[str, Any], name: str) -> list[str]:
    given = check.get(name, [])
    return [given] if isinstance(given, str) else list(given)


def passes(answer: str, check: Mapping[str, Any]) -> float:
    """1 where the answer says something and every check holds, else 0; nan without checks."""
    if not check:
        return float("nan")
    text = answer.strip()
    if not text or not all(re.search(one, text, _FLAGS) for one in _patterns(check, "matches")):
        return 0.0
    if any(re.search(one, text, _FLAGS) for one in _patterns(check, "excludes")):
        return 0.0
    if "number" in check and number(text) != Decimal(str(check["number"])):
        return 0.0
    if "max_words" in check and len(text.split()) > check["max_words"]:
        return 0.0
    if "lines" in check and sum(bool(line.strip()) for line in text.splitlines()) != check["lines"]:
        return 0.0
    return float("json" not in check or _is_json(text, check["json"]))


def _is_json(text: str, keys: Sequence[str]) -> bool:
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return set(keys) <= set(found) if isinstance(found, dict) else not keys


def forgetting(loss: Difference, passed: Difference | None) -> tuple[str, str]:
    """The verdict on the general set, by loss a token of good answers and share of checks that hold: level, headline.

    forgotten: the loss has risen by more than MATTERS beyond its interval, or fewer checks hold beyond theirs.
    slight: the loss has risen beyond its interval, by less than that. unknown: too few questions, or the base could
    not answer them in the first place. Else none.
    """
    fewer = passed is not None and passed.finding == "worse"
    if (loss.finding == "worse" and loss.low > MATTERS) or fewer:
        lost = "fewer answers pass their checks" if fewer else "good general answers have become much less likely"
        return "forgotten", f"It has forgotten general abilities: {lost}"
    if loss.finding == "worse":
        return "slight", "Slight forgetting: general answers have become a little less likely"
    if loss.finding == "too few rows":
        return "unknown", "Too few general questions to tell whether it forgot"
    if loss.base > UNKNOWING and (passed is None or passed.base < 0.1):
        return "unknown", "The general questions say little: the base itself cannot answer them"
    return "none", "No sign of forgetting on the general questions"


def figures(loss: Difference, passed: Difference | None) -> str:
    """What the verdict rests on, in words."""
    told = (
        f"perplexity of good answers x{general_perplexity(loss.difference):.3g} (loss {loss.difference:+.3f}, "
        f"95 % interval {loss.low:+.3f} to {loss.high:+.3f})"
    )
    if passed is None:
        return told
    return (
        f"{told}; checks that hold: {passed.base:.0%}, now {passed.tuned:.0%} (interval of the change "
        f"{passed.low:+.0%} to {passed.high:+.0%}, {passed.rows} questions)"
    )


def general_perplexity(nats: float) -> float:
    """Of a loss; beyond 50 nats it counts as 50."""
    return math.exp(min(nats, 50.0))


Values = dict[str, list[float]]
Progress = Callable[[int, int], None]
ROW_LOSS = "row_loss"  # of a row: mean over its labelled tokens (`loss` in metrics.json weighs every token alike)
OF_ANSWERS = ("stop_rate", "repetition", "empty_rate", "length_tokens")


@dataclass(frozen=True)
class Side:
    """What one side answered and what each row is worth: `{metric: [a value a row]}`; nan where a row has none."""

    name: str
    kind: Kind
    samples: list[Row]
    values: Values
    general: list[Row]
    general_values: Values


def sides(
    targets: Sequence[Target], rows: Sequence[Row], general: Sequence[Row], root: Path, on_progress: Progress | None
) -> list[Side]:
    """The base first, then each target. Raises ModelError where they are not of one base."""
    check_one_base(targets)
    parts = (len(targets) + 1) * 2 * (len(rows) + len(general))
    count = _Count(on_progress, parts)
    found: list[Side] = []
    base: Side | None = None
    for name, target in zip(names(targets), targets, strict=True):
        config = greedy(target.config)
        served = load.open_model(config, adapter=target.adapter, merged=target.merged, root=root)
        found.append(_measure(served, name, rows, general, config, root, count))
        if base is None and target.adapter is not None:
            with served.base_only():
                base = _measure(served, "base", rows, general, config, root, count)
        del served
        gc.collect()
    if base is None:
        config = greedy(targets[0].config)
        base = _measure(load.open_model(config, root=root), "base", rows, general, config, root, count)
    return [base, *found]


def check_one_base(targets: Sequence[Target]) -> None:
    """Raises ModelError where the targets were tuned from different models."""
    bases = dict.fromkeys((target.config.model.name, target.config.model.revision) for target in targets)
    if len(bases) > 1:
        told = " and ".join(f"{name}{f' ({revision})' if revision else ''}" for name, revision in bases)
        raise ModelError(f"the adapters have different bases: {told}", fix="compare those of one base at a time")


def names(targets: Sequence[Target]) -> list[str]:
    """A name for each target, no two alike."""
    made: list[str] = []
    for target in targets:
        name, number = target.name, 1
        while name in [*made, "base"]:
            number += 1
            name = f"{target.name} ({number})"
        made.append(name)
    return made


def greedy(config: Config) -> Config:
    """The config with answers that are not drawn."""
    return config.model_copy(update={"generation": config.generation.model_copy(update={"do_sample": False})})


class _Count:
    """One bar over all answers and all losses of all sides."""

    def __init__(self, on_progress: Progress | None, total: int) -> None:
        self.on_progress, self.total, self.before = on_progress, total, 0

    def part(self, amount: int) -> Progress:
        """The progress of the next part, which counts for `amount` whatever its own total is."""
        before, self.before = self.before, self.before + amount

        def within(done: int, total: int) -> None:
            if self.on_progress is not None:
                self.on_progress(before + done * amount // total, self.total)

        return within


def _measure(
    served: LoadedModel,
    name: str,
    rows: Sequence[Row],
    general: Sequence[Row],
    config: Config,
    root: Path,
    count: _Count,
) -> Side:
    answered = evaluate.evaluate(served, rows, config, root, count.part(len(rows)))
    of_rows = _losses(served, rows, config, count.part(len(rows)))
    values = _values(answered) | {ROW_LOSS: of_rows if config.eval.turns == "last" else _beside(rows, of_rows)}
    if not general:
        return Side(name, served.kind, answered.samples, values, [], {})
    asked = evaluate.evaluate(served, general, _plain(config), root, count.part(len(general)))
    pairs = zip(asked.samples, general, strict=True)
    checked = [passes(sample["prediction"], row.get("check", {})) for sample, row in pairs]
    of_general = {ROW_LOSS: _losses(served, general, config, count.part(len(general))), "passed": checked}
    return Side(name, served.kind, answered.samples, values, asked.samples, of_general)


def _plain(config: Config) -> Config:
    """The config for the general questions: no examples in front, no schema, hardly a metric."""
    plain = {"metrics": ["token_f1"], "json_schema": None, "shots": 0, "format": None, "turns": "last"}
    return config.model_copy(update={"eval": config.eval.model_copy(update=plain)})


def _beside(rows: Sequence[Row], losses: Sequence[float]) -> list[float]:
    """A value an answer, where every answer of a row is asked for: the row's loss beside the last, else nan."""
    made: list[float] = []
    for row, loss in zip(rows, losses, strict=True):
        earlier = 0 if records.is_rendered(row) else len(evaluate_answers(row)) - 1
        made += [*[math.nan] * earlier, loss]
    return made


def _values(answered: Evaluation) -> Values:
    samples = answered.samples
    names = samples[0]["scores"] if samples else ()
    return {name: [float(one["scores"][name]) for one in samples] for name in names} | {
        "stop_rate": [float(one["stopped"]) for one in samples],
        "repetition": [text.repetition(one["prediction"]) for one in samples],
        "empty_rate": [text.empty(one["prediction"]) for one in samples],
        "length_tokens": [float(one["tokens"]) for one in samples],
    }


def _losses(served: LoadedModel, rows: Sequence[Row], config: Config, on_progress: Progress) -> list[float]:
    """Each row's mean loss over its labelled tokens; nan where it has none (too long, no label left)."""
    found = []
    for done, row in enumerate(rows, start=1):
        kept = served.encoder.encode(row).dropped is None
        found.append(evaluate.losses(served, [row], config)["loss"] if kept else math.nan)
        on_progress(done, len(rows))
    return found


NEUTRAL = {"length_tokens", "length_words"}
LEAST_STOPS = 0.9  # share of answers that end by themselves below which it is said


def of_sides(base: Side, tuned: Side, split: str, seed: int) -> dict[str, Any]:
    """One tuned side against the base: metrics, verdict, general questions."""
    metrics = differences(base, tuned, seed)
    same_words = [a["prediction"] for a in base.samples] == [b["prediction"] for b in tuned.samples]
    made: dict[str, Any] = {
        "name": tuned.name,
        "verdict": verdict(tuned.name, metrics, same_words, split),
        "metrics": {name: one.to_json() for name, one in metrics.items()},
        "stopping": stopping(tuned),
    }
    if tuned.general:
        loss = _difference(ROW_LOSS, base.general_values, tuned.general_values, seed)
        checked = results.difference(base.general_values["passed"], tuned.general_values["passed"], seed=seed)
        passed = checked if checked.rows else None
        level, headline = forgetting(loss, passed)
        perplexity = {side: round(general_perplexity(getattr(loss, side)), 4) for side in ("base", "tuned")}
        made["general"] = {
            "level": level, "headline": headline, "words": figures(loss, passed), "rows": len(tuned.general),
            ROW_LOSS: loss.to_json(), "passed": passed.to_json() if passed else None, "perplexity": perplexity,
        }  # fmt: skip
    return made


def differences(base: Side, tuned: Side, seed: int) -> dict[str, Difference]:
    """Every metric that both sides have for their rows, those that compare with references first."""
    names = [name for name in ordered(tuned) if name in base.values]
    return {name: _difference(name, base.values, tuned.values, seed) for name in names}


def ordered(side: Side) -> list[str]:
    """The side's metrics, those that compare with references first."""
    return sorted(side.values, key=lambda name: name in OF_ANSWERS)


def _difference(
    name: str, base: Mapping[str, Sequence[float]], tuned: Mapping[str, Sequence[float]], seed: int
) -> Difference:
    found = results.difference(base[name], tuned[name], greater_is_better=greater_is_better(name), seed=seed)
    return replace(found, finding="differs") if name in NEUTRAL and found.finding in {"better", "worse"} else found


def verdict(name: str, metrics: Mapping[str, Difference], same_words: bool, split: str) -> dict[str, str]:
    """finding (same, better, worse, mixed, unclear, too few rows), headline, words."""
    judged = {key: one for key, one in metrics.items() if key not in OF_ANSWERS}
    rows = max((one.rows for one in judged.values()), default=0)
    of = f"{split} split, {rows:,} rows; each metric with its 95 % interval"
    found: dict[str, list[str]] = {}
    for key, one in judged.items():
        found.setdefault(one.finding, []).append(key)
    if same_words and set(found) <= {"same"}:
        return _said("same", f"No difference: {name} answers exactly as its base does", f"on all {rows:,} rows")
    better, worse = found.get("better", []), found.get("worse", [])
    told = [f"{word} on {', '.join(keys)}" for word, keys in (("better", better), ("worse", worse)) if keys]
    if open_ones := [*found.get("unclear", []), *found.get("same", [])]:
        told.append(f"no difference that shows on {', '.join(open_ones)}")
    words = "; ".join(told) + f" ({of})"
    if rows < results.LEAST_ROWS:
        return _said("too few rows", f"Too few rows to tell whether {name} is better than its base", of)
    if better and worse:
        return _said("mixed", f"{name} is better than its base in some things and worse in others", words)
    if better:
        return _said("better", f"{name} is better than its base", words)
    if worse:
        return _said("worse", f"{name} is worse than its base", words)
    return _said("unclear", f"No clear difference between {name} and its base", words)


def _said(finding: str, headline: str, words: str) -> dict[str, str]:
    return {"finding": finding, "headline": headline, "words": words}


def stopping(side: Side) -> dict[str, Any]:
    """Whether answers end by themselves."""
    stopped, rows = side.values["stop_rate"], len(side.samples)
    share = sum(stopped) / rows if rows else 0.0
    open_ones = rows - int(sum(stopped))
    if share >= LEAST_STOPS:
        headline = f"{side.name} stops by itself in {share:.0%} of its answers"
    else:
        headline = f"{side.name} often does not stop: {open_ones:,} of {rows:,} answers ran to the limit"
    return {"share": round(share, 6), "headline": headline, "good": share >= LEAST_STOPS}


def parrot(side: Side, constant: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """Whether one answer said to every question would do as well, by the first metric that it has."""
    shared = [name for name in side.values if constant and isinstance(constant.get(name), float)]
    if constant is None or not shared or not side.samples:
        return None
    name = shared[0]
    mean = sum(side.values[name]) / len(side.samples)
    above = mean > constant[name]
    words = f"{name}: {mean:.3f} against {constant[name]:.3f} for “{constant['answer']}” said to every question"
    headline = "does more than repeat one answer" if above else "is no better than one constant answer"
    return {"headline": f"{side.name} {headline}", "words": words, "good": above}


def spreads(sides: Sequence[Side], seed: int) -> dict[str, dict[str, dict[str, float]]]:
    """{metric: {side: {"value", "low", "high"}}}: each side's own mean with its interval."""
    made: dict[str, dict[str, dict[str, float]]] = {}
    for side in sides:
        for name in ordered(side):
            kept = [value for value in side.values[name] if not math.isnan(value)]
            low, high = results.interval(kept, seed=seed)
            spread = {"value": math.fsum(kept) / len(kept) if kept else 0.0, "low": low, "high": high}
            made.setdefault(name, {})[side.name] = {key: round(value, 6) for key, value in spread.items()}
    return made


Points = list[tuple[float, float]]


def loss_curves(run: Run) -> dict[str, Points]:
    """{name: [(step, value)]} from the run's log.jsonl, else from TensorBoard's event files; nothing without either."""
    found: dict[str, Points] = {}
    path = run.folder / "log.jsonl"
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entry = json.loads(line)
        except ValueError:  # a last line that a crash cut short
            continue
        for name, value in entry.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((entry["step"], value))
    return found or _events(run.tb_dir)


def _events(folder: Path) -> dict[str, Points]:
    if not folder.is_dir():
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board: Any = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    return {name: [(one.step, one.value) for one in board.Scalars(name)] for name in board.Tags()["scalars"]}


def summary(run: Run) -> dict[str, Any]:
    """The run's finished.json without machine paths."""
    return {name: value for name, value in files.read_json(run.folder / FINISHED).items() if name != "output"}


Result = dict[str, Any]
LIBRARIES = ("torch", "transformers", "peft", "trl", "bitsandbytes", "tokenizers")  # that answers depend on
FOLDER, PAGE, RESULT, ANSWERS, CARD = "report", "index.html", "compare.json", "answers.jsonl", "README.md"


def targets(config: Path, sets: Sequence[str], folders: Sequence[Path], is_default: bool, root: Path) -> list[Target]:
    """The named adapters or whole models, else the newest run. Raises ModelError, RunError, ConfigError."""
    if not folders:
        return [load.resolve_model(config, sets, is_default=is_default, root=root)]
    made = []
    for folder in folders:
        whole = (folder / "config.json").is_file() and not (folder / "adapter_config.json").is_file()
        adapter, merged = (None, folder) if whole else (folder, None)
        made.append(load.resolve_model(config, sets, adapters=adapter, merged=merged, is_default=is_default, root=root))
    return made


def rows(target: Target, split: str | None, limit: int | None, root: Path) -> tuple[str, list[Row], Path]:
    """The split's name, its rows, and the training file. Raises DataError where there are none."""
    stage = store.paths(target.config.data, root)
    chosen = split or ("test" if stage.test is not None else "val")
    path = stage.test if chosen == "test" else stage.val
    if path is None:
        raise DataError(f"there are no {chosen} rows", where=f"data.{chosen}_path", fix="make process")
    limit = target.config.eval.limit if limit is None else limit
    found = store.read_rows(path)[: limit or None]
    if not found:
        raise DataError(f"there are no {chosen} rows", where=str(path), fix="make process")
    return chosen, found, stage.train


def judge(url: str | None, model: str | None) -> Judge | None:
    """The judge, asked once to see that it answers; None where none is wanted."""
    if url is None and model is None:
        return None
    if url is None or model is None:
        raise ConfigError("a judge needs both --judge-url and --judge-model", fix="give both, or neither")
    made = Judge(url, model)
    made.check()
    return made


def result(
    sides_of: Sequence[Target], measured: Sequence[Side], general: Sequence[Row], split: str, seed: int,
    constant: Mapping[str, Any] | None, root: Path,
) -> Result:  # fmt: skip
    """compare.json: the sides' means, each tuned side's comparison, the settings and where it was measured."""
    first, base, tuned = sides_of[0], measured[0], measured[1:]
    made = [of_sides(base, side, split, seed) for side in tuned]
    for one, side in zip(made, tuned, strict=True):
        if found := parrot(side, constant):
            one["parrot"] = found
    scored = [name for name in base.values if name not in OF_ANSWERS]
    from sft.model import hardware

    device, config = hardware.probe(), first.config
    draws = results.DRAWS if len(base.samples) <= results.MANY_ROWS else results.FEWER_DRAWS
    return {
        "run": first.name,
        "base": config_load.model_name(config.model.name),
        "kind": base.kind,
        "split": split,
        "rows": len(base.samples),
        "first_metric": scored[0],
        "sides": spreads(measured, seed),
        "comparisons": made,
        "general": _general(base, tuned, general),
        "bootstrap": {"draws": draws, "seed": seed, "level": results.LEVEL},
        "generation": {**config.generation.model_dump(), "do_sample": False},
        "hardware": {"device": device.name, "memory": f"{device.total_bytes / 2**30:.1f} GiB"},
        "versions": {"python": platform.python_version(), **runs.versions(LIBRARIES)},
        "training": summary(run_of(first, root)),
        "data": _ledgers(first, root),
        "at": time.strftime("%Y-%m-%d %H:%M"),
    }


def run_of(target: Target, root: Path) -> Run:
    """The run that a side belongs to; for a folder from elsewhere the place where its report goes."""
    return target.run or runs.at(root / "outputs" / target.name, root)


def _ledgers(target: Target, root: Path) -> dict[str, Any]:
    found = {"run": files.read_json(run_of(target, root).folder / "ledger.json")}
    if target.config.data.train_path is None:
        made = files.read_json(config_load.resolve_path(root, target.config.data.processed_dir) / "ledger.json")
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
    curves = loss_curves(run)
    files.write_json(folder / RESULT, made)
    files.write_text(folder / ANSWERS, "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in told))
    files.write_text(folder / CARD, model_card.card(made, made["comparisons"][0], target.config))
    files.write_text(folder / PAGE, compare_page.page(made, told, curves, dump_config(target.config)))
    return folder
