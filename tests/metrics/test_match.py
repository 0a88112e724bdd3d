"""Exact match in its variants, token F1, and numeric answers."""

from __future__ import annotations

from decimal import Decimal

import pytest

from sft.metrics import scoring
from tests.metrics.helpers import score


def one(name: str, prediction: str, *references: str) -> float:
    return score([name], [prediction], [list(references)])[name]


def test_exact_match_ignores_outer_whitespace_only() -> None:
    assert one("exact_match", " Paris\n", "Paris") == 1
    assert one("exact_match", "paris", "Paris") == 0
    assert one("exact_match", "Lyon", "Paris", "Lyon") == 1


def test_normalised_match_follows_squad() -> None:
    assert scoring.normalise("  The   Eiffel-Tower, an icon! ") == "eiffeltower icon"
    assert one("exact_match_normalised", "the paris.", "Paris") == 1
    assert one("exact_match_normalised", "theparis", "Paris") == 0
    assert score(["exact_match_normalized"], ["A b"], ["b"]) == {"exact_match_normalised": 1.0}


def test_token_f1_counts_shared_words() -> None:
    # answer: red car here (3), reference: red big car (3), shared 2
    assert one("token_f1", "the red car here", "a red big car") == pytest.approx(2 / 3)
    assert one("token_f1", "x", "y", "x z") == pytest.approx(2 / 3)
    assert one("token_f1", "", "") == 1
    assert one("token_f1", "", "y") == 0


def test_contains_looks_for_the_reference_anywhere() -> None:
    assert one("contains", "It is PARIS, of course", "Paris") == 1
    assert one("contains", "It is Lyon", "Paris") == 0
    assert one("contains", "anything", "") == 0


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("5 + 3 = <<5+3=8>>8\n#### 8", Decimal(8)),
        ("#### 1,234.50", Decimal("1234.5")),
        ("#### -7\nor 9", Decimal(-7)),
        ("so she pays $1,000.", Decimal(1000)),
        ("first 3, then 4.5.", Decimal("4.5")),
        ("none at all", None),
        ("#### ...", None),
        ("#### **-$1,200.50** for 3 tickets", Decimal("-1200.5")),
        ("between 10-12 %", Decimal(12)),
        ("x=\u22125, that is", Decimal(-5)),
        ("about 1.5e3 €", Decimal(1500)),
    ],
)
def test_the_number_of_an_answer(text: str, number: Decimal | None) -> None:
    assert scoring.number(text) == number


def test_numbers_are_compared_as_numbers() -> None:
    assert one("numeric", "The total is 1000.0", "work\n#### 1,000") == 1
    assert one("numeric", "#### 18 because 20-2", "#### 18") == 1
    assert one("numeric", "20", "#### 18") == 0
    assert one("numeric", "no idea", "no number") == 0
