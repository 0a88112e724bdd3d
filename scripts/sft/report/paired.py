"""Is one side better than another on the same rows: paired differences, wins, and bootstrap intervals. Pure functions.

The interval is the percentile bootstrap of the mean over rows (Efron 1979; Efron and Tibshirani 1993, ch. 13): rows are
drawn with replacement, a row keeping both of its values. Equal values on both sides give a difference of exactly zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
DRAWS, FEWER_DRAWS, MANY_ROWS = 10_000, 2_000, 5_000
LEAST_ROWS = 10  # fewer give intervals that are too narrow to be believed
EQUAL = 1e-9
Finding = Literal["same", "better", "worse", "unclear", "differs", "too few rows"]


@dataclass(frozen=True)
class Difference:
    """tuned - base on one metric: means, 95 % interval [low, high], rows won, tied and lost by the tuned side.

    finding: the interval's word, with the direction in which the metric is good; `same`: equal in every row;
    `differs`: for a metric without such a direction.
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
        """As it stands in compare.json."""
        return {name: round(value, 6) if isinstance(value, float) else value for name, value in asdict(self).items()}


def interval(values: Sequence[float], *, seed: int = 0, level: float = LEVEL) -> tuple[float, float]:
    """The bootstrap interval of the mean. One value, or none, gives an interval without width."""
    kept = np.asarray(values, dtype=np.float64)
    if len(kept) == 0:
        return 0.0, 0.0
    tail = (1 - level) / 2
    low, high = np.quantile(_means(kept, seed), [tail, 1 - tail])
    return float(low), float(high)


def _means(values: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """The mean of each of the draws, [draws]."""
    generator, rows = np.random.default_rng(seed), len(values)
    draws = DRAWS if rows <= MANY_ROWS else FEWER_DRAWS
    block = max(1, min(draws, 2_000_000 // rows))
    parts = [
        values[generator.integers(0, rows, size=(min(block, draws - at), rows))].mean(axis=1)
        for at in range(0, draws, block)
    ]
    return np.concatenate(parts)


def difference(
    base: Sequence[float], tuned: Sequence[float], *, greater_is_better: bool = True, seed: int = 0
) -> Difference:
    """Compares two sides, a value a row each; a row where either has none (nan) is left out of both."""
    pairs = [(b, t) for b, t in zip(base, tuned, strict=True) if not (math.isnan(b) or math.isnan(t))]
    steps = [t - b for b, t in pairs]
    low, high = interval(steps, seed=seed)
    better = [step if greater_is_better else -step for step in steps]
    wins, losses = sum(step > EQUAL for step in better), sum(step < -EQUAL for step in better)
    mean = math.fsum(steps) / len(steps) if steps else 0.0
    return Difference(
        rows=len(pairs),
        base=math.fsum(b for b, _ in pairs) / len(pairs) if pairs else 0.0,
        tuned=math.fsum(t for _, t in pairs) / len(pairs) if pairs else 0.0,
        difference=mean,
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
    if len(steps) < LEAST_ROWS:
        return "too few rows"
    if low > EQUAL:
        return "better" if greater_is_better else "worse"
    if high < -EQUAL:
        return "worse" if greater_is_better else "better"
    return "unclear"
