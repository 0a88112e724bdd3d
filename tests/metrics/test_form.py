"""The form of an answer, and scores by tag."""

from __future__ import annotations

import pytest

from sft.errors import ConfigError
from sft.metrics.scoring import by_tag, compiled, form, score_rows
from sft.metrics.text import tags_of
from tests.metrics.helpers import score


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": [1]}', "json"), ("[1, 2]", "json"), ("{broken", "line"), (" $1,200.50 ", "number"), ("7 days", "line"),
        ("```py\nx\n```", "code"), ("- a\n- b", "list"), ("1. a\n\n2) b", "list"), ("- a", "line"), ("a\nb", "lines"),
        ("|a|b|\n|-|-|", "table"), ("1 | hat | Tuesday", "3 fields"), (" \n", "nothing"), ("日本", "line"),
    ],
)  # fmt: skip
def test_the_form_of_a_text(text: str, expected: str) -> None:
    assert form(text) == expected


def test_adherence_is_to_the_pattern_or_to_the_form_of_a_reference() -> None:
    answers, references = ['{"x": 1}', "some words", "5"], [['{"y": 2}'], ["12"], ["a sentence", "6"]]
    assert score(["format_adherence"], answers, references) == {"format_adherence": pytest.approx(2 / 3)}
    pattern = compiled(r"\d+|some.*")
    assert score(["format_adherence"], answers, references, pattern=pattern)["format_adherence"] == pytest.approx(2 / 3)
    with pytest.raises(ConfigError, match="not a regular expression"):
        compiled("(")


def test_a_row_counts_for_each_of_its_tags() -> None:
    tags = [tags_of({"tags": ["a", "b"], "category": "b"}), tags_of({"tag": "a"}), tags_of({"tags": None, "tag": " "})]
    assert tags == [["a", "b"], ["a"], []]
    scores = score_rows(["exact_match"], ["x", "y", "z"], ["x", "n", "z"])
    assert by_tag(tags, scores, ["x", "y", "z"], [["x"], ["n"], ["z"]]) == {
        "a": {"rows": 2, "exact_match": 0.5}, "b": {"rows": 1, "exact_match": 1.0},
    }  # fmt: skip
