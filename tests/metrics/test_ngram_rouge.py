"""ROUGE against the values that rouge-score and Hugging Face publish, and against rouge-score itself on odd texts."""

from __future__ import annotations

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rouge_score import rouge_scorer

from sft.metrics import ngram
from sft.metrics.scoring import score_rows
from tests.metrics.helpers import score

FOX = "The quick brown fox jumps over the lazy dog"
LOG = "The quick brown dog jumps on the log."


def test_the_example_of_rouge_scores_readme() -> None:
    # README: rouge1 precision 6/8, recall 6/9; rougeL precision 5/8, recall 5/9
    got = score(["rouge1", "rougeL"], [LOG], [FOX])
    assert got == pytest.approx({"rouge1": 12 / 17, "rougeL": 10 / 17}, abs=1e-12)


def test_the_examples_of_the_hugging_face_metric_card() -> None:
    got = score_rows(["rouge1", "rouge2", "rougeL"], ["hello goodbye", "ankh morpork"], ["goodbye", "general kenobi"])
    assert got.means == pytest.approx({"rouge1": 1 / 3, "rouge2": 0.0, "rougeL": 1 / 3})
    assert got.rows["rougeL"] == pytest.approx([2 / 3, 0.0])
    several = score(
        ["rouge1", "rouge2", "rougeL"],
        ["hello there", "general kenobi"],
        [["hello", "there"], ["general kenobi", "general yoda"]],
    )
    assert several == pytest.approx({"rouge1": 5 / 6, "rouge2": 0.5, "rougeL": 5 / 6})


def test_the_stemmer_is_off_by_default() -> None:
    assert score(["rougeL"], ["the cat was running"], ["the cats were runs"])["rougeL"] == pytest.approx(0.25)
    stemmed = score(["rougeL"], ["the cat was running"], ["the cats were runs"], stemmer=True)
    assert stemmed["rougeL"] == pytest.approx(0.75)


def test_the_mean_over_rows_is_plain() -> None:
    got = score(["rougeL"], ["a b c d", "a"], ["a b c d", "x y z"])
    assert got["rougeL"] == 0.5


def test_empty_texts_score_nothing() -> None:
    assert score(["rouge1", "rouge2", "rougeL"], ["", "a"], ["a", ""]) == {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}


WORDS = st.lists(st.sampled_from("a b cat cats running Über 12 3.5 日本 - x_y \n".split(" ")), max_size=90).map(
    " ".join
)


@settings(max_examples=80, deadline=None)
@given(WORDS | st.text(max_size=40), st.lists(WORDS | st.text(max_size=40), min_size=1, max_size=3), st.booleans())
def test_every_row_is_what_rouge_score_gives(prediction: str, references: list[str], stemmer: bool) -> None:
    kinds = ["rouge1", "rouge2", "rouge3", "rougeL", "rougeLsum"]
    theirs = rouge_scorer.RougeScorer(kinds, use_stemmer=stemmer).score_multi(references, prediction)
    ours = {kind: ngram.rouge(kind, prediction, references, stemmer=stemmer) for kind in kinds}
    assert ours == {kind: theirs[kind].fmeasure for kind in kinds}


def test_text_without_latin_letters_gets_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    logging.getLogger("sft").propagate = True
    assert score(["rougeL"], ["你好"], ["你好"]) == {"rougeL": 0.0}
    assert "use chrf" in caplog.text
