"""The search for a micro-batch: it doubles while that pays, backs off when memory runs out, and keeps a margin."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from sft.errors import EnvironmentProblem
from sft.memory.probe import Measured, search


def card(holds: int, *, a_row: int = 1, overhead: float = 1.0) -> Callable[[int], Measured]:
    """A card of `holds` bytes; `overhead` seconds a micro-batch besides one a row."""

    def measure(rows: int) -> Measured:
        if rows * a_row > holds:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Measured(rows, rows * a_row, overhead + rows)

    return measure


def test_it_grows_until_speed_stops_growing() -> None:
    found = search(card(10_000), length=10, most_rows=1000, total_bytes=10_000)
    assert (found.rows, found.tokens) == (16, 160)  # 32 would gain 3 %
    assert [one.rows for one in found.tried] == [1, 2, 4, 8, 16, 32]


def test_it_stays_within_the_token_budget_and_the_step() -> None:
    assert search(card(10_000, overhead=1e6), length=512, most_rows=1000, total_bytes=10_000).tokens == 4096
    assert search(card(10_000, overhead=1e6), length=512, most_rows=3, total_bytes=10_000).rows == 3
    assert search(card(10_000, overhead=1e6), length=9000, most_rows=16, total_bytes=10_000).rows == 1


@pytest.mark.parametrize("total", [10, 13, 16, 29, 40])
def test_it_comes_near_to_the_most_rows_that_leave_the_margin(total: int) -> None:
    found = search(card(total, overhead=1e6), length=1, most_rows=10_000, total_bytes=total)
    assert 0.95 * 0.9 * total - 1 < found.rows <= 0.9 * total


def test_one_row_that_fits_without_the_margin_is_taken_and_one_that_does_not_is_said() -> None:
    assert search(card(100, a_row=95), length=512, most_rows=16, total_bytes=100).rows == 1
    with pytest.raises(EnvironmentProblem, match="one row of 512 tokens does not fit"):
        search(card(100, a_row=101), length=512, most_rows=16, total_bytes=100)


def test_other_errors_come_through() -> None:
    def broken(rows: int) -> Measured:
        raise RuntimeError("device-side assert")

    with pytest.raises(RuntimeError, match="device-side"):
        search(broken, length=1, most_rows=1, total_bytes=1)


def test_it_stops_growing_when_its_time_is_up() -> None:
    asked = iter([True, True, False])
    found = search(
        card(10_000, overhead=1e6), length=1, most_rows=1000, total_bytes=10_000, time_left=lambda: next(asked)
    )
    assert [one.rows for one in found.tried] == [1, 2, 4]
    assert found.rows == 4
