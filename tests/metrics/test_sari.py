"""SARI against the published value of the paper's example, a sum worked out by hand, and its corner cases."""

from __future__ import annotations

import pytest

from sft.errors import DataError
from sft.metrics import score, score_rows

REFERENCES = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]
SOURCE = "About 95 species are currently accepted."


def test_the_papers_first_example_as_hugging_face_publishes_it() -> None:
    got = score(["sari"], ["About 95 you now get in."], [REFERENCES], [SOURCE])
    assert got["sari"] == pytest.approx(26.953601953601954, abs=1e-9)


def test_tokenised_and_plain_sentences_score_alike_and_case_does_not_matter() -> None:
    spaced = [[text.replace(".", " .") for text in REFERENCES]]
    got = score(["sari"], ["ABOUT 95 you now get in ."], spaced, [SOURCE.replace(".", " .")])
    assert got["sari"] == pytest.approx(26.953601953601954, abs=1e-9)


def test_a_perfect_copy_of_the_reference_scores_100() -> None:
    assert score(["sari"], [SOURCE], [SOURCE], [SOURCE])["sari"] == 100.0
    assert score(["sari"], ["a c"], ["a c"], ["a b"])["sari"] == 100.0


def test_a_sentence_worked_out_by_hand() -> None:
    # keep: (1/2 + 0 + 1 + 1) / 4; delete: (0 + 1 + 1 + 1) / 4; add: (1 + 0 + 0 + 1) / 4, where 0/0 is 1
    got = score(["sari"], ["a b d"], ["a c d"], ["a b c"])
    assert got["sari"] == pytest.approx(100 * (0.625 + 0.75 + 0.5) / 3)


def test_an_empty_answer_has_the_one_word_that_split_gives_it() -> None:
    # keep 0, 1, 1, 1; delete 1, 1, 1, 1; add: "" is new and wrong, then 0/0: 0, 1, 1, 1
    got = score(["sari"], [""], ["a"], ["a"])
    assert got["sari"] == pytest.approx(100 * ((0 + 3) / 4 + (0 + 3) / 4 + (0 + 3) / 4) / 3)


def test_rows_are_averaged_plainly() -> None:
    got = score_rows(["sari"], ["a c", "a b d"], ["a c", "a c d"], ["a b", "a b c"])
    assert got.rows["sari"] == pytest.approx([100.0, 62.5])
    assert got.means["sari"] == pytest.approx(81.25)


def test_without_a_source_it_says_so() -> None:
    with pytest.raises(DataError, match="sari compares with the source"):
        score(["sari"], ["a"], ["a"])
