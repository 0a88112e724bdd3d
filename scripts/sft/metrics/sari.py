"""SARI as in the `sari` metric of Hugging Face's evaluate: 0 to 100, sentences lower-cased, sacrebleu's 13a tokens.

Xu et al. 2016, "Optimizing Statistical Machine Translation for Text Simplification" (TACL 4, Q16-1029), with the two
changes of tensor2tensor's sari_hook.py that the Hugging Face metric took over: 0/0 counts as 1, and the recall of kept
n-grams is their number over all that should have been kept. docs/decisions/0005-rouge-and-sari.md says why this one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache

_ORDERS = (1, 2, 3, 4)


@lru_cache(maxsize=1 << 14)
def _grams(text: str) -> tuple[Counter[str], ...]:
    """The n-grams of the normalised text, one counter for each order. An empty text has the one word ""."""
    from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a

    words = Tokenizer13a()(text.lower()).split(" ")
    return tuple(Counter(" ".join(words[i : i + n]) for i in range(len(words) - n + 1)) for n in _ORDERS)


def _times(counts: Counter[str], factor: int) -> Counter[str]:
    return counts if factor == 1 else Counter({gram: count * factor for gram, count in counts.items()})


def _f1(precision: float, recall: float) -> float:
    return 2 * precision * recall / (precision + recall) if precision > 0 or recall > 0 else 0.0


def _kept(source: Counter[str], found: Counter[str], wanted: Counter[str]) -> float:
    kept = source & found
    good = kept & wanted
    should = source & wanted
    precision = sum(count / kept[gram] for gram, count in good.items()) / len(kept) if kept else 1.0
    recall = good.total() / should.total() if should else 1.0
    return _f1(precision, recall)


def _deleted(source: Counter[str], found: Counter[str], wanted: Counter[str]) -> float:
    gone = source - found
    good = gone - wanted
    return sum(count / gone[gram] for gram, count in good.items()) / len(gone) if gone else 1.0


def _added(source: Counter[str], found: Counter[str], wanted: Counter[str]) -> float:
    new = set(found) - set(source)
    should = set(wanted) - set(source)
    good = len(new & set(wanted))
    return _f1(good / len(new) if new else 1.0, good / len(should) if should else 1.0)


def sari(source: str, prediction: str, references: Sequence[str]) -> float:
    """The SARI of one sentence, 0 to 100: the mean over orders 1-4 of the F1 of added, the F1 of kept and the precision
    of deleted n-grams, against all references together."""
    repeated = len(references)
    all_wanted = [_grams(reference) for reference in references]
    keep, delete, add = [], [], []
    for order, (of_source, of_found) in enumerate(zip(_grams(source), _grams(prediction), strict=True)):
        wanted: Counter[str] = Counter()
        for grams in all_wanted:
            wanted.update(grams[order])
        source_counts, found_counts = _times(of_source, repeated), _times(of_found, repeated)
        keep.append(_kept(source_counts, found_counts, wanted))
        delete.append(_deleted(source_counts, found_counts, wanted))
        add.append(_added(of_source, of_found, wanted))
    orders = len(_ORDERS)
    return 100 * ((sum(keep) / orders + sum(delete) / orders + sum(add) / orders) / 3)
