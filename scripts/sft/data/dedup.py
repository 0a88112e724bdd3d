"""Texts as numbers: each word a 64-bit hash, each run of words one more, so that texts are compared with numpy."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from sft.data.rows import Row, is_rendered, messages

Hashes = NDArray[np.uint64]
# A word is a run of letters and digits; a character is a word in scripts that put no space between words.
_ALONE = "\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_ALONE}]|[^\W_{_ALONE}]+")
STEP = np.uint64(0x9E3779B97F4A7C15)  # odd: an invertible multiplier, so no word's hash is lost


class Words:
    """Hashes the words of texts; each different word is hashed once."""

    def __init__(self) -> None:
        self._known: dict[str, int] = {}

    def hashes(self, text: str) -> list[int]:
        """One hash a word of `text`, capitals and punctuation aside."""
        known = self._known
        found = WORD.findall(text.lower())
        try:
            return [known[word] for word in found]
        except KeyError:
            for word in found:
                if word not in known:
                    known[word] = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "big")
            return [known[word] for word in found]


def runs(words: Hashes, length: int) -> Hashes:
    """A hash for each run of `length` words; for a text that is shorter, one for all of it."""
    length = max(1, min(length, len(words)))
    made = np.zeros(max(0, len(words) - length + 1), np.uint64)
    for offset in range(length):
        made = made * STEP + words[offset : offset + len(made)]
    return mixed(made)


def mixed(values: Hashes) -> Hashes:
    """Bits stirred (splitmix64's finaliser), so that any part of them serves as a hash."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def text_of(row: Row) -> str:
    """What a row is compared by: all its turns but the system text, which many rows share."""
    if is_rendered(row):
        return f"{row['input']}\n{row['target']}"
    return "\n".join(str(turn["content"] or "") for turn in messages(row) if turn["role"] != "system")


SHINGLE = 5  # words
SIZE = 128  # values of a signature
RECALL = 0.995  # of the pairs at the threshold, by LSH
SLACK = 0.16  # below the threshold by which an estimate may lie: over four standard deviations of 128 values at 0.8
BUCKET = 64  # rows of a bucket that are all compared with each other; in larger ones with so many before, and the first
BLOCK = 2_048  # rows hashed at a time


def bands(threshold: float) -> tuple[int, int]:
    """Number of bands and values in each."""
    for rows in range(SIZE, 1, -1):
        if 1 - (1 - threshold**rows) ** (SIZE // rows) >= RECALL:
            return SIZE // rows, rows
    return SIZE, 1


class Index:
    """Takes texts one by one; `pairs` then tells which are near duplicates."""

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._words = Words()
        self._shingles: list[Hashes] = []
        self._signatures: list[NDArray[np.uint32]] = []
        self._waiting: list[Hashes] = []
        self._sets: dict[int, frozenset[int]] = {}
        self._factors = mixed(np.arange(1, SIZE + 1, dtype=np.uint64)) | np.uint64(1)

    def __len__(self) -> int:
        return len(self._shingles)

    def add(self, text: str) -> None:
        """The next text; its number is how many came before it."""
        shingles = np.unique(runs(np.array(self._words.hashes(text) or [0], np.uint64), SHINGLE))
        self._shingles.append(shingles)
        self._waiting.append(shingles)
        if len(self._waiting) == BLOCK:
            self._sign()

    def pairs(self) -> Iterator[tuple[int, int]]:
        """(later, earlier) of every two texts at or above the threshold, in the order of the later one."""
        self._sign()
        if len(self) < 2:
            return
        signatures = np.concatenate(self._signatures)
        found = _candidates(signatures, *bands(self.threshold))
        near = np.zeros(len(found), bool)
        for start in range(0, len(found), 1 << 16):
            part = found[start : start + (1 << 16)]
            same = (signatures[part[:, 0]] == signatures[part[:, 1]]).mean(axis=1)
            near[start : start + (1 << 16)] = same >= self.threshold - SLACK
        for later, earlier in found[near].tolist():
            if self.similarity(later, earlier) >= self.threshold:
                yield later, earlier

    def similarity(self, one: int, other: int) -> float:
        """The Jaccard similarity of two texts by their shingles, 0-1."""
        first, second = self._set(one), self._set(other)
        both = len(first & second)
        return both / (len(first) + len(second) - both)

    def _set(self, number: int) -> frozenset[int]:
        if number not in self._sets:
            self._sets[number] = frozenset(self._shingles[number].tolist())
        return self._sets[number]

    def _sign(self) -> None:
        """Signatures of the texts that wait: for each of SIZE hash functions the least value over the shingles."""
        if not self._waiting:
            return
        values = np.concatenate(self._waiting)
        starts = np.cumsum([0, *(len(one) for one in self._waiting[:-1])])
        made = np.empty((len(self._waiting), SIZE), np.uint32)
        for column, factor in enumerate(self._factors):
            hashed = ((values * factor) >> np.uint64(32)).astype(np.uint32)
            made[:, column] = np.minimum.reduceat(hashed, starts)
        self._signatures.append(made)
        self._waiting = []


def _candidates(signatures: NDArray[np.uint32], count: int, rows: int) -> NDArray[np.int64]:
    """Pairs (later, earlier) that agree in a whole band, each once, sorted."""
    size = len(signatures)
    found: list[NDArray[np.int64]] = []
    for band in range(count):
        keys = np.zeros(size, np.uint64)
        for column in range(band * rows, (band + 1) * rows):
            keys = mixed(keys + signatures[:, column].astype(np.uint64) + np.uint64(1))
        found.append(np.unique(_meetings(keys)))
    codes = np.unique(np.concatenate(found))
    return np.stack([codes // size, codes % size], axis=1)


def _meetings(keys: Hashes) -> NDArray[np.int64]:
    """Codes (later * size + earlier) of rows with equal keys."""
    size = len(keys)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    first = np.maximum.accumulate(np.where(np.r_[True, ordered[1:] != ordered[:-1]], np.arange(size), 0))
    made = [np.zeros(0, np.int64)]
    for step in range(1, min(size, BUCKET)):
        meets = np.flatnonzero(first[step:] <= np.arange(size - step)) + step
        if not len(meets):
            break
        made.append(order[meets] * size + order[meets - step])
    far = np.flatnonzero(np.arange(size) - first >= BUCKET)
    made.append(order[far] * size + order[first[far]])
    return np.concatenate(made)
