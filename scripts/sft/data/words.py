"""Texts as numbers: each word a 64-bit hash, each run of words one more, so that texts are compared with numpy."""

from __future__ import annotations

import hashlib
import re

import numpy as np
from numpy.typing import NDArray

from sft.data.records import Row, is_rendered, messages

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
