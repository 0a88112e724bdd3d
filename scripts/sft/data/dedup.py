"""Near duplicates: MinHash and LSH over runs of five words find candidate pairs, their true similarity decides.

Broder 1997, "On the resemblance and containment of documents"; bands as in Leskovec et al., "Mining of Massive
Datasets", section 3.4.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Hashes = NDArray[np.uint64]
# A word is a run of letters and digits; in scripts without spaces between words it is one character.
_NO_SPACES = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_NO_SPACES}]|[^\W_{_NO_SPACES}]+")
SHINGLE = 5  # words
SIGNATURE = 128  # hash functions
RECALL = 0.995  # share of the pairs at the threshold that LSH must find
MARGIN = 0.16  # below the threshold that an estimate may lie: over four standard deviations of 128 values at 0.8
BUCKET = 64  # rows of an LSH bucket that are all compared; in larger ones with the 64 before, and the first
BLOCK = 2_048  # texts hashed at a time
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that the multiplication is invertible


class WordHasher:
    """Turns texts into 64-bit hashes of their words; each different word is hashed once."""

    def __init__(self) -> None:
        self._hashes: dict[str, int] = {}

    def hashes(self, text: str) -> Hashes:
        """One hash a word of `text`, ignoring case and punctuation."""
        words = WORD.findall(text.lower())
        known = self._hashes
        try:
            return np.array([known[word] for word in words], np.uint64)
        except KeyError:
            for word in set(words).difference(known):
                known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
            return np.array([known[word] for word in words], np.uint64)


def ngram_hashes(words: Hashes, length: int) -> Hashes:
    """One hash for each run of `length` words; of a shorter text, one for all of it."""
    length = max(1, min(length, len(words)))
    values = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for offset in range(length):
        values = values * _MULTIPLIER + words[offset : offset + len(values)]
    return _mix_bits(values)


def _mix_bits(values: Hashes) -> Hashes:
    """splitmix64's finaliser: afterwards any part of the bits serves as a hash."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def lsh_bands(threshold: float) -> tuple[int, int]:
    """The fewest bands, and signature values in each, that find RECALL of the pairs at `threshold`."""
    for rows in range(SIGNATURE, 1, -1):
        if 1 - (1 - threshold**rows) ** (SIGNATURE // rows) >= RECALL:
            return SIGNATURE // rows, rows
    return SIGNATURE, 1


class MinHashIndex:
    """Texts are added one by one; `pairs` then returns which of them are near duplicates."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._words = WordHasher()
        self._shingles: list[Hashes] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._factors = _mix_bits(np.arange(1, SIGNATURE + 1, dtype=np.uint64)) | np.uint64(1)

    def add(self, text: str) -> None:
        """The next text; its number is how many came before it."""
        words = self._words.hashes(text)
        self._shingles.append(np.unique(ngram_hashes(words if len(words) else np.zeros(1, np.uint64), SHINGLE)))
        if len(self._shingles) % BLOCK == 0:
            self._sign(BLOCK)

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(later, earlier) of every two texts at or above the threshold, in the order of the later one."""
        self._sign(len(self._shingles) % BLOCK)
        if len(self._shingles) < 2:
            return
        signatures, sets = np.concatenate(self._signatures), dict[int, frozenset[int]]()
        candidates = _candidates(signatures, *lsh_bands(self.threshold))
        for part in np.array_split(candidates, len(candidates) // 65_536 + 1):
            estimates = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1)
            for later, earlier in part[estimates >= self.threshold - MARGIN].tolist():
                for number in {later, earlier}.difference(sets):
                    sets[number] = frozenset(self._shingles[number].tolist())
                shared = len(sets[later] & sets[earlier])  # over the union: Jaccard similarity
                if shared >= self.threshold * (len(sets[later]) + len(sets[earlier]) - shared):
                    yield later, earlier

    def _sign(self, count: int) -> None:
        """Signatures of the last `count` texts: for each hash function its least value over the shingles."""
        if not count:
            return
        shingles = self._shingles[-count:]
        values = np.concatenate(shingles)
        starts = np.cumsum([0, *(len(hashes) for hashes in shingles[:-1])])
        signatures = np.empty((count, SIGNATURE), np.uint32)
        for column, factor in enumerate(self._factors):
            hashed = ((values * factor) >> np.uint64(32)).astype(np.uint32)
            signatures[:, column] = np.minimum.reduceat(hashed, starts)
        self._signatures.append(signatures)


def _candidates(signatures: NDArray[np.uint32], bands: int, rows: int) -> NDArray[np.int64]:
    """Pairs (later, earlier) that agree in a whole band, each once, sorted; shape (pairs, 2)."""
    size = len(signatures)
    codes = [np.zeros(0, np.int64)]
    for band in range(bands):
        keys = np.zeros(size, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = _mix_bits(keys + signatures[:, column].astype(np.uint64) + np.uint64(1))
        order = np.argsort(keys, kind="stable")
        changes = np.r_[True, keys[order][1:] != keys[order][:-1]]
        first = np.maximum.accumulate(np.where(changes, np.arange(size), 0))  # of the bucket of each, in this order
        for step in range(1, min(size, BUCKET)):
            later = np.flatnonzero(first[step:] <= np.arange(size - step)) + step
            if not len(later):
                break
            codes.append(order[later] * size + order[later - step])
        far = np.flatnonzero(np.arange(size) - first >= BUCKET)
        codes.append(order[far] * size + order[first[far]])
    unique = np.unique(np.concatenate(codes))
    return np.stack([unique // size, unique % size], axis=1)
