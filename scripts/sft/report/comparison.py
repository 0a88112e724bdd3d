"""What a comparison found, as one dictionary: each metric's difference and interval, and verdicts in plain words."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sft.metrics import greater_is_better
from sft.report import general, paired
from sft.report.measure import OF_ANSWERS, ROW_LOSS, Side
from sft.report.paired import Difference

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
        checked = paired.difference(base.general_values["passed"], tuned.general_values["passed"], seed=seed)
        passed = checked if checked.rows else None
        level, headline = general.forgetting(loss, passed)
        perplexity = {side: round(general.perplexity(getattr(loss, side)), 4) for side in ("base", "tuned")}
        made["general"] = {
            "level": level, "headline": headline, "words": general.figures(loss, passed), "rows": len(tuned.general),
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
    found = paired.difference(base[name], tuned[name], greater_is_better=greater_is_better(name), seed=seed)
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
    if rows < paired.LEAST_ROWS:
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
            low, high = paired.interval(kept, seed=seed)
            spread = {"value": math.fsum(kept) / len(kept) if kept else 0.0, "low": low, "high": high}
            made.setdefault(name, {})[side.name] = {key: round(value, 6) for key, value in spread.items()}
    return made
