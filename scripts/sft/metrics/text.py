"""Statistics of answers that need no reference, and the tags of rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def tags_of(row: Mapping[str, Any]) -> list[str]:
    """The tags of a row: its `tags`, `tag` and `category`, each one text or a list of them."""
    tags: list[str] = []
    for key in ("tags", "tag", "category"):
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        tags += [str(tag) for tag in values if isinstance(tag, str | int) and str(tag).strip()]
    return list(dict.fromkeys(tags))


def words(text: str) -> float:
    """The number of words, split at whitespace."""
    return float(len(text.split()))


def repetition(text: str, n: int = 3) -> float:
    """The share of word n-grams that occurred before in the answer: 1 - distinct / all; 0 below n words."""
    split = text.split()
    grams = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def empty(text: str) -> float:
    """1 when there is nothing but whitespace."""
    return float(not text.strip())


def mean(values: Sequence[float]) -> float:
    """The plain mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def means(values: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The mean of each metric's values."""
    return {name: mean(of_rows) for name, of_rows in values.items()}


def text_stats(
    predictions: Sequence[str], *, stopped: Sequence[bool] | None = None, tokens: Sequence[int] | None = None
) -> dict[str, list[float]]:
    """Of each answer: its words, repeated 3-grams and whether it is empty; where they are known, its length in tokens
    and whether it stopped by itself."""
    stats = {
        "length_words": [words(text) for text in predictions],
        "repetition": [repetition(text) for text in predictions],
        "empty_rate": [empty(text) for text in predictions],
    }
    if tokens is not None:
        stats["length_tokens"] = [float(count) for count in tokens]
    if stopped is not None:
        stats["stop_rate"] = [float(flag) for flag in stopped]
    return stats
