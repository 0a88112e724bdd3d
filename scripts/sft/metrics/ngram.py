"""ROUGE as rouge-score computes it (F-measure, 0 to 1), and SARI as `evaluate` computes it (0 to 100).

docs/decisions/0005-rouge-and-sari.md has the definitions and the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache
from typing import Any


@cache
def _rouge_tokenizer(stemmer: bool) -> Any:
    from rouge_score.tokenizers import DefaultTokenizer

    return DefaultTokenizer(use_stemmer=stemmer)


@lru_cache(maxsize=1 << 14)
def rouge_tokens(text: str, stemmer: bool = False) -> tuple[str, ...]:
    """Lower-case runs of a-z and 0-9; everything else separates (so Chinese or Arabic text has no tokens at all)."""
    return tuple(_rouge_tokenizer(stemmer).tokenize(text))


@cache
def _rouge_scorer(kind: str, stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], tokenizer=_rouge_tokenizer(stemmer))


def rouge(kind: str, prediction: str, references: Sequence[str], *, stemmer: bool = False) -> float:
    """The F-measure of `kind`: rouge1 to rouge9, rougeL, or rougeLsum, for which each line is a sentence.

    Of several references the best counts (rouge-score's `score_multi`).
    """
    if kind != "rougeL":
        return float(_rouge_scorer(kind, stemmer).score_multi(references, prediction)[kind].fmeasure)
    tokens, best = rouge_tokens(prediction, stemmer), 0.0
    for target in (rouge_tokens(reference, stemmer) for reference in references):
        common = lcs_length(target, tokens)
        best = max(best, _f1(common / max(len(tokens), 1), common / max(len(target), 1)))
    return best


def lcs_length(first: Sequence[str], second: Sequence[str]) -> int:
    """The length of the longest common subsequence, some hundred times as fast as rouge-score's table in Python.

    Source: Hyyrö 2004, "Bit-parallel LCS-length computation revisited": a row of the table in one operation.
    """
    masks: dict[str, int] = {}
    for position, token in enumerate(first):
        masks[token] = masks.get(token, 0) | 1 << position
    full = (1 << len(first)) - 1
    row = full
    for token in second:
        hits = row & masks.get(token, 0)
        row = (row + hits | row - hits) & full
    return len(first) - row.bit_count()


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


@cache
def _sari_tokenizer() -> Any:
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    return Tokenizer13a()


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """The SARI of one sentence, 0 to 100: the mean over orders 1-4 of the F1 of added, the F1 of kept and the precision
    of deleted n-grams, against all references together (Xu et al. 2016; 0/0 counts as 1)."""
    words = [_sari_tokenizer()(text.lower()).split(" ") for text in (source, prediction, *references)]
    total = 0.0
    for n in (1, 2, 3, 4):
        grams = [Counter(zip(*(text[at:] for at in range(n)), strict=False)) for text in words]
        expected = Counter[Any]()
        for counts in grams[2:]:
            expected.update(counts)
        # the references are counted together, so the source's and the answer's n-grams count once for each of them
        before, after = (Counter({gram: c * len(references) for gram, c in counts.items()}) for counts in grams[:2])
        total += _keep(before, after, expected)
        total += _delete(before, after, expected)
        total += _add(after.keys() - before.keys(), expected.keys() - before.keys())
    return 100 * total / 12


def _keep(source: Counter[Any], answer: Counter[Any], references: Counter[Any]) -> float:
    both, possible = source & answer, (source & references).total()
    correct = both & references
    precision = sum(correct[gram] / both[gram] for gram in correct) / len(both) if both else 1.0
    return _f1(precision, correct.total() / possible if possible else 1.0)


def _delete(source: Counter[Any], answer: Counter[Any], references: Counter[Any]) -> float:
    deleted = source - answer
    correct = deleted - references
    return sum(correct[gram] / deleted[gram] for gram in correct) / len(deleted) if deleted else 1.0


def _add(added: set[Any], expected: set[Any]) -> float:
    correct = len(added & expected)
    return _f1(correct / len(added) if added else 1.0, correct / len(expected) if expected else 1.0)
