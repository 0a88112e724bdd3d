"""ROUGE exactly as rouge-score computes it (F-measure, 0 to 1), only faster, and SARI as `evaluate` computes it.

ROUGE's tokens come from rouge-score; the longest common subsequence is counted with the bit-parallel recurrence of
Hyyrö (2004, "Bit-parallel LCS-length computation revisited"), one machine word operation for 64 cells of the table
that rouge-score fills cell by cell. docs/decisions/0005-rouge-and-sari.md has the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any


@cache
def _rouge_tokenizer(stemmer: bool) -> Callable[[str], list[str]]:
    if not stemmer:
        from rouge_score import tokenize  # without the 0.2 s that its stemmer's library takes to load

        return lambda text: list(tokenize.tokenize(text, None))
    from rouge_score import tokenizers

    return tokenizers.DefaultTokenizer(use_stemmer=True).tokenize  # type: ignore[no-any-return]


@lru_cache(maxsize=1 << 14)
def rouge_tokens(text: str, stemmer: bool = False) -> tuple[str, ...]:
    """Lower-case runs of a-z and 0-9; everything else separates (so Chinese or Arabic text has no tokens at all)."""
    return tuple(_rouge_tokenizer(stemmer)(text))


@cache
def _rouge_scorer(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=stemmer)


def rouge(kind: str, prediction: str, references: Sequence[str], *, stemmer: bool = False) -> float:
    """The F-measure of `kind`: rouge1 to rouge9, rougeL, or rougeLsum, for which each line is a sentence.

    Of several references the best counts (rouge-score's `score_multi`).
    """
    if kind == "rougeLsum":
        if any("\n" in text for text in (prediction, *references)):
            return float(_rouge_scorer(stemmer).score_multi(references, prediction)[kind].fmeasure)
        kind = "rougeL"  # equal for texts of one line
    tokens = rouge_tokens(prediction, stemmer)
    targets = [rouge_tokens(reference, stemmer) for reference in references]
    if kind == "rougeL":
        return max(_f1(lcs_length(target, tokens), len(tokens), len(target)) for target in targets)
    n = int(kind[5:])
    grams = _ngrams(tokens, n)
    scores = []
    for target_grams in (_ngrams(target, n) for target in targets):
        scores.append(_f1((grams & target_grams).total(), grams.total(), target_grams.total()))
    return max(scores)


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence."""
    masks: dict[str, int] = {}
    for position, token in enumerate(first):
        masks[token] = masks.get(token, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        hits = row & masks.get(token, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


def _ngrams(words: Sequence[str], n: int) -> Counter[Any]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False) if n > 1 else words)


def _f1(common: int, predicted: int, expected: int) -> float:
    return _harmonic(common / max(predicted, 1), common / max(expected, 1))


def _harmonic(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@cache
def _sacrebleu_rules() -> Any:
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    return TokenizerRegexp()


@lru_cache(maxsize=1 << 16)
def _split_word(word: str) -> list[str]:
    return list(_sacrebleu_rules()(f" {word} ").split())


def sari_tokens(text: str) -> list[str]:
    """sacrebleu's Tokenizer13a, whose rules never span white space: each word is split once and cached. An empty text
    has the one token ""."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        for name, character in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(name, character)
    return [token for word in text.split() for token in _split_word(word)] or [""]


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """The SARI of one sentence, 0 to 100: the mean over orders 1-4 of the F1 of added, the F1 of kept and the precision
    of deleted n-grams, against all references together (Xu et al. 2016; 0/0 counts as 1)."""
    source_words, answer_words, *reference_words = (
        sari_tokens(text.lower()) for text in (source, prediction, *references)
    )
    keep, delete, add = [], [], []
    for n in (1, 2, 3, 4):
        of_source, of_answer = _ngrams(source_words, n), _ngrams(answer_words, n)
        of_references = _ngrams(reference_words[0], n)
        for words in reference_words[1:]:
            of_references.update(_ngrams(words, n))
        keep_score, delete_score = _keep_and_delete(of_source, of_answer, of_references, len(reference_words))
        keep.append(keep_score)
        delete.append(delete_score)
        add.append(_add(of_source, of_answer, of_references))
    return 100 * ((sum(keep) / 4 + sum(delete) / 4 + sum(add) / 4) / 3)


def _keep_and_delete(
    source: Mapping[Any, int], answer: Mapping[Any, int], references: Mapping[Any, int], count: int
) -> tuple[float, float]:
    """The F1 of kept and the precision of deleted n-grams. `references` sums `count` texts, so the source's and the
    answer's n-grams count as often."""
    precision_sum = delete_sum = 0.0
    keep_count = correct = possible = deleted = 0
    for gram, occurrences in source.items():
        in_source, in_answer = occurrences * count, answer.get(gram, 0) * count
        in_references = references.get(gram, 0)
        if in_references:
            possible += in_references if in_references < in_source else in_source
        if in_answer:
            both = in_answer if in_answer < in_source else in_source
            right = in_references if in_references < both else both
            keep_count, correct, precision_sum = keep_count + 1, correct + right, precision_sum + right / both
        if in_source > in_answer:
            deleted += 1
            if in_source - in_answer > in_references:
                delete_sum += (in_source - in_answer - in_references) / (in_source - in_answer)
    keep = _harmonic(precision_sum / keep_count if keep_count else 1.0, correct / possible if possible else 1.0)
    return keep, delete_sum / deleted if deleted else 1.0


def _add(source: Mapping[Any, int], answer: Mapping[Any, int], references: Mapping[Any, int]) -> float:
    added, expected = answer.keys() - source.keys(), references.keys() - source.keys()
    correct = len(added & references.keys())
    return _harmonic(correct / len(added) if added else 1.0, correct / len(expected) if expected else 1.0)
