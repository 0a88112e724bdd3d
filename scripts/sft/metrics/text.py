"""The tags of rows, by which scores are told apart: which kinds of rows a model is good at."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sft.errors import DataError

KEYS = ("tags", "tag", "category")


def of(row: Mapping[str, Any]) -> list[str]:
    """The tags of a row: its `tags`, `tag` and `category`, each one text or a list of them."""
    found: list[str] = []
    for key in KEYS:
        value = row.get(key)
        values = value if isinstance(value, list) else [value]
        found += [str(one) for one in values if isinstance(one, str | int) and str(one).strip()]
    return list(dict.fromkeys(found))


def places(tagged: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """{tag: the rows that have it}, sorted by tag. tagged: each row's tags."""
    groups: dict[str, list[int]] = {}
    for index, names in enumerate(tagged):
        for name in names:
            groups.setdefault(name, []).append(index)
    return dict(sorted(groups.items()))


def text_of(path: Path, what: str) -> str:
    """The text of a file, without a byte-order mark. what: as in "predictions file". Raises DataError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"there is no such {what}", where=str(path), fix="name another: see --help") from None
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the {what} cannot be read: {error}", where=str(path)) from None


def rows(text: str, path: Path, shape: str) -> Iterator[tuple[dict[str, Any], str]]:
    """Each row with its `file:line`; blank lines do not count. shape: what a row looks like. Raises DataError."""
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise DataError("this line is not JSON", where=where, fix=shape) from None
        if not isinstance(row, dict):
            raise DataError("this line is not a JSON object", where=where, fix=shape)
        yield row, where


def words(text: str) -> float:
    """The number of words, as split at whitespace."""
    return float(len(text.split()))


def repetition(text: str, n: int = 3) -> float:
    """The share of an answer's word n-grams that stood in it before: 1 - distinct / all; 0 below n words."""
    split = text.split()
    grams = [tuple(split[i : i + n]) for i in range(len(split) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def empty(text: str) -> float:
    """1 when there is nothing but whitespace."""
    return float(not text.strip())


def mean(values: Sequence[float]) -> float:
    """The plain mean; 0 of nothing."""
    return sum(values) / len(values) if values else 0.0


def text_stats(
    predictions: Sequence[str], *, stopped: Sequence[bool] | None = None, tokens: Sequence[int] | None = None
) -> dict[str, float]:
    """Means over the answers: words, repeated 3-grams, share that is empty; and, where they are known, the share that
    stopped by itself and the length in tokens."""
    stats = {
        "length_words": mean([words(text) for text in predictions]),
        "repetition": mean([repetition(text) for text in predictions]),
        "empty_rate": mean([empty(text) for text in predictions]),
    }
    if tokens is not None:
        stats["length_tokens"] = mean([float(count) for count in tokens])
    if stopped is not None:
        stats["stop_rate"] = mean([float(flag) for flag in stopped])
    return stats
