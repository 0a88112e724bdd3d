"""Is one model better than another on the same rows: paired differences, wins, and bootstrap intervals. Pure functions.

The interval is the percentile bootstrap of the mean over rows (Efron 1979; Efron and Tibshirani 1993, ch. 13): rows are
drawn with replacement, a row keeping both of its values. Equal values on both sides give a difference of exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

LEVEL = 0.95
DRAWS, FEWER_DRAWS, MANY_ROWS = 10_000, 2_000, 5_000
MIN_ROWS = 10  # with fewer rows the interval is too narrow to be trusted
EQUAL = 1e-9
Finding = Literal["same", "better", "worse", "unclear", "differs", "too few rows"]


@dataclass(frozen=True)
class Difference:
    """tuned - base on one metric: means, 95 % interval [low, high], rows won, tied and lost by the tuned model.

    finding: the interval in a word, by the metric's good direction; `same`: equal in every row; `differs`: for a metric
    without such a direction.
    """

    rows: int
    base: float
    tuned: float
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    finding: Finding

    def to_json(self) -> dict[str, Any]:
        """The entry in compare.json, floats rounded to six digits."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def draws_for(rows: int) -> int:
    """The number of bootstrap draws for this many rows."""
    return DRAWS if rows <= MANY_ROWS else FEWER_DRAWS


def interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """The bootstrap interval of the mean; of one value, or none, an interval of width zero."""
    array = np.asarray(values, dtype=np.float64)
    if len(array) == 0:
        return 0.0, 0.0
    generator, rows, tail = np.random.default_rng(seed), len(array), (1 - LEVEL) / 2
    draws = draws_for(rows)
    block = max(1, min(draws, 2_000_000 // rows))  # draws at a time, so that the indices stay small
    means = [
        array[generator.integers(0, rows, size=(min(block, draws - start), rows))].mean(axis=1)
        for start in range(0, draws, block)
    ]
    low, high = np.quantile(np.concatenate(means), [tail, 1 - tail])
    return float(low), float(high)


def difference(
    base: Sequence[float], tuned: Sequence[float], *, greater_is_better: bool = True, seed: int = 0
) -> Difference:
    """Compares two models, one value a row each; a row where either value is nan is left out of both."""
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if not (math.isnan(b) or math.isnan(t))]
    steps = [t - b for b, t in pairs]
    low, high = interval(steps, seed=seed)
    gains = [step if greater_is_better else -step for step in steps]
    wins, losses = sum(gain > EQUAL for gain in gains), sum(gain < -EQUAL for gain in gains)
    count = len(pairs) or 1
    return Difference(
        rows=len(pairs),
        base=math.fsum(b for b, _ in pairs) / count,
        tuned=math.fsum(t for _, t in pairs) / count,
        difference=math.fsum(steps) / count,
        low=low,
        high=high,
        wins=wins,
        ties=len(pairs) - wins - losses,
        losses=losses,
        finding=_finding(steps, low, high, greater_is_better),
    )


def _finding(steps: Sequence[float], low: float, high: float, greater_is_better: bool) -> Finding:
    if all(abs(step) <= EQUAL for step in steps):
        return "same" if steps else "too few rows"
    if len(steps) < MIN_ROWS:
        return "too few rows"
    if low > EQUAL:
        return "better" if greater_is_better else "worse"
    if high < -EQUAL:
        return "worse" if greater_is_better else "better"
    return "unclear"
