"""ROUGE-1, ROUGE-2, ROUGE-L and ROUGE-Lsum exactly as rouge-score gives them (F-measure, 0 to 1), only faster.

The tokens come from rouge-score itself; the longest common subsequence is counted with the bit-parallel recurrence of
Hyyrö (2004, "Bit-parallel LCS-length computation revisited"), one machine word operation for 64 cells of the table that
rouge-score fills cell by cell. docs/decisions/0005-rouge-and-sari.md has the reasons.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache, lru_cache
from typing import Any


@lru_cache(maxsize=2)
def _tokenizer(stemmer: bool) -> Callable[[str], list[str]]:
    if not stemmer:
        from rouge_score import tokenize  # without the 0.2 s that its stemmer's library takes to load

        return lambda text: list(tokenize.tokenize(text, None))
    from rouge_score import tokenizers

    return tokenizers.DefaultTokenizer(use_stemmer=True).tokenize  # type: ignore[no-any-return]


@lru_cache(maxsize=1 << 14)
def tokens(text: str, stemmer: bool = False) -> tuple[str, ...]:
    """Lower-case runs of a-z and 0-9; everything else separates (so Chinese or Arabic text has no tokens at all)."""
    return tuple(_tokenizer(stemmer)(text))


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


def _fmeasure(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _rouge_l(target: tuple[str, ...], found: tuple[str, ...]) -> float:
    if not target or not found:
        return 0.0
    common = lcs_length(target, found)
    return _fmeasure(common / len(found), common / len(target))


def _ngrams(words: tuple[str, ...], n: int) -> Counter[tuple[str, ...]]:
    return Counter(words[i : i + n] for i in range(len(words) - n + 1))


def _rouge_n(target: tuple[str, ...], found: tuple[str, ...], n: int) -> float:
    wanted, had = _ngrams(target, n), _ngrams(found, n)
    common = (wanted & had).total()
    return _fmeasure(common / max(had.total(), 1), common / max(wanted.total(), 1))


@lru_cache(maxsize=2)
def _by_line(stemmer: bool) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeLsum"], use_stemmer=stemmer)


def rouge(kind: str, prediction: str, references: Sequence[str], *, stemmer: bool = False) -> float:
    """The F-measure of `kind` (rouge1 to rouge9, rougeL, and rougeLsum, for which each line is a sentence); of several
    references the best (`score_multi`)."""
    if kind == "rougeLsum":
        if any("\n" in text for text in (prediction, *references)):
            return float(_by_line(stemmer).score_multi(references, prediction)[kind].fmeasure)
        kind = "rougeL"  # the same for texts of one line
    found = tokens(prediction, stemmer)
    targets = [tokens(reference, stemmer) for reference in references]
    if kind == "rougeL":
        return max(_rouge_l(target, found) for target in targets)
    return max(_rouge_n(target, found, int(kind[5:])) for target in targets)


_ORDERS = (1, 2, 3, 4)


@cache
def _rules() -> Any:
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    return TokenizerRegexp()


@lru_cache(maxsize=1 << 16)
def _cut(word: str) -> list[str]:
    return list(_rules()(f" {word} ").split())


def sari_tokens(text: str) -> list[str]:
    """sacrebleu's Tokenizer13a, whose rules never reach over white space: so each word is cut once. An empty text has
    the one token ""."""
    text = text.replace("<skipped>", "").replace("-\n", "")
    if "&" in text:
        for name, letter in (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">")):
            text = text.replace(name, letter)
    return [token for word in text.split() for token in _cut(word)] or [""]


def _grams(words: Sequence[str], n: int) -> Counter[Any]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False) if n > 1 else words)


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision > 0 or recall > 0 else 0.0


def _kept_and_deleted(
    source: Mapping[Any, int], found: Mapping[Any, int], wanted: Mapping[Any, int], references: int
) -> tuple[float, float]:
    """The F1 of kept and the precision of deleted n-grams; the source's and the answer's count once a reference."""
    precise = gone_right = 0.0
    kept = good = due = gone = 0
    for gram, count in source.items():
        asked, had, want = count * references, found.get(gram, 0) * references, wanted.get(gram, 0)
        if want:
            due += want if want < asked else asked
        if had:
            keeps = had if had < asked else asked
            right = want if want < keeps else keeps
            kept, good, precise = kept + 1, good + right, precise + right / keeps
        if asked > had:
            gone += 1
            if asked - had > want:
                gone_right += (asked - had - want) / (asked - had)
    keep = _f1(precise / kept if kept else 1.0, good / due if due else 1.0)
    return keep, gone_right / gone if gone else 1.0


def _added(source: Mapping[Any, int], found: Mapping[Any, int], wanted: Mapping[Any, int]) -> float:
    new = found.keys() - source.keys()
    should = wanted.keys() - source.keys()
    good = len(new & wanted.keys())
    return _f1(good / len(new) if new else 1.0, good / len(should) if should else 1.0)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """The SARI of one sentence, 0 to 100: the mean over orders 1-4 of the F1 of added, the F1 of kept and the precision
    of deleted n-grams, against all references together."""
    asked, said, *due = (sari_tokens(text.lower()) for text in (source, prediction, *references))
    keep, delete, add = [], [], []
    for n in _ORDERS:
        of_source, found, wanted = _grams(asked, n), _grams(said, n), _grams(due[0], n)
        for other in due[1:]:
            wanted.update(_grams(other, n))
        kept, deleted = _kept_and_deleted(of_source, found, wanted, len(due))
        keep.append(kept)
        delete.append(deleted)
        add.append(_added(of_source, found, wanted))
    orders = len(_ORDERS)
    return 100 * ((sum(keep) / orders + sum(delete) / orders + sum(add) / orders) / 3)
