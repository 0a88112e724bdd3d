"""Near duplicates: all pairs of texts whose runs of five words have a Jaccard similarity at or above a threshold.

Two sets can only be that similar if their rarest elements meet (the prefix filter of Bayardo et al. 2007, "Scaling up
all pairs similarity search"), so few pairs are compared, and every pair that is returned was compared exactly.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
# A word is a run of letters and digits; in scripts without spaces between words it is one character.
_NO_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
SHINGLE = 5  # words
BUCKET = 64  # texts that share a run of words: each is compared with so many before it, and with the first
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the multiplication is invertible


class WordHasher:
    """Turns texts into 64-bit hashes of their words; each different word is hashed once."""

    def __init__(self) -> None:
        self._hashes: dict[str, int] = {}

    def hashes(self, text: str) -> Hashes:
        """One hash a word of `text`, ignoring case and punctuation."""
        words, known = WORD.findall(text.lower()), self._hashes
        for word in set(words).difference(known):
            known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
        return np.array([known[word] for word in words], np.uint64)


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """One hash for each run of `length` words; of a shorter text, one for all of it."""
    length = max(1, min(length, len(words)))
    values = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for offset in range(length):
        values = values * _MULTIPLIER + words[offset : offset + len(values)]
    return values


class NearDuplicates:
    """Texts are added one by one; `pairs` then returns which of them are near duplicates."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._words = WordHasher()
        self._sets: list[Hashes] = []

    def add(self, text: str) -> None:
        """The next text; its number is how many came before it."""
        words = self._words.hashes(text)
        self._sets.append(np.unique(ngram_hashes(words if len(words) else np.zeros(1, np.uint64), SHINGLE)))

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(later, earlier) of every two texts at or above the threshold, in the order of the later one."""
        if not self._sets:
            return
        values, counts = np.unique(np.concatenate(self._sets), return_counts=True)
        texts_with: dict[int, list[int]] = {}
        for later, hashes in enumerate(self._sets):
            occurrences = counts[np.searchsorted(values, hashes)]
            rarest = np.lexsort((hashes, occurrences))[: len(hashes) - math.ceil(self.threshold * len(hashes)) + 1]
            candidates: set[int] = set()
            for value in hashes[rarest[occurrences[rarest] > 1]].tolist():
                texts = texts_with.setdefault(value, [])
                candidates.update(texts[:1], texts[-BUCKET:])
                texts.append(later)
            for earlier in sorted(candidates):
                shared = len(np.intersect1d(hashes, self._sets[earlier], assume_unique=True))
                if shared >= self.threshold * (len(hashes) + len(self._sets[earlier]) - shared):
                    yield later, earlier
