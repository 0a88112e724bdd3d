"""Paired differences and bootstrap intervals, against values worked out by hand and known distributions."""

from __future__ import annotations

import math

import numpy as np
import pytest

from sft.report import bootstrap


def test_equal_models_have_a_difference_of_exactly_zero() -> None:
    values = [0.1, 0.7, 1.0, 0.3] * 10
    result = bootstrap.difference(values, list(values))
    assert (result.difference, result.low, result.high) == (0.0, 0.0, 0.0)
    assert (result.wins, result.ties, result.losses, result.finding) == (0, 40, 0, "same")


def test_the_interval_of_two_values_is_the_exact_one() -> None:
    # means of two draws from {0, 1}: 0 with chance 1/4, 1/2 with 1/2, 1 with 1/4, so the 2.5 % and 97.5 % are 0 and 1
    assert bootstrap.interval([0.0, 1.0]) == (0.0, 1.0)
    assert bootstrap.interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert bootstrap.interval([]) == (0.0, 0.0)


def test_the_interval_is_close_to_the_normal_one_for_many_rows() -> None:
    draw = np.random.default_rng(7)
    steps = draw.normal(0.2, 1.0, size=400)
    low, high = bootstrap.interval(steps.tolist())
    half = 1.959964 * steps.std() / math.sqrt(400)  # of the mean, by the central limit theorem
    assert low == pytest.approx(steps.mean() - half, abs=0.01)
    assert high == pytest.approx(steps.mean() + half, abs=0.01)


def test_intervals_cover_the_true_value_as_often_as_stated() -> None:
    draw = np.random.default_rng(3)
    covered = 0
    for trial in range(200):
        low, high = bootstrap.interval(draw.binomial(1, 0.3, size=60).astype(float).tolist(), seed=trial)
        covered += low <= 0.3 <= high
    assert 0.90 <= covered / 200 <= 0.99


def test_wins_follow_the_direction_in_which_a_metric_is_good() -> None:
    base, tuned = [2.0] * 12, [1.0] * 9 + [2.0] * 2 + [3.0]
    loss = bootstrap.difference(base, tuned, greater_is_better=False)
    assert (loss.wins, loss.ties, loss.losses) == (9, 2, 1)
    assert loss.difference == pytest.approx(-8 / 12) and loss.finding == "better"
    assert loss.low <= loss.difference <= loss.high < 0
    assert bootstrap.difference(base, tuned).finding == "worse"
    assert bootstrap.difference(base[:5], tuned[:5]).finding == "too few rows"
    assert bootstrap.difference([0.0, 1.0] * 10, [1.0, 0.0] * 10).finding == "unclear"


def test_rows_without_a_value_are_left_out_for_both_models() -> None:
    result = bootstrap.difference([1.0, math.nan, 3.0], [2.0, 9.0, math.nan])
    assert (result.rows, result.base, result.tuned) == (1, 1.0, 2.0)
    assert bootstrap.difference([math.nan], [1.0]).finding == "too few rows"


def test_the_same_seed_gives_the_same_interval() -> None:
    values = [math.sqrt(n) for n in range(30)]
    assert (
        bootstrap.interval(values, seed=1) == bootstrap.interval(values, seed=1) != bootstrap.interval(values, seed=2)
    )
