"""SARI as in the `sari` metric of Hugging Face's evaluate: 0 to 100, sentences lower-cased, sacrebleu's 13a tokens.

Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification" (TACL 4, Q16-1029), with the two
changes of tensor2tensor's sari_hook.py that the Hugging Face metric took over: 0/0 counts as 1, and the recall of kept
n-grams is their number over all that should have been kept. docs/decisions/0005-rouge-and-sari.md says why this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache, lru_cache
from typing import Any

_ORDERS = (1, 2, 3, 4)


@cache
def _rules() -> Any:
    from sacrebleu.tokenizers.tokenizer_re import TokenizerRegexp

    return TokenizerRegexp()


@lru_cache(maxsize=1 << 16)
def _cut(word: str) -> list[str]:
    return list(_rules()(f" {word} ").split())


def tokens(text: str) -> list[str]:
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
    asked, said, *due = (tokens(text.lower()) for text in (source, prediction, *references))
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
