"""SARI against the published value of the paper's example, a sum worked out by hand, and its corner cases."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

from sft.errors import DataError
from sft.metrics.scoring import score_rows
from tests.metrics.helpers import score

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


def test_an_empty_answer_counts_as_one_empty_token() -> None:
    # keep 0, 1, 1, 1; delete 1, 1, 1, 1; add: "" is new and wrong, then 0/0: 0, 1, 1, 1
    got = score(["sari"], [""], ["a"], ["a"])
    assert got["sari"] == pytest.approx(100 * ((0 + 3) / 4 + (0 + 3) / 4 + (0 + 3) / 4) / 3)


def test_rows_are_averaged_plainly() -> None:
    got = score_rows(["sari"], ["a c", "a b d"], ["a c", "a c d"], ["a b", "a b c"])
    assert got.rows["sari"] == pytest.approx([100.0, 62.5])
    assert got.means["sari"] == pytest.approx(81.25)


def test_sari_without_a_source_is_an_error() -> None:
    with pytest.raises(DataError, match="sari compares with the source"):
        score(["sari"], ["a"], ["a"])


def published(source: str, prediction: str, references: list[str]) -> float:
    """The metric worked out anew from its description (Xu et al. 2016; tensor2tensor's sari_hook): multisets of
    n-grams, the source's and the answer's counted once for each reference, and 0/0 taken as 1."""

    def grams(text: str, n: int) -> list[str]:
        words = Tokenizer13a()(text.lower()).split(" ")
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    def f1(a: float, b: float) -> float:
        return 2 * a * b / (a + b) if a + b else 0.0

    total = 0.0
    for n in range(1, 5):
        in_answer, in_source = grams(prediction, n), grams(source, n)
        in_references = [gram for reference in references for gram in grams(reference, n)]
        r = len(references)
        keep_precision, keep_correct, keep_count, should = 0.0, 0, 0, 0
        gone_good, gone = 0.0, 0
        for gram in set(in_source):
            of_source, of_answer, of_reference = (
                in_source.count(gram) * r,
                in_answer.count(gram) * r,
                in_references.count(gram),
            )
            keeps, drops = min(of_source, of_answer), max(0, of_source - of_answer)
            if keeps:
                keep_count += 1
                keep_precision += min(keeps, of_reference) / keeps
                keep_correct += min(keeps, of_reference)
            should += min(of_source, of_reference)
            if drops:
                gone += 1
                gone_good += max(0, drops - of_reference) / drops
        keep = f1(keep_precision / keep_count if keep_count else 1.0, keep_correct / should if should else 1.0)
        delete = gone_good / gone if gone else 1.0
        new, due = set(in_answer) - set(in_source), set(in_references) - set(in_source)
        add = f1(len(new & due) / len(new) if new else 1.0, len(new & due) / len(due) if due else 1.0)
        total += (keep + delete + add) / 3
    return 100 * total / 4


WORDS = "the The cat cats on, a 3.5 $4 Über 日本 ? - x..5 1., 2-3 &amp;quot; <skip<skipped>ped> -\n \xa0.".split(" ")
SENTENCES = st.lists(st.sampled_from(WORDS), max_size=12).map(" ".join)


@settings(max_examples=150, deadline=None)
@given(SENTENCES, SENTENCES | st.text(max_size=20), st.lists(SENTENCES | st.text(max_size=20), min_size=1, max_size=3))
def test_every_sentence_scores_as_described(source: str, prediction: str, references: list[str]) -> None:
    got = score(["sari"], [prediction], [references], [source])["sari"]
    assert got == pytest.approx(published(source, prediction, references), abs=1e-9)
