"""The table of metrics: names, numbers of rows, the libraries behind some of them, and statistics of the text."""

from __future__ import annotations

import pytest

from sft.errors import ConfigError, DataError
from sft.metrics.scoring import check_names, constant_baseline, greater_is_better, score_rows
from sft.metrics.text import means, text_stats
from tests.metrics.helpers import score


def test_an_unknown_name_suggests_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="'rogueL' \\(did you mean rougeL\\?\\)"):
        check_names(["rogueL", "sari"])
    assert check_names(["rougeL", "sari", "rougeL"]) == ["rougeL", "sari"]
    with pytest.raises(ConfigError, match="removed"):
        check_names(["evaluate:meteor"])


def test_direction_of_each_metric() -> None:
    assert greater_is_better("rougeL") and greater_is_better("eval_stop_rate")
    assert not any(
        map(greater_is_better, ["loss", "eval_loss", "row_loss", "eval/perplexity", "repetition", "empty_rate"])
    )


def test_rows_must_match_in_number_and_have_a_reference() -> None:
    with pytest.raises(DataError, match="differ in number"):
        score(["rougeL"], ["a", "b"], ["a"])
    with pytest.raises(DataError, match="no reference answer") as error:
        score(["rougeL"], ["a", "b"], ["a", []])
    assert error.value.where == "row 2"


def test_bleu_and_chrf_as_hugging_face_publishes_them() -> None:
    hello = [["hello there general kenobi", "hello there !"], ["foo bar foobar"]]
    assert score(["bleu"], ["hello there general kenobi", "foo bar foobar"], hello)["bleu"] == pytest.approx(100)
    cats = [
        "The relationship between cats and dogs is not exactly friendly.",
        "a good bookshop is just a genteel black hole that knows how to read.",
    ]
    dogs = [
        "The relationship between dogs and cats is not exactly friendly.",
        "A good bookshop is just a genteel Black Hole that knows how to read.",
    ]
    got = score_rows(["chrf"], cats, dogs)
    assert got.means["chrf"] == pytest.approx(84.64214891738334)
    assert len(got.rows["chrf"]) == 2


def test_the_statistics_of_answers() -> None:
    # 3-grams of the first answer: 5, of which "a b a" and "b a b" are each there again
    stats = means(text_stats(["a b a b a b a", "", "one two"], stopped=[False, True, True], tokens=[9, 0, 3]))
    assert stats == pytest.approx(
        {
            "length_words": 3.0,
            "repetition": (1 - 2 / 5) / 3,
            "empty_rate": 1 / 3,
            "length_tokens": 4.0,
            "stop_rate": 2 / 3,
        }
    )


def test_the_best_constant_answer() -> None:
    training = ["yes", "no", "yes", "the order has been sent", "the order has been sent today"]
    references = ["the order has been sent", "the order has been lost", "the order has been kept", "no", "no"]
    best = constant_baseline(training, references)
    assert best is not None
    assert best.pop("answer") == "the order has been sent"
    assert best == pytest.approx({"rougeL": (1 + 0.8 + 0.8) / 5, "exact_match": 0.4})
    assert constant_baseline([], references) is None
